//! Locks in a process that does not survive a panic.

use std::sync::LockResult;

/// The value of a lock, or of a wait on a condition variable.
///
/// A thread that panics while it holds a lock poisons it. In a machine that cannot be seen, because a panic ends the
/// process (`machine::run`): no thread continues with data that another has left half changed.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    #[expect(
        clippy::expect_used,
        reason = "the thread that would have poisoned the lock has ended the process"
    )]
    // Cannot fail: a panic has ended the process.
    result.expect("a thread has panicked while it held this lock")
}
