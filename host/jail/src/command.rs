//! Starts a program in the jail.

use std::{
    ffi::{CString, OsStr, c_char, c_int, c_void},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr::null,
};

use rustix::{
    io::retry_on_intr,
    process::{WaitId, WaitIdOptions, waitid},
};

use crate::{
    clone::{Cloned, clone_vfork},
    sealed::{Access, open_sealed},
};

/// The namespaces of its own that the program gets.
const NAMESPACES: c_int =
    libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;

/// The limit of a core file, in bytes. A limit of 0 does not keep the kernel from writing one into a pipe
/// (`kernel.core_pattern`); this one does, and is less than any file of it would have (kernel: `fs/coredump.c`).
const CORE_LIMIT: libc::rlim_t = 1;

/// A program to be started in the jail. It is the first process of its PID namespace.
pub struct JailedCommand {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    stderr: OwnedFd,
    inherited: Vec<OwnedFd>,
    cgroup: Option<OwnedFd>,
}

/// A program that was started. Dropping this changes nothing.
#[derive(Debug)]
pub struct JailedChild {
    /// In the PID namespace of this process.
    pub pid: i32,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
}

impl JailedCommand {
    /// A program by its path, with its name. Its standard input and output are empty; what it writes to its standard
    /// error goes to `stderr`.
    pub fn new(
        program: impl AsRef<OsStr>,
        name: impl AsRef<OsStr>,
        stderr: impl Into<OwnedFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            program: c_string(program)?,
            arguments: vec![c_string(name)?],
            environment: Vec::new(),
            stderr: stderr.into(),
            inherited: Vec::new(),
            cgroup: None,
        })
    }

    /// Adds an argument.
    pub fn argument(&mut self, argument: impl AsRef<OsStr>) -> io::Result<&mut Self> {
        self.arguments.push(c_string(argument)?);
        Ok(self)
    }

    /// Adds an argument and, behind it, the number of a descriptor that the program has.
    pub fn hand_down(&mut self, argument: &str, descriptor: impl Into<OwnedFd>) -> io::Result<&mut Self> {
        let descriptor = descriptor.into();
        self.argument(argument)?.argument(descriptor.as_raw_fd().to_string())?;
        self.inherited.push(descriptor);
        Ok(self)
    }

    /// Adds an environment variable. There are no others.
    pub fn variable(&mut self, name: &str, value: impl AsRef<OsStr>) -> io::Result<&mut Self> {
        let variable = [name.as_bytes(), b"=", value.as_ref().as_bytes()].concat();
        self.environment.push(CString::new(variable)?);
        Ok(self)
    }

    /// Has the program started in a cgroup, of which this is the directory.
    pub fn cgroup(&mut self, directory: OwnedFd) -> &mut Self {
        self.cgroup = Some(directory);
        self
    }

    /// Starts the program. After an error there is no process. Blocks for as long as the kernel takes.
    pub fn spawn(self) -> io::Result<JailedChild> {
        let null_device = open_sealed(Path::new("/dev/null"), Access::ReadAndWrite, 0)?;
        let pointers = |strings: &[CString]| -> Vec<*const c_char> {
            strings.iter().map(|string| string.as_ptr()).chain([null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let inherited: Vec<RawFd> = self.inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let mut plan = Plan {
            program: self.program.as_ptr(),
            arguments: arguments.as_ptr(),
            environment: environment.as_ptr(),
            stdio: [null_device.as_raw_fd(), null_device.as_raw_fd(), self.stderr.as_raw_fd()],
            inherited: inherited.as_ptr(),
            inherited_count: inherited.len(),
            errno: 0,
        };
        // SAFETY: the function makes system calls only. The plan and all that it points to live until this returns.
        let cloned = unsafe {
            clone_vfork(NAMESPACES, self.cgroup.as_ref().map(AsFd::as_fd), execute, (&raw mut plan).cast())
        };
        let Cloned { pid, pidfd } = cloned?;
        if plan.errno != 0 {
            // It has ended by itself, and nobody else waits for it.
            let _ = retry_on_intr(|| waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED));
            return Err(io::Error::from_raw_os_error(plan.errno));
        }
        Ok(JailedChild { pid, pidfd })
    }
}

fn c_string(text: impl AsRef<OsStr>) -> io::Result<CString> {
    Ok(CString::new(text.as_ref().as_bytes())?)
}

/// What the child needs. It is in the parent's memory, which both use until the child has executed its program.
struct Plan {
    program: *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    stdio: [RawFd; 3],
    inherited: *const RawFd,
    inherited_count: usize,
    /// Set by the child: why it could not execute the program.
    errno: c_int,
}

/// The child: it executes the program, or says why not and ends.
///
/// # Safety
///
/// `plan` is the parent's [`Plan`].
// SAFETY: it is called by `clone_vfork` alone, with what `spawn` passes.
unsafe extern "C" fn execute(plan: *mut c_void) -> ! {
    // SAFETY: the parent has passed its plan, which it does not touch while the child uses it.
    unsafe {
        let plan: *mut Plan = plan.cast();
        (*plan).errno = match try_execute(&*plan) {
            Err(errno) => errno,
        };
        libc::_exit(127)
    }
}

/// Makes system calls only, in the order in which each still may be made.
///
/// # Safety
///
/// All that the plan points to is there, and this is the child.
unsafe fn try_execute(plan: &Plan) -> Result<std::convert::Infallible, c_int> {
    // SAFETY: see above. The signal handlers are the child's own copies; its descriptors are, too.
    unsafe {
        // Rust's runtime ignores it, and what is ignored stays ignored.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        // A session of its own: what is sent to the parent's group does not reach it.
        check(libc::setsid())?;
        check(libc::chdir(c"/".as_ptr()))?;
        for (number, descriptor) in (0..).zip(plan.stdio) {
            // None of these is a standard stream already: the parent's are open.
            check(libc::dup2(descriptor, number))?;
        }
        // Whoever opens a descriptor in this process may have forgotten the flag that closes it.
        check_long(libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
        for index in 0..plan.inherited_count {
            check(libc::fcntl(*plan.inherited.add(index), libc::F_SETFD, 0))?;
        }
        // No memory of it goes into a file.
        let core = libc::rlimit { rlim_cur: CORE_LIMIT, rlim_max: CORE_LIMIT };
        check(libc::setrlimit(libc::RLIMIT_CORE, &raw const core))?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        libc::execve(plan.program, plan.arguments, plan.environment);
        Err(*libc::__errno_location())
    }
}

fn check(result: c_int) -> Result<(), c_int> {
    // SAFETY: the location is this thread's.
    if result < 0 { Err(unsafe { *libc::__errno_location() }) } else { Ok(()) }
}

fn check_long(result: libc::c_long) -> Result<(), c_int> {
    check(if result < 0 { -1 } else { 0 })
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
