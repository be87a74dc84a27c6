//! One process: a container's first, or one that was executed in it.

use std::{
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::sync::watch;

use super::{Exit, TaskError};
use crate::stdio::{Stdio, Urls};

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// An exec that was announced but not started.
    Added,
    /// An exec that is being started.
    Starting,
    /// A container's first process, before `Start`.
    Created {
        /// Its number in the guest.
        pid: i32,
    },
    /// It runs its program.
    Running {
        /// Its number in the guest.
        pid: i32,
    },
    /// It has ended, or could not be started (pid 0).
    Stopped {
        /// Its number in the guest.
        pid: i32,
        /// How it ended.
        exit: Exit,
    },
}

/// One process.
pub struct Process {
    /// "container <id>", or "container <id>: exec <id>", for messages.
    pub subject: String,
    /// Empty for a container's first process.
    pub exec_id: String,
    /// Where its streams go.
    pub urls: Urls,
    state: Mutex<State>,
    stdio: Mutex<Option<Stdio>>,
    /// Columns and rows that were asked for before there was a terminal.
    early_size: Mutex<Option<(u16, u16)>>,
    /// Set when callers of `Wait` may be told.
    finished: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that does not run yet.
    pub fn new(container_id: &str, exec_id: &str, urls: Urls, state: State) -> Arc<Self> {
        let mut subject = format!("container {container_id}");
        if !exec_id.is_empty() {
            subject = format!("{subject}: exec {exec_id}");
        }
        Arc::new(Self {
            subject,
            exec_id: exec_id.to_owned(),
            urls,
            state: Mutex::new(state),
            stdio: Mutex::new(None),
            early_size: Mutex::new(None),
            finished: watch::channel(None).0,
        })
    }

    /// What it is doing now.
    pub fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state.
    pub fn set_state(&self, state: State) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Its number in the guest; 0 if it has none yet.
    pub fn pid(&self) -> i32 {
        match self.state() {
            State::Added | State::Starting => 0,
            State::Created { pid } | State::Running { pid } | State::Stopped { pid, .. } => pid,
        }
    }

    /// How it ended, once it has and its output has been taken.
    pub async fn wait(&self) -> Exit {
        let mut finished = self.finished.subscribe();
        let exit = finished.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        match exit {
            Some(exit) => exit,
            // Impossible: the sender is in `self`.
            None => std::future::pending().await,
        }
    }

    /// Lets callers of [`Self::wait`] go.
    pub fn finish(&self, exit: Exit) {
        self.finished.send_replace(Some(exit));
    }

    /// The agent's side of its streams.
    pub fn stdio(&self) -> MutexGuard<'_, Option<Stdio>> {
        self.stdio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes its streams over, when it has been made.
    pub fn set_stdio(&self, stdio: Stdio) {
        let size = self.early_size.lock().unwrap_or_else(PoisonError::into_inner).take();
        *self.stdio() = Some(stdio);
        if let Some((width, height)) = size
            && let Err(error) = self.resize(width, height)
        {
            tracing::warn!(process = self.subject, %error, "its terminal has the default size");
        }
    }

    /// Sets the size of its terminal, if it has one; before it runs, the size is kept for when it does.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), TaskError> {
        if let Some(stdio) = &*self.stdio() {
            return stdio.resize(width, height).map_err(|source| TaskError::System {
                subject: self.subject.clone(),
                what: "resize its terminal",
                source,
            });
        }
        *self.early_size.lock().unwrap_or_else(PoisonError::into_inner) = Some((width, height));
        Ok(())
    }

    /// Whom a signal is for. SIGKILL is what containerd sends a command at its time limit, which has then begun in vain:
    /// it ends with whatever it has started and not sent away. (It leads a session, and so a process group.)
    fn target(&self, pid: i32, number: u32) -> i32 {
        if number == libc::SIGKILL.cast_unsigned() && !self.exec_id.is_empty() { -pid } else { pid }
    }

    /// Sends a signal.
    pub fn signal(&self, number: u32) -> Result<(), TaskError> {
        let pid = match self.state() {
            State::Created { pid } | State::Running { pid } => pid,
            State::Stopped { .. } => return Err(TaskError::Finished(self.subject.clone())),
            State::Added | State::Starting => {
                return Err(TaskError::State {
                    subject: self.subject.clone(),
                    problem: "process not created",
                });
            }
        };
        match signal(self.target(pid, number), number) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(TaskError::Finished(self.subject.clone())),
            Err(errno) => Err(TaskError::Invalid {
                subject: self.subject.clone(),
                problem: format!("cannot send signal {number}: {}", errno.desc()),
            }),
        }
    }
}

/// Sends a signal to a process that has not been reaped, so that its number is still its own; a negative number stands
/// for a process group, as in kill(2).
pub fn signal(pid: i32, number: u32) -> nix::Result<()> {
    let number = i32::try_from(number).map_err(|_| Errno::EINVAL)?;
    match Signal::try_from(number) {
        Ok(signal) => kill(Pid::from_raw(pid), signal),
        // A real-time signal, which nix has no name for, or nonsense, which the kernel refuses.
        // SAFETY: kill(2) touches no memory of this process.
        Err(_) => Errno::result(unsafe { libc::kill(pid, number) }).map(drop),
    }
}

/// Receives the master of the console that libcontainer has sent by now (`SCM_RIGHTS`).
pub fn receive_console(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 16];
    recvmsg(
        socket,
        &mut [io::IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no console has been received"))
}
