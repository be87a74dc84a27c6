//! One process: a container's first, or one that was executed in it.

use std::{
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::sync::watch;

use super::ContainerError;
use crate::{
    launch::Exit,
    stdio::{Stdio, Urls},
};

/// How long a process, its output and its execs usually take to end after SIGKILL at the very most.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// The life of a process.
///
/// ```text
/// first process:                         Created ── Running ── Stopped
///                                           └───────────────────┘
/// exec:           Added ── Starting ──────────────── Running ── Stopped
///                             └─────────────────────────────────┘
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// An exec that has been added and not started.
    Added,
    /// An exec that is being started.
    Starting,
    /// A container's first process, before `Start`.
    Created {
        /// Its pid in the guest.
        pid: i32,
    },
    /// The process executes its program.
    Running {
        /// Its pid in the guest.
        pid: i32,
    },
    /// The process has ended, or could not be started (pid 0).
    Stopped {
        /// Its pid in the guest.
        pid: i32,
        /// How it has ended.
        exit: Exit,
    },
}

/// One process of a container.
pub struct Process {
    /// `container <id>` or `container <id>: exec <id>`, for error messages.
    pub subject: String,
    /// Empty for a container's first process.
    pub exec_id: String,
    /// Where its streams go.
    pub urls: Urls,
    state: Mutex<ProcessState>,
    stdio: Mutex<Option<Stdio>>,
    /// The columns and rows that were set before there was a terminal.
    early_size: Mutex<Option<(u16, u16)>>,
    /// Set when the exit may be reported to callers of `Wait`.
    finished: watch::Sender<Option<Exit>>,
    /// Set when it has been killed while it was being started.
    killed: watch::Sender<bool>,
    /// Set when somebody waits for what SIGKILL does to it.
    kill_is_watched: AtomicBool,
}

impl Process {
    /// A process without streams.
    pub fn new(container_id: &str, exec_id: &str, urls: Urls, state: ProcessState) -> Arc<Self> {
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
            killed: watch::channel(false).0,
            kill_is_watched: AtomicBool::new(false),
        })
    }

    /// Its current state.
    pub fn state(&self) -> ProcessState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes its state.
    pub fn set_state(&self, state: ProcessState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Its pid in the guest; 0 if it has none yet.
    pub fn pid(&self) -> i32 {
        match self.state() {
            ProcessState::Added | ProcessState::Starting => 0,
            ProcessState::Created { pid }
            | ProcessState::Running { pid }
            | ProcessState::Stopped { pid, .. } => pid,
        }
    }

    /// Waits until it has ended and its exit has been published, and returns the exit.
    pub async fn wait(&self) -> Exit {
        let mut finished = self.finished.subscribe();
        let exit = finished.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        match exit {
            Some(exit) => exit,
            // Unreachable: the sender is in `self`.
            None => std::future::pending().await,
        }
    }

    /// Waits until SIGKILL has ended it. Returns true, once, if that takes longer than [`KILL_LIMIT`].
    pub async fn outlives_sigkill(&self) -> bool {
        if self.kill_is_watched.swap(true, Ordering::Relaxed) {
            return false;
        }
        tokio::time::timeout(KILL_LIMIT, self.wait()).await.is_err()
    }

    /// Gives up its start. If that is over, it is killed as soon as it runs.
    pub fn give_up_start(&self) {
        self.killed.send_replace(true);
    }

    /// Whether its start has been given up.
    pub fn is_start_given_up(&self) -> bool {
        *self.killed.borrow()
    }

    /// Resolves when its start has been given up.
    pub async fn start_given_up(&self) {
        // The sender is in `self`, so this does not end before.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Reports its exit to all callers of [`Self::wait`].
    pub fn finish(&self, exit: Exit) {
        self.finished.send_replace(Some(exit));
    }

    /// The agent's side of its streams.
    pub fn stdio(&self) -> MutexGuard<'_, Option<Stdio>> {
        self.stdio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets its streams when it has been created, and the size of its terminal.
    pub fn set_stdio(&self, stdio: Stdio) {
        let size = self.early_size.lock().unwrap_or_else(PoisonError::into_inner).take();
        *self.stdio() = Some(stdio);
        if let Some((width, height)) = size
            && let Err(error) = self.resize(width, height)
        {
            tracing::warn!(process = self.subject, %error, "a terminal keeps its default size");
        }
    }

    /// Sets the size of its terminal, in characters. Before it has been created, the size is kept until then. Does
    /// nothing if it has no terminal.
    pub fn resize(&self, width: u16, height: u16) -> Result<(), ContainerError> {
        if let Some(stdio) = &*self.stdio() {
            return stdio.resize(width, height).map_err(|source| ContainerError::System {
                subject: self.subject.clone(),
                what: "resize its terminal",
                source,
            });
        }
        *self.early_size.lock().unwrap_or_else(PoisonError::into_inner) = Some((width, height));
        Ok(())
    }

    /// The first argument of kill(2) for a signal. containerd sends SIGKILL to an exec whose time limit has passed.
    /// That also kills the processes that the exec has started, unless they have left its process group. (An exec leads
    /// a session, and so a process group.)
    fn signal_target(&self, pid: i32, number: u32) -> i32 {
        if number == libc::SIGKILL.cast_unsigned() && !self.exec_id.is_empty() { -pid } else { pid }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, number: u32) -> Result<(), ContainerError> {
        let pid = match self.state() {
            ProcessState::Created { pid } | ProcessState::Running { pid } => pid,
            ProcessState::Stopped { .. } => return Err(ContainerError::Finished(self.subject.clone())),
            ProcessState::Starting if number == libc::SIGKILL.cast_unsigned() => {
                self.give_up_start();
                return Ok(());
            }
            ProcessState::Added | ProcessState::Starting => {
                return Err(ContainerError::State {
                    subject: self.subject.clone(),
                    problem: "process not created",
                });
            }
        };
        match send_signal(self.signal_target(pid, number), number) {
            Ok(()) => Ok(()),
            Err(Errno::ESRCH) => Err(ContainerError::Finished(self.subject.clone())),
            Err(errno) => {
                Err(ContainerError::Signal { subject: self.subject.clone(), number, reason: errno.desc() })
            }
        }
    }
}

/// Sends a signal to a process that has not been reaped, so that no other process can have its pid. A negative pid
/// stands for a process group, as in kill(2).
pub fn send_signal(pid: i32, number: u32) -> nix::Result<()> {
    let number = i32::try_from(number).map_err(|_| Errno::EINVAL)?;
    match Signal::try_from(number) {
        Ok(signal) => kill(Pid::from_raw(pid), signal),
        // nix has no names for real-time signals. The kernel refuses other numbers.
        // SAFETY: kill(2) accesses no memory of this process.
        Err(_) => Errno::result(unsafe { libc::kill(pid, number) }).map(drop),
    }
}

/// Receives the master of the console (`SCM_RIGHTS`), which libcontainer has sent before the helper has replied.
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
