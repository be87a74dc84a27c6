//! Where a share is, and how it is reached: in the mount namespace of the pod's machine and nowhere else.
//!
//! Mounts are made on the host, attached nowhere, and put into the machine's namespace by a thread that enters it. What
//! such a thread does it does by names that it resolves there: of the host it sees only the descriptors that it has.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::fchdir,
    thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe},
};

use super::ShareError;
use crate::host::{
    mounts::{self, MountError},
    process::Process,
};

/// Where a share is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the mount namespace of this machine, as [`pericarp_jail::SHARE`]. It is gone with the machine.
    Machine(Process),
    /// Nowhere yet: there is no machine.
    Nowhere,
    /// A directory of the host. Machines of versions before this one have such a share.
    Host(PathBuf),
}

impl Place {
    /// The share's path there.
    pub fn path(&self) -> &Path {
        match self {
            Self::Machine(_) | Self::Nowhere => Path::new(pericarp_jail::SHARE),
            Self::Host(directory) => directory,
        }
    }

    /// Does `work` there, on a thread of its own, whose working directory is the share without all that is mounted
    /// below it: only there can its directories be changed.
    ///
    /// # Errors
    ///
    /// [`ShareError::Gone`] if there is no machine, or no share in it. Blocks.
    pub fn enter<T: Send>(
        &self,
        work: impl FnOnce(&Path) -> Result<T, ShareError> + Send,
    ) -> Result<T, ShareError> {
        let machine = match self {
            Self::Machine(process) => match process.open().map_err(ShareError::Enter)? {
                Some((_, pidfd)) => Some(pidfd),
                None => return Err(ShareError::Gone),
            },
            Self::Nowhere => return Err(ShareError::Gone),
            Self::Host(_) => None,
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name("share".into()).spawn_scoped(scope, || {
                let own = File::open("/proc/thread-self/ns/mnt").map_err(ShareError::Enter)?;
                self.enter_on_this_thread(machine.as_ref())?;
                let done = work(self.path());
                // Who waits for this thread may find it still there for a moment, and the machine's mounts with it.
                if machine.is_some() {
                    move_into_thread_name_spaces(own.as_fd(), ThreadNameSpaceType::MOUNT)
                        .map_err(|errno| ShareError::Enter(errno.into()))?;
                }
                done
            });
            let joined = thread.map_err(ShareError::Enter)?.join();
            joined.unwrap_or_else(|_| Err(ShareError::Enter(io::Error::other("the thread panicked"))))
        })
    }

    fn enter_on_this_thread(&self, machine: Option<&OwnedFd>) -> Result<(), ShareError> {
        let path = self.path();
        // SAFETY: only this thread's root and working directory become its own.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.map_err(|errno| ShareError::Enter(errno.into()))?;
        let bare = match machine {
            Some(machine) => {
                let entered = move_into_thread_name_spaces(machine.as_fd(), ThreadNameSpaceType::MOUNT);
                match entered {
                    // It has ended, and is not yet waited for.
                    Err(Errno::SRCH) if has_ended(machine) => return Err(ShareError::Gone),
                    entered => entered.map_err(|errno| ShareError::Enter(errno.into()))?,
                }
                // One that has not left the host's files yet.
                match mounts::open_place(Path::new("/proc")) {
                    Err(Errno::NOENT) => {}
                    Ok(_) => return Err(ShareError::Gone),
                    Err(errno) => return Err(ShareError::Enter(errno.into())),
                }
                let share = mounts::open_place(path).map_err(MountError::new("open", path));
                let share = match share {
                    Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                        return Err(ShareError::Gone);
                    }
                    share => share?,
                };
                let bare = mounts::clone_tree(&share, false).map_err(MountError::new("copy", path))?;
                mounts::set_writable(&bare).map_err(MountError::new("write to", path))?;
                bare
            }
            None => match mounts::below_mounts(path) {
                Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Err(ShareError::Gone),
                bare => bare?,
            },
        };
        Ok(fchdir(&bare).map_err(MountError::new("enter", path))?)
    }
}

/// Whether all threads of a process have ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}
