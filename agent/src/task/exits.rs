//! Reaps every process of the guest and tells who waits for one how it ended.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use rustix::{
    io::Errno,
    process::{WaitOptions, WaitStatus, wait},
};
use tokio::sync::oneshot;

/// How many exits are kept for processes whose pid is about to become known.
const EARLY_LIMIT: usize = 1024;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 plus the number of the signal that killed it.
    pub status: u32,
    /// When the agent learned it.
    pub at: SystemTime,
}

impl Exit {
    /// An exit at this moment.
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// The bookkeeping of exits.
#[derive(Default)]
pub struct Exits(Mutex<Book>);

#[derive(Default)]
struct Book {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Exits that nobody has asked for yet, numbered, the oldest first.
    early: VecDeque<(u64, i32, Exit)>,
    /// The number of the next one.
    next: u64,
    expecting: usize,
}

/// While this is held, exits of processes that nobody waits for yet are kept.
pub struct Expectation {
    exits: Arc<Exits>,
    /// Exits before this one are those of earlier processes, whose pids may have been given out again.
    since: u64,
}

impl Exits {
    /// Nothing known yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// To be held while a process is made whose pid is not yet known: it may exit before.
    pub fn expect(self: &Arc<Self>) -> Expectation {
        let mut book = self.book();
        book.expecting += 1;
        Expectation { exits: Arc::clone(self), since: book.next }
    }

    /// Resolves when the process has exited. It has just been made by the caller, who has not let go of
    /// the thread since: it cannot have been reaped.
    pub fn wait_for(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        self.book().waiting.insert(pid, sender);
        receiver
    }

    /// Reaps every child that has exited.
    pub fn reap(&self) {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let Some(status) = code(status) {
                        self.exited(pid.as_raw_nonzero().get(), status);
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn exited(&self, pid: i32, status: u32) {
        let exit = Exit::now(status);
        let mut book = self.book();
        if let Some(waiter) = book.waiting.remove(&pid) {
            // A waiter that has lost interest needs no answer.
            let _ = waiter.send(exit);
        } else if book.expecting > 0 {
            if book.early.len() == EARLY_LIMIT {
                book.early.pop_front();
            }
            let number = book.next;
            book.next += 1;
            book.early.push_back((number, pid, exit));
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The exit code that a shell would tell; `None` for a process that has not ended. Signals are numbers here: those above
/// 31, the real-time signals, have no names, and a library that wants one forgets a process that died of them.
fn code(status: WaitStatus) -> Option<u32> {
    let code = status.exit_status().or_else(|| Some(128 + status.terminating_signal()?))?;
    Some(code.cast_unsigned())
}

impl Expectation {
    /// Resolves when a process has exited that was made while this was held; it may be gone already.
    pub fn wait_for(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let mut book = self.exits.book();
        let ended = |&(number, early, _): &(u64, i32, Exit)| early == pid && number >= self.since;
        let Some((_, _, exit)) = book.early.iter().rposition(ended).and_then(|at| book.early.remove(at))
        else {
            drop(book);
            return self.exits.wait_for(pid);
        };
        let (sender, receiver) = oneshot::channel();
        // The receiver is right here.
        let _ = sender.send(exit);
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut book = self.exits.book();
        book.expecting -= 1;
        if book.expecting == 0 {
            book.early.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_reaches_the_one_who_waits_for_it() {
        let exits = Exits::new();
        let mut seven = exits.wait_for(7);
        exits.exited(8, 1);
        assert!(seven.try_recv().is_err());
        exits.exited(7, 137);
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
            assert_eq!(code(status), Some(128 + signal.cast_unsigned()));
        }
    }

    #[test]
    fn an_exit_before_the_pid_is_known_is_kept_while_it_is_expected() {
        let exits = Exits::new();
        let expectation = exits.expect();
        exits.exited(7, 3);
        assert_eq!(expectation.wait_for(7).try_recv().unwrap().status, 3);
        exits.exited(9, 1);
        drop(expectation);
        let later = exits.expect();
        assert!(later.wait_for(9).try_recv().is_err(), "an orphan's exit is no later process's");
    }

    #[test]
    fn an_exit_is_not_taken_for_that_of_a_later_process_with_the_same_pid() {
        let exits = Exits::new();
        // Calls overlap, so somebody expects something all the time.
        let _always = exits.expect();
        exits.exited(7, 1);
        let mut later = exits.expect().wait_for(7);
        assert!(later.try_recv().is_err(), "it has just been made");
        exits.exited(7, 2);
        assert_eq!(later.try_recv().unwrap().status, 2);
    }

    #[test]
    fn orphans_do_not_fill_the_memory() {
        let exits = Exits::new();
        let expectation = exits.expect();
        for pid in 0..10_000 {
            exits.exited(pid, 0);
        }
        assert_eq!(exits.book().early.len(), EARLY_LIMIT);
        assert!(expectation.wait_for(9_999).try_recv().is_ok(), "the newest are kept");
    }
}
