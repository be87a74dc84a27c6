//! `clone3(2)` with the semantics of `vfork(2)`: the child borrows its parent's memory until it executes a program, so
//! that nothing of a large process is copied.

use std::{
    arch::asm,
    ffi::{c_int, c_void},
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr::null_mut,
};

/// Bytes of the child's stack. What it does needs less than one page.
const STACK: usize = 64 << 10;

/// What the child does. It must not return, and must not allocate, lock or panic: another thread of the parent may hold
/// any lock.
// SAFETY: whoever passes one to `clone_vfork` guarantees what is said above.
pub type ChildFunction = unsafe extern "C" fn(*mut c_void) -> !;

/// A new child: its pid here, and a descriptor that stands for it.
pub struct Cloned {
    pub pid: i32,
    pub pidfd: OwnedFd,
}

/// A stack for the child.
struct Stack(*mut c_void);

impl Stack {
    fn new() -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let address = unsafe { libc::mmap(null_mut(), STACK, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(address)) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and the child that used it has executed its program or ended.
        unsafe { libc::munmap(self.0, STACK) };
    }
}

/// Starts a child in new namespaces (`CLONE_NEW…`) and, if one is given, in a cgroup, of which `cgroup` is the
/// directory.
/// Returns when the child has executed a program or ended.
///
/// # Safety
///
/// `function` keeps to what [`ChildFunction`] says, and may use `argument` until then. The child has no signal
/// handlers.
pub unsafe fn clone_vfork(
    namespaces: c_int,
    cgroup: Option<BorrowedFd<'_>>,
    function: ChildFunction,
    argument: *mut c_void,
) -> io::Result<Cloned> {
    let stack = Stack::new()?;
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | namespaces;
    // SAFETY: the structure consists of numbers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from(flags.cast_unsigned()) | CLONE_CLEAR_SIGHAND;
    arguments.pidfd = (&raw mut pidfd) as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    arguments.stack = stack.0 as u64;
    arguments.stack_size = STACK as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    let result: i64;
    // SAFETY: the parent goes on behind the label, with all registers but those named here as they were. The child goes
    // on with the registers of the parent and an empty stack of its own, whose end is a multiple of 16 as the ABI has
    // it, and never comes back from the function. The kernel reads `arguments`, and writes the descriptor.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            // The outermost frame.
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw const arguments,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") argument,
            in("r13") function,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    match i32::try_from(result) {
        // SAFETY: the kernel has opened it for this process.
        Ok(pid @ 1..) => Ok(Cloned { pid, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
        Ok(errno) => Err(io::Error::from_raw_os_error(-errno)),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// `linux/sched.h`; beyond what fits the `c_int` that libc has for the others. The child has no signal handlers from
/// its
/// first instruction on, and glibc's lock for changing them is not needed.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
