//! The first process of a PID namespace that several containers share.
//!
//! Every container of the pod sees it, and one that may trace processes can be it. So it has nothing: no capability, no
//! file system but an empty one, and no descriptors but those by which it has told that it is ready.

use std::{
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
    unistd::pivot_root,
};
use rustix::{
    process::{DumpableBehavior, WaitOptions, set_dumpable_behavior, wait},
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs,
    },
};

use super::{BoxError, HOLD_ARGUMENT, PAUSE_ARGUMENT};

/// What it says when it has given up all that it had.
const READY: &[u8] = b"ready";

/// The longest error that is read of it, in bytes.
const ERROR_LIMIT: u64 = 512;

/// Starts it in the PID namespace that the children of this process will be in, and waits until it can be shown to
/// containers.
pub fn spawn() -> Result<i32, BoxError> {
    let mut pause = Command::new("/proc/self/exe")
        .arg(PAUSE_ARGUMENT)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut said = Vec::new();
    if let Some(stdout) = pause.stdout.take() {
        stdout.take(ERROR_LIMIT).read_to_end(&mut said)?;
    }
    if said != READY {
        let said = String::from_utf8_lossy(&said);
        return Err(format!("the first process of the pod's PID namespace has not started: {said}").into());
    }
    Ok(pause.id().cast_signed())
}

/// A process that lives until it is killed, in namespaces that it was started in.
pub fn command_to_hold() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(HOLD_ARGUMENT).env_clear();
    command
}

/// Gives up everything, says so, and reaps what the containers leave behind until the namespace is killed.
pub fn main() -> ExitCode {
    // What `ps` in the pod shows. It is told nothing else, so a failure is of no consequence.
    let _ = nix::sys::prctl::set_name(c"pause");
    let confined = confine();
    let mut stdout = io::stdout().lock();
    let told = match &confined {
        Ok(()) => stdout.write_all(READY),
        Err(error) => write!(stdout, "{error}"),
    };
    if confined.is_err() || told.and_then(|()| stdout.flush()).is_err() || close_descriptors().is_err() {
        return ExitCode::FAILURE;
    }
    hold()
}

/// Reaps until it is killed.
pub fn hold() -> ExitCode {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that a child that exits between two rounds is not missed by `wait`.
    if children.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}

/// An empty root, no capability in any set, none to be had by executing something, and no memory for others to look at.
fn confine() -> Result<(), String> {
    let step = |what: &'static str| move |error: io::Error| format!("cannot {what}: {error}");
    empty_root().map_err(step("enter an empty root"))?;
    drop_capabilities().map_err(step("drop its capabilities"))?;
    set_no_new_privs(true).map_err(|errno| step("renounce new privileges")(errno.into()))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| step("hide its memory")(errno.into()))
}

/// The guest's root would be at `/proc/1/root` of every container.
fn empty_root() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), "/run", Some("tmpfs"), flags, Some("size=4k,nr_inodes=2,mode=555"))?;
    nix::unistd::chdir("/run")?;
    // The old root is mounted over the new one, and taken off it.
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    Ok(nix::unistd::chdir("/")?)
}

fn drop_capabilities() -> io::Result<()> {
    for capability in CapabilitySet::all() {
        match remove_capability_from_bounding_set(capability) {
            // One that this kernel does not have.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// The last of its descriptors are closed when nothing has to be said any more.
fn close_descriptors() -> io::Result<()> {
    // SAFETY: nothing in this process uses a descriptor from here on; no one owns 0 to 2, and its Rust objects for them
    // tolerate that they are closed.
    let closed = unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    nix::errno::Errno::result(closed).map(drop).map_err(io::Error::from)
}
