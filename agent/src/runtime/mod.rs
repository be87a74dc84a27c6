//! Makes container processes.
//!
//! libcontainer forks, and forks of an asynchronous server are no good, so each process is made by
//! a short-lived run of the agent's own binary (the helper). It reads one [`Request`] from a socket,
//! lets libcontainer do its work and answers with a pid or an error. The container's process is a
//! child of the agent itself (`CLONE_PARENT`), which therefore learns how it exits.

mod directory;
mod executor;
pub mod helper;
mod leftover;
pub mod namespaces;
pub mod pause;
mod protocol;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rustix::io::FdFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

pub use protocol::{Action, Request, START_SOCKET};

use crate::task::Exits;

/// Where the guest's boot puts the agent's binary.
pub const AGENT_PATH: &str = "/pericarp-agent";

type BoxError = Box<dyn std::error::Error>;

/// First argument of a helper; the numbers of its descriptors and the name of its work follow.
pub const HELPER_ARGUMENT: &str = "container";

/// First argument of a PID namespace's first process.
pub const PAUSE_ARGUMENT: &str = "pause";

/// The first argument of a process that only keeps the namespaces that it was started in.
pub const HOLD_ARGUMENT: &str = "hold";

/// Stands for "no console" in a helper's arguments.
const NO_CONSOLE: &str = "-";

/// How long a helper may take: longer than kubelet waits for any call. It is there so that a hanging file system ends in
/// an error; a process in a container with a small share of a busy guest's CPU may need minutes.
const LIMIT: Duration = Duration::from_secs(180);

/// Why a container process was not made.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The helper could not be started or spoken to.
    #[error("cannot run the process that makes containers: {0}")]
    Helper(#[from] io::Error),
    /// The helper died.
    #[error("the process that makes containers ended with status {0}")]
    Died(u32),
    /// The helper hung; the text says where.
    #[error("no container process after {limit} s; {0}", limit = LIMIT.as_secs())]
    Timeout(String),
    /// libcontainer refused or failed; the text is its own.
    #[error("{0}")]
    Container(String),
}

/// The descriptors of a process to be made.
pub struct Descriptors {
    /// stdin, stdout and stderr; with a console these are not used.
    pub stdio: [OwnedFd; 3],
    /// A socket over which the console's master comes back.
    pub console: Option<OwnedFd>,
}

/// Makes a process and answers with its pid in the guest.
///
/// The caller must hold what [`Exits::expect`] gives, so that no exit is missed.
pub async fn launch(exits: &Exits, request: &Request, descriptors: Descriptors) -> Result<i32, RuntimeError> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    // Of this agent: tests run several on one machine.
    let name = format!("launch-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let pid = spawn(&name, &theirs.into(), descriptors)?;
    let mut exit = exits.wait_for(pid);
    let request = serde_json::to_vec(request).map_err(io::Error::from)?;
    let mut answer = std::pin::pin!(tokio::time::timeout(LIMIT, converse(ours, &request)));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        exit = &mut exit => match exit.map_or(u32::MAX, |exit| exit.status) {
            // It has answered, and its exit was only noticed first.
            0 => answer.await,
            status => {
                leftover::end(&name);
                return Err(RuntimeError::Died(status));
            }
        },
    };
    match answer {
        Ok(Ok(answer)) => answer.map_err(RuntimeError::Container),
        Ok(Err(error)) => {
            leftover::end(&name);
            // Its end is seen here before it is reaped; how it ended says more than that it did. If it has been
            // awaited above, it ended well and said nothing.
            if error.kind() == io::ErrorKind::UnexpectedEof && !exit.is_terminated() {
                return Err(RuntimeError::Died(exit.await.map_or(u32::MAX, |exit| exit.status)));
            }
            Err(error.into())
        }
        Err(_) => {
            let hanging = leftover::end(&name);
            tracing::error!(name, hanging, "no container process in time");
            Err(RuntimeError::Timeout(hanging))
        }
    }
}

fn spawn(name: &str, channel: &OwnedFd, descriptors: Descriptors) -> io::Result<i32> {
    let Descriptors { stdio: [stdin, stdout, stderr], console } = descriptors;
    // The agent has one thread: nothing else can start a process, and so inherit these, before
    // they are closed at the end of this function.
    rustix::io::fcntl_setfd(channel, FdFlags::empty())?;
    let console_argument = match &console {
        Some(console) => {
            rustix::io::fcntl_setfd(console, FdFlags::empty())?;
            console.as_raw_fd().to_string()
        }
        None => NO_CONSOLE.to_owned(),
    };
    let program = if std::process::id() == 1 { AGENT_PATH } else { "/proc/self/exe" };
    let child = Command::new(program)
        .arg(HELPER_ARGUMENT)
        .arg(channel.as_raw_fd().to_string())
        .arg(console_argument)
        .arg(name)
        .env_clear()
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn()?;
    Ok(child.id().cast_signed())
}

async fn converse(
    channel: std::os::unix::net::UnixStream,
    request: &[u8],
) -> io::Result<Result<i32, String>> {
    channel.set_nonblocking(true)?;
    let mut channel = UnixStream::from_std(channel)?;
    channel.write_all(&protocol::length(request.len())?).await?;
    channel.write_all(request).await?;
    let mut length = [0; protocol::LENGTH];
    channel.read_exact(&mut length).await?;
    let mut answer = vec![0; protocol::checked_length(length)?];
    channel.read_exact(&mut answer).await?;
    Ok(serde_json::from_slice(&answer)?)
}
