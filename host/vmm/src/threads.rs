//! The machine's threads: each is of a [`ThreadKind`], which decides which privileges it has ([`ThreadKind::restrict`])
//! and which system calls it may make ([`seccomp`]).
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
use thiserror::Error;

use crate::{
    seccomp::{self, FilterError},
    thread_kind::ThreadKind,
};

/// Requests that wait for the spawner. Whoever makes one waits for its answer, so that no more can wait than the
/// machine
/// has threads.
const REQUESTS: usize = 1;

/// A thread cannot be restricted to what its kind needs.
#[derive(Debug, Error)]
pub enum RestrictError {
    #[error("the capabilities of the thread {thread} cannot be dropped")]
    Capabilities {
        thread: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Filter(#[from] FilterError),
}

impl ThreadKind {
    /// Drops what a thread of this kind must not have, and refuses it all system calls that it does not need. It is
    /// called on that thread, before it sees anything of a guest's.
    pub fn restrict(self) -> Result<(), RestrictError> {
        let restricted = match self {
            // Whoever starts a thread that needs privileges has them itself.
            Self::Spawner | Self::Fs => restrict_capabilities().map_err(io::Error::from),
            Self::Main
            | Self::Vcpu
            | Self::Vsock
            | Self::Net
            | Self::Blk
            | Self::Descriptors
            | Self::DiskRemoval
            | Self::Control => drop_capabilities(),
        };
        restricted.map_err(|source| RestrictError::Capabilities { thread: self.name(), source })?;
        Ok(seccomp::install(self)?)
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
    /// Starts the spawner. It has no more privileges than the threads that it starts. From now on, a system call that a
    /// thread's filter does not allow ends the process with a line that names both.
    pub fn start() -> io::Result<Self> {
        seccomp::report_violations()?;
        let (sender, requests) = mpsc::sync_channel(REQUESTS);
        start(ThreadKind::Spawner, "spawner".to_owned(), Box::new(move || serve(&requests)))?;
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
        let restricted = kind.restrict().map_err(io::Error::other);
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
    use std::fs;

    use super::*;

    /// The sets of capabilities of a new thread of a kind, which cannot look for itself: permitted, effective,
    /// inheritable.
    fn sets(spawner: &ThreadSpawner, kind: ThreadKind) -> [CapabilitySet; 3] {
        let (sender, receiver) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let work = move || {
            sender.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        };
        let thread = spawner.spawn(kind, "test", work).unwrap();
        let status =
            fs::read_to_string(format!("/proc/self/task/{}/status", receiver.recv().unwrap())).unwrap();
        drop(end);
        thread.join().unwrap();
        ["CapPrm", "CapEff", "CapInh"].map(|key| {
            let line = status.lines().find_map(|line| line.strip_prefix(&format!("{key}:"))).unwrap();
            CapabilitySet::from_bits_retain(u64::from_str_radix(line.trim(), 16).unwrap())
        })
    }

    #[test]
    fn only_the_thread_that_serves_files_has_capabilities_and_only_those_for_files() {
        let spawner = ThreadSpawner::start().unwrap();
        for kind in
            [ThreadKind::Vcpu, ThreadKind::Vsock, ThreadKind::Net, ThreadKind::Blk, ThreadKind::Control]
        {
            assert!(sets(&spawner, kind).iter().all(CapabilitySet::is_empty), "{kind:?}");
        }
        let [for_files, effective, inheritable] = sets(&spawner, ThreadKind::Fs);
        assert_eq!((effective, inheritable), (for_files, CapabilitySet::empty()));
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
        let (end, ended) = mpsc::channel::<()>();
        let of_files = move || {
            sender.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        };
        let work = move || drop(from_vcpu.spawn(ThreadKind::Fs, "fs", of_files).unwrap());
        spawner.spawn(ThreadKind::Vcpu, "vcpu0", work).unwrap().join().unwrap();
        let status =
            fs::read_to_string(format!("/proc/self/task/{}/status", receiver.recv().unwrap())).unwrap();
        drop(end);
        let permitted = sets(&spawner, ThreadKind::Fs)[0].bits();
        assert!(status.contains(&format!("CapPrm:\t{permitted:016x}\n")), "{status}");
    }
}
