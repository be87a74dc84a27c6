//! Reaps every process of the guest, and passes its exit on to whoever waits for it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use rustix::{
    io::Errno,
    process::{Pid, WaitId, WaitIdOptions, WaitOptions, WaitStatus, wait, waitid},
};
use tokio::sync::oneshot;

/// How many exits are kept for processes whose pid is not known yet.
const EARLY_EXITS_MAX: usize = 1024;

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 plus the number of the signal that killed the process.
    pub status: u32,
    /// When the agent has reaped it.
    pub at: SystemTime,
}

impl Exit {
    /// An exit at this moment.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// The guest's reaper: as PID 1 the agent is the parent of every orphan.
#[derive(Default)]
pub struct Reaper(Mutex<ReaperState>);

#[derive(Default)]
struct ReaperState {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Exits that nobody has waited for yet, the oldest first.
    early_exits: VecDeque<EarlyExit>,
    /// The number that the next early exit gets.
    next_number: u64,
    subscriptions: usize,
}

/// The exit of a process that nobody has waited for yet.
#[derive(Clone, Copy)]
struct EarlyExit {
    number: u64,
    pid: i32,
    exit: Exit,
}

/// While this exists, exits of processes that nobody waits for yet are kept.
pub struct Subscription {
    reaper: Arc<Reaper>,
    /// Exits with lower numbers belong to earlier processes, which may have had the same pid.
    first_number: u64,
}

impl Reaper {
    /// A reaper that has not reaped anything yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Subscribes to the exit of a process that is about to be created. It may exit before its pid is known.
    pub fn subscribe(self: &Arc<Self>) -> Subscription {
        let mut state = self.state();
        state.subscriptions += 1;
        Subscription { reaper: Arc::clone(self), first_number: state.next_number }
    }

    /// Resolves when the process has exited. The caller must just have created the process, and must not have yielded
    /// since, so that it cannot have been reaped yet.
    pub fn wait_for(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.state().waiting.insert(pid, sender);
        receiver
    }

    /// Whether a process of this pid can just have been created: it is a child of this process, or was one and has
    /// been reaped, and nobody knows it yet. Whoever names a pid may not tell the truth.
    pub fn may_be_new(&self, pid: i32) -> bool {
        let state = self.state();
        if pid <= 1 || state.waiting.contains_key(&pid) {
            return false;
        }
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let is_child = Pid::from_raw(pid).is_some_and(|pid| waitid(WaitId::Pid(pid), flags).is_ok());
        is_child || state.early_exits.iter().any(|early| early.pid == pid)
    }

    /// Reaps every child that has exited.
    pub fn reap(&self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(status) = exit_code(status) {
                        self.record(pid.as_raw_nonzero().get(), status);
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn record(&self, pid: i32, status: u32) {
        let exit = Exit::now(status);
        let mut state = self.state();
        if let Some(waiter) = state.waiting.remove(&pid) {
            // An error means that the waiter is gone.
            let _ = waiter.send(exit);
        } else if state.subscriptions > 0 {
            if state.early_exits.len() == EARLY_EXITS_MAX {
                state.early_exits.pop_front();
            }
            let number = state.next_number;
            state.next_number += 1;
            state.early_exits.push_back(EarlyExit { number, pid, exit });
        }
    }

    fn state(&self) -> MutexGuard<'_, ReaperState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exit code that a shell would show; `None` for a process that has not ended. Signals stay numbers here: the
/// real-time signals, those above 31, have no names, and a library that needs one would lose a process that died of
/// them.
fn exit_code(status: WaitStatus) -> Option<u32> {
    let code = status.exit_status().or_else(|| Some(128 + status.terminating_signal()?))?;
    Some(code.cast_unsigned())
}

impl Subscription {
    /// Resolves when a process has exited that was created during this subscription. It may have exited already.
    pub fn wait_for(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let mut state = self.reaper.state();
        let is_its_exit = |early: &EarlyExit| early.pid == pid && early.number >= self.first_number;
        let early = state.early_exits.iter().rposition(is_its_exit);
        let Some(EarlyExit { exit, .. }) = early.and_then(|index| state.early_exits.remove(index)) else {
            drop(state);
            return self.reaper.wait_for(pid);
        };
        let (sender, receiver) = oneshot::channel();
        // This cannot fail, because this function has the receiver.
        let _ = sender.send(exit);
        receiver
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.reaper.state();
        state.subscriptions -= 1;
        if state.subscriptions == 0 {
            state.early_exits.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reaches_the_one_who_waits_for_it() {
        let reaper = Reaper::new();
        let mut seven = reaper.wait_for(7);
        reaper.record(8, 1);
        assert!(seven.try_recv().is_err());
        reaper.record(7, 137);
        assert_eq!(seven.try_recv().unwrap().status, 137);
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "it is waited for by its number")]
    fn a_process_may_die_of_a_signal_without_a_name() {
        for signal in [libc::SIGKILL, libc::SIGTERM, libc::SIGSEGV].into_iter().chain(34..=64) {
            let child = std::process::Command::new("sh")
                .args(["-c", "ulimit -c 0; exec sleep infinity"])
                .spawn()
                .unwrap();
            let pid = rustix::process::Pid::from_child(&child);
            // SAFETY: kill(2) touches no memory of this process.
            assert_eq!(unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) }, 0, "signal {signal}");
            let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
            assert_eq!(exit_code(status), Some(128 + signal.cast_unsigned()));
        }
    }

    #[test]
    fn only_an_unknown_child_can_be_new() {
        let reaper = Reaper::new();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(reaper.may_be_new(pid));
        let _waiting = reaper.wait_for(pid);
        assert!(!reaper.may_be_new(pid), "it is another launch's");
        child.kill().unwrap();
        child.wait().unwrap();
        for forged in [-1, 0, 1, std::process::id().cast_signed(), i32::MAX, i32::MIN] {
            assert!(!reaper.may_be_new(forged), "{forged}");
        }
        let _subscription = reaper.subscribe();
        reaper.record(i32::MAX, 0);
        assert!(reaper.may_be_new(i32::MAX), "it has ended already");
    }

    #[test]
    fn an_exit_before_the_pid_is_known_is_kept_while_it_is_expected() {
        let reaper = Reaper::new();
        let subscription = reaper.subscribe();
        reaper.record(7, 3);
        assert_eq!(subscription.wait_for(7).try_recv().unwrap().status, 3);
        reaper.record(9, 1);
        drop(subscription);
        let later = reaper.subscribe();
        assert!(later.wait_for(9).try_recv().is_err(), "an orphan's exit is no later process's");
    }

    #[test]
    fn an_exit_is_not_taken_for_that_of_a_later_process_with_the_same_pid() {
        let reaper = Reaper::new();
        // Calls overlap, so there is a subscription all the time.
        let _overlapping = reaper.subscribe();
        reaper.record(7, 1);
        let mut later = reaper.subscribe().wait_for(7);
        assert!(later.try_recv().is_err(), "it has just been made");
        reaper.record(7, 2);
        assert_eq!(later.try_recv().unwrap().status, 2);
    }

    #[test]
    fn orphans_do_not_fill_the_memory() {
        let reaper = Reaper::new();
        let subscription = reaper.subscribe();
        for pid in 0..10_000 {
            reaper.record(pid, 0);
        }
        assert_eq!(reaper.state().early_exits.len(), EARLY_EXITS_MAX);
        assert!(subscription.wait_for(9_999).try_recv().is_ok(), "the newest are kept");
    }
}
