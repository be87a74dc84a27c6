//! Whether this host can have the jail.

use std::io;

use crate::{enter, enter_user_namespace, make_user_namespace};

/// Tries what each machine does, in a process of its own, of which nothing is left. The calling process must have no
/// other threads.
///
/// # Errors
///
/// What the kernel has refused.
pub fn probe() -> io::Result<()> {
    let namespace = make_user_namespace()?;
    // SAFETY: the child has a copy of this process's only thread.
    match unsafe { libc::fork() } {
        0 => {
            let entered = enter().and_then(|_| enter_user_namespace(&namespace));
            let errno = entered.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(errno) }
        }
        child if child > 0 => {
            let mut status = 0;
            // SAFETY: the status is this function's own, and the child nobody else's.
            if unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
                return Err(io::Error::last_os_error());
            }
            match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
                (true, 0) => Ok(()),
                (true, errno) => Err(io::Error::from_raw_os_error(errno)),
                (false, _) => Err(io::Error::other("the process that has tried it was killed")),
            }
        }
        _ => Err(io::Error::last_os_error()),
    }
}
