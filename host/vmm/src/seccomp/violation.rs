//! What happens when a thread makes a system call that its filter does not allow.

use std::{fmt::Write as _, io};

use libc::{c_int, c_void, siginfo_t};

use super::calls;
use crate::thread_kind::ThreadKind;

/// The exit status of a machine that its filters have ended: what a shell reports of a process that `SIGSYS` has ended,
/// which is what the kernel does without the handler.
pub const FILTER_EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// How the line ends with which a machine says that, in its log.
pub const FILTER_VIOLATION: &str = "which its filter does not allow";

/// Makes the end of this process by a filter leave a line on standard error, with the kind of thread and the call.
/// The call is refused in any case. Without the handler, or when it is blocked, the kernel ends the process. An
/// attacker who has two threads can keep the handler from ending it, and then knows which calls are refused.
pub fn report_violations() -> io::Result<()> {
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_violation;
    // SAFETY: all zeroes is a sigaction without a handler and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // On the stack for signals: whoever makes such a call may have put the thread's own stack anywhere.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what signal-safety(7) allows.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes the line and ends the process. The calls that it makes are allowed to every thread.
extern "C" fn on_violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    /// `SYS_SECCOMP` in `asm-generic/siginfo.h`: the signal comes from a filter.
    const FROM_FILTER: c_int = 1;
    /// Where the call's number is in a `siginfo_t` (`_sigsys._syscall`), which the crate libc does not say.
    const CALL_OFFSET: usize = 24;
    // SAFETY: the kernel gives a handler with SA_SIGINFO a siginfo_t.
    let (code, thread) = unsafe { ((*info).si_code, (*info).si_errno) };
    if code == FROM_FILTER {
        // SAFETY: for this code, the number is an int at this place inside the siginfo_t, which is aligned for it.
        let number = unsafe { info.byte_add(CALL_OFFSET).cast::<c_int>().read() };
        let line = Line::of_violation(thread, number);
        // SAFETY: the line outlives the call. If it cannot be written, the exit status still tells.
        unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.length) };
    }
    // SAFETY: it ends the process and does nothing else.
    unsafe { libc::_exit(FILTER_EXIT_STATUS) }
}

/// A line that is made without memory from the allocator, whose locks may be held.
struct Line {
    bytes: [u8; 192],
    length: usize,
}

impl Line {
    /// What is written of a call. `thread` is what the filter has told of its thread.
    fn of_violation(thread: c_int, number: c_int) -> Self {
        let mut line = Self { bytes: [0; 192], length: 0 };
        let thread = ThreadKind::ALL.into_iter().find(|kind| *kind as c_int == thread);
        let (thread, call) =
            (thread.map_or("?", ThreadKind::name), calls::name(number.into()).unwrap_or("unknown"));
        // It is longer than any such text; what would not fit is missing.
        let _ =
            writeln!(line, "error: thread {thread} made system call {number} ({call}), {FILTER_VIOLATION}");
        line
    }
}

impl std::fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.length + text.len();
        let free = self.bytes.get_mut(self.length..end).ok_or(std::fmt::Error)?;
        free.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_violation_fits_whatever_thread_and_call_it_names() {
        for kind in ThreadKind::ALL {
            for number in [0, libc::SYS_execve, libc::SYS_set_mempolicy_home_node, c_int::MIN.into()] {
                let line = Line::of_violation(kind as c_int, c_int::try_from(number).unwrap());
                let text = std::str::from_utf8(&line.bytes[..line.length]).unwrap();
                assert!(
                    text.starts_with(&format!("error: thread {} made system call", kind.name())),
                    "{text}"
                );
                assert!(text.ends_with(&format!("{FILTER_VIOLATION}\n")), "{text}");
            }
        }
    }
}
