//! System calls that no thread of the machine makes. Where one is not refused, it does no harm.

use libc::{c_long, syscall};

/// Calls that [`make`] knows and that no kind of thread may make.
#[cfg(test)]
pub const OF_NO_THREAD: [&str; 14] = [
    "execve",
    "ptrace",
    "mount",
    "kill",
    "tgkill",
    "socket",
    "clone",
    "mmap",
    "mprotect",
    "ioctl",
    "prctl",
    "unshare",
    "bpf",
    "io_uring_setup",
];

/// Makes a system call. Returns what it returns. Panics if it does not know the name.
pub fn make(name: &str) -> c_long {
    const PAGE: usize = 4096;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: each call has arguments of its types, which outlive it, and changes nothing of this process that others
    // rely on: it fails, or what it makes is new.
    unsafe {
        match name {
            "openat" => syscall(libc::SYS_openat, libc::AT_FDCWD, c"/etc/shadow".as_ptr(), libc::O_RDONLY),
            "execve" => syscall(libc::SYS_execve, c"/nonexistent".as_ptr(), nothing, nothing),
            "ptrace" => syscall(libc::SYS_ptrace, libc::PTRACE_PEEKDATA, 1, nothing, nothing),
            "mount" => {
                syscall(libc::SYS_mount, nothing, c"/nonexistent".as_ptr(), nothing, libc::MS_PRIVATE, 0)
            }
            "kill" => syscall(libc::SYS_kill, 1, 0),
            "tgkill" => syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0),
            "socket" => syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "clone" => match syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                0 => libc::_exit(0),
                child => child,
            },
            "mmap" => syscall(
                libc::SYS_mmap,
                0,
                PAGE,
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ),
            "mprotect" => syscall(libc::SYS_mprotect, 0, PAGE, libc::PROT_EXEC),
            "ioctl" => syscall(libc::SYS_ioctl, -1, libc::TIOCSTI, nothing),
            "prctl" => syscall(libc::SYS_prctl, libc::PR_GET_DUMPABLE, 0, 0, 0, 0),
            "unshare" => syscall(libc::SYS_unshare, 0),
            "bpf" => syscall(libc::SYS_bpf, -1, nothing, 0),
            "io_uring_setup" => syscall(libc::SYS_io_uring_setup, 0, nothing),
            "setfsuid" => syscall(libc::SYS_setfsuid, 0),
            "KVM_RUN" => syscall(libc::SYS_ioctl, -1, 0xae80, 0),
            _ => unreachable!("no attack has the name {name}"),
        }
    }
}
