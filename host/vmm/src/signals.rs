//! Signals to the machine's process.

use std::io;

/// Ends this process when it is asked to, as it would by default if it were not the first of its PID namespace: there,
/// the kernel drops signals without a handler, and the shutdown of a node would wait for each machine.
pub fn end_on_sigterm() -> io::Result<()> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: it ends the process and does nothing else; a signal handler may call it (signal-safety(7)).
        unsafe { libc::_exit(128 + signal) }
    }
    let handler: extern "C" fn(libc::c_int) = end;
    // SAFETY: the handler only ends the process, and nobody else in it handles this signal.
    match unsafe { libc::signal(libc::SIGTERM, handler as libc::sighandler_t) } {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
