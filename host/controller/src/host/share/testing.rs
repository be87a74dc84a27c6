//! A share for tests, in the mount namespace of a process that does nothing else. All of it is real, so it needs root.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use super::{Share, place::Place};
use crate::host::process::Process;

/// A process with a share as a machine has it. It is ended with this.
pub struct JailedProcess {
    pid: libc::pid_t,
}

impl JailedProcess {
    pub fn start() -> Self {
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        // SAFETY: the child has a copy of this thread alone. glibc keeps its allocator usable there, and no lock of
        // anybody else's is needed.
        match unsafe { libc::fork() } {
            0 => {
                let entered = pericarp_jail::enter();
                let _ = write!(writer, "{:?}", entered.map(drop));
                drop(writer);
                loop {
                    // SAFETY: it waits for a signal, and nothing else.
                    unsafe { libc::pause() };
                }
            }
            pid => {
                assert!(pid > 0, "{}", std::io::Error::last_os_error());
                let process = Self { pid };
                drop(writer);
                let mut entered = String::new();
                reader.read_to_string(&mut entered).unwrap();
                assert_eq!(entered, "Ok(())");
                process
            }
        }
    }

    pub fn process(&self) -> Process {
        Process::of(self.pid.unsigned_abs()).unwrap()
    }

    /// Its share. What is kept beside it is kept in a directory.
    pub fn share(&self, directory: &Path) -> Share {
        Share::new(Place::Machine(self.process()), directory.join("volumes.json"))
    }

    /// The path by which this process sees something in the share.
    pub fn host_path(&self, name: impl AsRef<Path>) -> PathBuf {
        Path::new(&format!("/proc/{}/root/share", self.pid)).join(name)
    }

    /// How many mounts there are in it, the share among them.
    pub fn mounts(&self) -> usize {
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", self.pid)).unwrap();
        mounts
            .lines()
            .filter(|line| line.split(' ').nth(4).is_some_and(|at| at.starts_with("/share")))
            .count()
    }
}

impl Drop for JailedProcess {
    fn drop(&mut self) {
        // SAFETY: both name a child of this process that nobody else waits for; its status is not asked for.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
        }
    }
}
