//! The first process of a PID namespace that several containers share.
//!
//! Every container of the pod sees this process, and a container that may trace processes can take it over. So it has
//! nothing to take: no capability, no file system except an empty one, and no descriptor after it has reported that it
//! is ready.

use std::{
    io::{self, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{SigSet, Signal},
};
use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{DumpableBehavior, WaitOptions, chdir, pivot_root, set_dumpable_behavior, wait},
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs,
    },
};

use super::{BoxError, HOLD_ARGUMENT, PAUSE_ARGUMENT};

/// What the process reports when it has given up all that it had.
const READY: &[u8] = b"ready";

/// The longest error that is read from the process, in bytes.
const ERROR_LIMIT: u64 = 512;

/// Starts the process, which is the first in the PID namespace of this process's children, and waits until it has given
/// up all that it had. It belongs to the launch of this name.
pub fn spawn(name: &str) -> Result<i32, BoxError> {
    let mut pause = Command::new("/proc/self/exe")
        .args([PAUSE_ARGUMENT, name])
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut report = Vec::new();
    if let Some(stdout) = pause.stdout.take() {
        stdout.take(ERROR_LIMIT).read_to_end(&mut report)?;
    }
    if report != READY {
        let report = String::from_utf8_lossy(&report);
        return Err(format!("the first process of the pod's PID namespace has not started: {report}").into());
    }
    Ok(pause.id().cast_signed())
}

/// The command of a process that keeps the namespaces in which it is started, until it is killed. It belongs to the
/// launch of this name.
pub fn hold_command(name: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([HOLD_ARGUMENT, name]).env_clear();
    command
}

/// Runs the first process of a PID namespace: it gives up all that it has, reports that, and reaps the containers'
/// orphans until it is killed.
pub fn main() -> ExitCode {
    // The name is only what `ps` shows in the pod, so a failure does not matter.
    let _ = rustix::thread::set_name(c"pause");
    let confined = confine();
    let mut stdout = io::stdout().lock();
    let reported = match &confined {
        Ok(()) => stdout.write_all(READY),
        Err(error) => write!(stdout, "{error}"),
    };
    if confined.is_err() || reported.and_then(|()| stdout.flush()).is_err() || close_descriptors().is_err() {
        return ExitCode::FAILURE;
    }
    reap_until_killed()
}

/// Reaps children until this process is killed.
pub fn reap_until_killed() -> ExitCode {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // The signal is blocked, so that `wait` does not miss a child that exits between two rounds.
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

/// Gives this process an empty root, removes its capabilities from all sets, prevents it from gaining any by executing
/// a program, and hides its memory from other processes.
fn confine() -> Result<(), String> {
    let step = |what: &'static str| move |error: io::Error| format!("cannot {what}: {error}");
    enter_empty_root().map_err(step("enter an empty root"))?;
    drop_capabilities().map_err(step("drop its capabilities"))?;
    set_no_new_privs(true).map_err(|errno| step("renounce new privileges")(errno.into()))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| step("hide its memory")(errno.into()))
}

/// Enters an empty root. Containers can reach the root of this process by `/proc/1/root`.
fn enter_empty_root() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", "/run", "tmpfs", flags, c"size=4k,nr_inodes=2,mode=555")?;
    chdir("/run")?;
    // `pivot_root` has mounted the old root over the new one, from which it is unmounted.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

fn drop_capabilities() -> io::Result<()> {
    for capability in CapabilitySet::all() {
        match remove_capability_from_bounding_set(capability) {
            // EINVAL means that this kernel does not have the capability.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// Closes all descriptors, including the one by which the process has reported that it is ready.
fn close_descriptors() -> io::Result<()> {
    // SAFETY: this process does not use any descriptor after this. Nothing owns descriptors 0 to 2, and Rust's objects
    // for them tolerate that they are closed.
    let closed = unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    nix::errno::Errno::result(closed).map(drop).map_err(io::Error::from)
}
