//! The user namespace of all machines: every id is what it is on the host, and no capability in it is one on the host.
//!
//! None can be made inside it: whoever makes a user namespace has all capabilities there, whatever they had before, and
//! could make a mount namespace in which they mount as they like. The controller would follow them into that.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
};

use rustix::{
    io::retry_on_intr,
    process::{WaitId, WaitIdOptions, waitid},
};

/// All ids, each as itself (`user_namespaces(7)`). The last one stands for "no id".
const IDENTITY: &str = "0 0 4294967295\n";

/// Makes such a namespace. It exists for as long as the descriptor, or a process in it, does.
///
/// # Errors
///
/// What the kernel has refused: it may have no user namespaces (`CONFIG_USER_NS`), or allow no more of them
/// (`user.max_user_namespaces`).
pub fn make_user_namespace() -> io::Result<OwnedFd> {
    let (end_of_child, mut end) = io::pipe()?;
    let child = start_member(end_of_child.as_raw_fd(), end.as_raw_fd())?;
    let made = write_maps(child.0).and_then(|namespace| {
        // The child goes on with this byte, or ends without it.
        end.write_all(&[0])?;
        Ok(namespace)
    });
    drop(end);
    let status = retry_on_intr(|| waitid(WaitId::PidFd(child.1.as_fd()), WaitIdOptions::EXITED))?;
    let namespace = made?;
    match status.and_then(|status| status.exit_status()) {
        Some(0) => Ok(namespace),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::other("the process that was to set it up was killed")),
    }
}

/// Forbids user namespaces inside the one of this process: with none allowed, the kernel refuses to make any. Returns
/// an error number, or 0.
///
/// # Safety
///
/// It makes system calls only, and may be called in a copy of one thread of a process that has others.
unsafe fn forbid_nesting() -> i32 {
    // SAFETY: each call gets constants and a descriptor that was just opened; `errno` is this thread's own.
    unsafe {
        let file =
            libc::open(c"/proc/sys/user/max_user_namespaces".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file < 0 || libc::write(file, c"0".as_ptr().cast(), 1) != 1 {
            *libc::__errno_location()
        } else {
            0
        }
    }
}

/// Starts a process in a new user namespace. When it has read a byte, it forbids user namespaces in it, and ends with
/// the number of an error, or 0. Returns its id and a descriptor of it.
fn start_member(reader: i32, writer: i32) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd = -1;
    // SAFETY: the structure consists of numbers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((libc::CLONE_NEWUSER | libc::CLONE_PIDFD).cast_unsigned());
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    // SAFETY: the kernel reads the arguments and writes the descriptor. The child has its own copy of the memory.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match i32::try_from(result) {
        Ok(0) => {
            let mut byte = 0_u8;
            // SAFETY: this is the child, with a copy of one thread of a process that has others: it only makes system
            // calls, on its own descriptors and its own byte, and ends.
            unsafe {
                libc::close(writer);
                let told = libc::read(reader, (&raw mut byte).cast(), 1) == 1;
                libc::_exit(if told { forbid_nesting() } else { libc::ECANCELED })
            }
        }
        // SAFETY: the kernel has opened it for this process.
        Ok(pid @ 1..) => Ok((pid, unsafe { OwnedFd::from_raw_fd(pidfd) })),
        _ => Err(io::Error::last_os_error()),
    }
}

fn write_maps(pid: i32) -> io::Result<OwnedFd> {
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{pid}/{map}"), IDENTITY)?;
    }
    Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
}

/// Enters the namespace. This process must have no other threads. It has all capabilities in the namespace afterwards,
/// and none outside of it.
pub fn enter_user_namespace(namespace: &OwnedFd) -> io::Result<()> {
    let user = Some(rustix::thread::LinkNameSpaceType::User);
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), user)?)
}

#[cfg(test)]
#[path = "user_namespace_tests.rs"]
mod tests;
