//! The first process of a PID namespace that several containers share.

use std::process::ExitCode;

use nix::sys::{
    signal::{SigSet, Signal},
    wait::{WaitPidFlag, WaitStatus, waitpid},
};

/// Reaps what the containers leave behind, until the namespace is killed.
pub fn main() -> ExitCode {
    // What `ps` in the pod shows. It is told nothing else, so a failure is of no consequence.
    let _ = nix::sys::prctl::set_name(c"pause");
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Blocked, so that a child that exits between two rounds is not missed by `wait`.
    if children.thread_block().is_err() {
        return ExitCode::FAILURE;
    }
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        if children.wait().is_err() {
            return ExitCode::FAILURE;
        }
    }
}
