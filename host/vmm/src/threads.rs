//! The machine's threads: each is of a [`ThreadKind`], which decides what it may do.
//!
//! A thread inherits the privileges of the one that starts it, and devices start theirs when the guest's driver
//! activates them, on the thread of a vCPU, which has none. So one thread, the spawner, starts all others: it does
//! nothing else, and what it is asked to run was compiled into the machine.
//!
//! This is no wall inside the machine: whoever has captured one thread has the memory of all, and so what the thread
//! that serves files may do. It keeps a fault in one of the others from being more than that fault.

use std::{
    io,
    sync::mpsc::{self, Receiver, SyncSender},
    thread::{Builder, JoinHandle},
};

use rustix::{
    io::Errno,
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
        remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
        set_no_new_privs,
    },
};

/// Requests that wait for the spawner. Whoever makes one waits for its answer, so that no more can wait than the
/// machine
/// has threads.
const REQUESTS: usize = 1;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, or a device's worker that needs no privilege.
    Unprivileged,
    /// Serves the share: it reads and writes files whoever owns them.
    Fs,
}

impl ThreadKind {
    /// Drops what a thread of this kind must not have. It is called on that thread, before it sees anything of a
    /// guest's.
    pub fn restrict(self) -> io::Result<()> {
        match self {
            Self::Unprivileged => drop_capabilities(),
            Self::Fs => Ok(restrict_capabilities()?),
        }
    }
}

/// Keeps this process, and all that it might execute, from ever having more privileges than those of its threads, and
/// others without privileges from looking into it. It is called before there are any other threads.
pub fn renounce_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    for capability in CapabilitySet::all().difference(required_capabilities()).iter() {
        match remove_capability_from_bounding_set(capability) {
            // Who has no privileges cannot do this, and need not. A kernel may not know all of them.
            Ok(()) | Err(Errno::PERM | Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Drops all capabilities of the calling thread.
fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    Ok(set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?)
}

/// The capabilities that are needed to execute the guest's requests on files below the share, whoever owns them. They
/// are not enough to make devices, to exceed limits of disk space, or to set attributes that the host trusts.
pub fn required_capabilities() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETFCAP
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
}

/// Drops the calling thread's capabilities except those that it needs, which it keeps when it takes another user's ids.
/// Must be called before the first request, because virtiofsd restores what it has found then.
pub fn restrict_capabilities() -> rustix::io::Result<()> {
    let bits = capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    match set_capabilities_secure_bits(bits) {
        // A machine without privileges has no capabilities, and cannot take another user's ids.
        Err(Errno::PERM) => {}
        result => result?,
    }
    let has = capabilities(None)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: has.effective & required_capabilities(),
            permitted: has.permitted & required_capabilities(),
            inheritable: CapabilitySet::empty(),
        },
    )
}

struct Request {
    kind: ThreadKind,
    name: String,
    work: Box<dyn FnOnce() + Send>,
    started: SyncSender<io::Result<JoinHandle<()>>>,
}

/// Starts the machine's threads. Its clones stand for the same thread, which ends with the last of them.
#[derive(Clone, Debug)]
pub struct ThreadSpawner(SyncSender<Request>);

impl std::fmt::Debug for Request {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Request")
            .field("kind", &self.kind)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl ThreadSpawner {
    /// Starts the spawner. It has no more privileges than the threads that it starts.
    pub fn start() -> io::Result<Self> {
        let (sender, requests) = mpsc::sync_channel(REQUESTS);
        start(ThreadKind::Fs, "spawner".to_owned(), Box::new(move || serve(&requests)))?;
        Ok(Self(sender))
    }

    /// Starts a thread for some work. The thread drops what its kind must not have first; if that fails, it does
    /// nothing else, and this is an error.
    pub fn spawn(
        &self,
        kind: ThreadKind,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let (started, is_started) = mpsc::sync_channel(1);
        let request = Request { kind, name: name.to_owned(), work: Box::new(work), started };
        self.0.send(request).map_err(|_| io::Error::other("the thread that starts others has ended"))?;
        is_started.recv().map_err(io::Error::other)?
    }
}

fn serve(requests: &Receiver<Request>) {
    for Request { kind, name, work, started } in requests {
        let _ = started.send(start(kind, name, work));
    }
}

fn start(kind: ThreadKind, name: String, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    let (ready, is_ready) = mpsc::sync_channel(1);
    let thread = Builder::new().name(name).spawn(move || {
        let restricted = kind.restrict();
        let may_work = restricted.is_ok();
        // The other end waits for it.
        let _ = ready.send(restricted);
        if may_work {
            work();
        }
    })?;
    is_ready.recv().map_err(io::Error::other)??;
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permitted(spawner: &ThreadSpawner, kind: ThreadKind) -> CapabilitySet {
        let (sender, receiver) = mpsc::channel();
        let work = move || sender.send(capabilities(None).unwrap()).unwrap();
        spawner.spawn(kind, "test", work).unwrap().join().unwrap();
        let sets = receiver.recv().unwrap();
        assert_eq!(sets.effective, sets.permitted);
        assert!(sets.inheritable.is_empty());
        sets.permitted
    }

    #[test]
    fn only_the_thread_that_serves_files_has_capabilities_and_only_those_for_files() {
        let spawner = ThreadSpawner::start().unwrap();
        assert!(permitted(&spawner, ThreadKind::Unprivileged).is_empty());
        let for_files = permitted(&spawner, ThreadKind::Fs);
        // Whoever runs this may have none.
        let own = capabilities(None).unwrap().permitted;
        assert_eq!(
            for_files.contains(CapabilitySet::DAC_OVERRIDE),
            own.contains(CapabilitySet::DAC_OVERRIDE)
        );
        for never in
            [CapabilitySet::SYS_ADMIN, CapabilitySet::MKNOD, CapabilitySet::SYS_PTRACE, CapabilitySet::KILL]
        {
            assert!(!for_files.contains(never), "{never:?}");
        }
    }

    #[test]
    fn a_thread_without_privileges_can_have_others_started_that_need_some() {
        let spawner = ThreadSpawner::start().unwrap();
        let from_vcpu = spawner.clone();
        let (sender, receiver) = mpsc::channel();
        let work = move || sender.send(permitted(&from_vcpu, ThreadKind::Fs)).unwrap();
        spawner.spawn(ThreadKind::Unprivileged, "vcpu0", work).unwrap().join().unwrap();
        assert_eq!(receiver.recv().unwrap(), permitted(&spawner, ThreadKind::Fs));
    }
}
