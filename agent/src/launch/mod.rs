//! Creates processes: those of containers, and those that hold namespaces.
//!
//! libcontainer forks, which an asynchronous server must not do. So each process is created by a short-lived run of the
//! agent's own binary (the helper). It reads one [`Request`] from a socket, calls libcontainer, and replies with a pid
//! or an error. The new process is a child of the agent itself (`CLONE_PARENT`), so that the agent's [`Reaper`] sees
//! its exit.

mod cleanup;
mod executor;
pub mod helper;
mod home;
pub mod pause;
mod protocol;
mod reaper;
pub mod user_namespace;
mod working_directory;

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use rustix::io::FdFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::Instant,
};

use self::{cleanup::Progress, protocol::NO_PROCESS};
pub use self::{
    cleanup::describe_processes,
    protocol::{Action, Request, START_SOCKET},
    reaper::{Exit, Reaper},
};
use crate::{init::AGENT_PATH, stdio};

/// The error of a helper, which is sent to the agent as a text.
pub type BoxError = Box<dyn std::error::Error>;

/// The first argument of a helper. The numbers of its descriptors and the name of its launch follow.
pub const HELPER_ARGUMENT: &str = "container";

/// The first argument of a PID namespace's first process.
pub const PAUSE_ARGUMENT: &str = "pause";

/// The first argument of a process that only keeps the namespaces in which it was started.
pub const HOLD_ARGUMENT: &str = "hold";

/// The argument of a helper whose process has no console.
const NO_CONSOLE: &str = "-";

/// How long a launch may do nothing: longer than kubelet waits for any call. The limit turns a hanging file system into
/// an error. It is none for a launch that gets little of a busy guest's CPU and goes on: that may take minutes.
const IDLE_LIMIT: Duration = Duration::from_secs(180);

/// How much CPU time a launch may take; one that takes more will never end.
const CPU_LIMIT: Duration = Duration::from_secs(180);

/// How long a launch may take in all: a container can let the processes of its commands run a little now and then.
const TIME_LIMIT: Duration = Duration::from_secs(30 * 60);

/// How long the launch of a command in a container may take in all. Whoever asks for one, and gives it up after a
/// second, asks for another soon.
const EXEC_TIME_LIMIT: Duration = Duration::from_secs(5 * 60);

/// How often a launch that takes long is looked at.
const CHECK_INTERVAL: Duration = Duration::from_secs(30);

/// Why a process was not created.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The helper could not be started, or its socket has failed.
    #[error("cannot run the process that makes containers: {0}")]
    Helper(#[from] io::Error),
    /// The helper died.
    #[error("the process that makes containers ended with status {0}")]
    Died(u32),
    /// The helper has hung, or has used up its time. The text says where.
    #[error("no container process in time; {0}")]
    Timeout(String),
    /// libcontainer has refused or failed. The text is its own.
    #[error("{0}")]
    Container(String),
    /// The process was killed before there was one.
    #[error("it was killed before its program ran")]
    Killed,
    /// The helper's answer names a process that it cannot have created.
    #[error("the process that makes containers names a process that is not its own ({0})")]
    NotItsOwn(i32),
}

/// The descriptors of a process to be created.
pub struct Descriptors {
    /// Its stdin, stdout and stderr; unused with a console.
    pub stdio: [OwnedFd; 3],
    /// A socket on which the helper sends the master of the console.
    pub console: Option<OwnedFd>,
}

impl Descriptors {
    /// The descriptors of a process that neither reads nor writes anything.
    pub fn null() -> io::Result<Self> {
        Ok(Self { stdio: [stdio::null()?, stdio::null()?, stdio::null()?], console: None })
    }
}

/// Creates a process and returns its pid in the guest. When `killed` resolves, the launch is given up.
///
/// The caller must have subscribed to its exit ([`Reaper::subscribe`]), so that the exit is not missed.
pub async fn launch(
    reaper: &Reaper,
    request: &Request,
    descriptors: Descriptors,
    killed: impl Future<Output = ()>,
) -> Result<i32, LaunchError> {
    let name = new_name()?;
    let launched = launch_as(&name, reaper, request, descriptors, killed).await;
    if launched.is_err()
        && let Some(socket) = request.action.own_socket()
    {
        // The helper has removed it, unless it was killed.
        let _ = fs::remove_file(request.directory.join(socket));
    }
    launched
}

/// A name for a launch: no container can guess it, and count its own processes among those of another's launch. It
/// includes this agent's pid, because tests run several agents on one machine.
fn new_name() -> io::Result<String> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    let mut secret = [0; 8];
    rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())?;
    let (serial, secret) = (SERIAL.fetch_add(1, Ordering::Relaxed), u64::from_ne_bytes(secret));
    Ok(format!("launch-{}-{serial}-{secret:016x}", std::process::id()))
}

async fn launch_as(
    name: &str,
    reaper: &Reaper,
    request: &Request,
    descriptors: Descriptors,
    killed: impl Future<Output = ()>,
) -> Result<i32, LaunchError> {
    let (agent_end, helper_end) = std::os::unix::net::UnixStream::pair()?;
    let pid = spawn_helper(name, &helper_end.into(), descriptors)?;
    let mut exit = reaper.wait_for(pid);
    let message = serde_json::to_vec(request).map_err(io::Error::from)?;
    let limits = Limits::of(&request.action);
    let mut answer = std::pin::pin!(unless_it_hangs(name, limits, exchange(agent_end, &message)));
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        exit = &mut exit => match exit.map_or(u32::MAX, |exit| exit.status) {
            // The helper has replied. Only its exit was noticed first.
            0 => answer.await,
            status => {
                kill_launch(name).await;
                return Err(LaunchError::Died(status));
            }
        },
        () = killed => {
            kill_launch(name).await;
            return Err(LaunchError::Killed);
        }
    };
    if matches!(request.action, Action::PidNamespace { .. }) && !exit.is_terminated() {
        // What it has created becomes the agent's own child with its end.
        let _ = (&mut exit).await;
    }
    match answer {
        Ok(Ok(Ok(NO_PROCESS))) if matches!(request.action, Action::PodNamespaces(_)) => Ok(NO_PROCESS),
        Ok(Ok(Ok(created))) if reaper.may_be_new(created) => Ok(created),
        Ok(Ok(Ok(other))) => {
            kill_launch(name).await;
            Err(LaunchError::NotItsOwn(other))
        }
        Ok(Ok(Err(text))) => Err(LaunchError::Container(text)),
        Ok(Err(error)) => {
            kill_launch(name).await;
            // The helper's end of the socket is closed before the helper is reaped. Its exit status says more than
            // that. If the exit has been received above, the helper has exited with 0 and without a reply.
            if error.kind() == io::ErrorKind::UnexpectedEof && !exit.is_terminated() {
                return Err(LaunchError::Died(exit.await.map_or(u32::MAX, |exit| exit.status)));
            }
            Err(error.into())
        }
        Err(Hung) => {
            let hanging = kill_launch(name).await;
            tracing::error!(name, hanging, "no container process in time");
            Err(LaunchError::Timeout(hanging))
        }
    }
}

/// Kills every process of a launch and returns a description of what they were doing. Meanwhile the agent goes on.
async fn kill_launch(name: &str) -> String {
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || cleanup::kill_launch(&name)).await.unwrap_or_default()
}

async fn progress_of_launch(name: &str) -> Progress {
    let name = name.to_owned();
    tokio::task::spawn_blocking(move || Progress::of_launch(&name)).await.unwrap_or_default()
}

/// How long a launch may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Without doing anything.
    idle: Duration,
    /// Of CPU time.
    cpu: Duration,
    /// In all.
    total: Duration,
}

impl Limits {
    fn of(action: &Action) -> Self {
        let total = match action {
            Action::Exec { .. } => EXEC_TIME_LIMIT,
            Action::Create(_) | Action::PidNamespace { .. } | Action::PodNamespaces(_) => TIME_LIMIT,
        };
        Self { idle: IDLE_LIMIT, cpu: CPU_LIMIT, total }
    }
}

/// The launch has hung.
#[derive(Debug)]
struct Hung;

/// Waits for the answer of a launch's helper for as long as the launch goes on.
async fn unless_it_hangs<T>(name: &str, limits: Limits, answer: impl Future<Output = T>) -> Result<T, Hung> {
    let mut answer = std::pin::pin!(answer);
    let start = Instant::now();
    let (mut before, mut last_work) = (Progress::default(), start);
    loop {
        if let Ok(answer) = tokio::time::timeout(CHECK_INTERVAL, &mut answer).await {
            return Ok(answer);
        }
        let now = progress_of_launch(name).await;
        if now.goes_on_since(before) {
            (before, last_work) = (now, Instant::now());
        }
        if last_work.elapsed() >= limits.idle || now.cpu >= limits.cpu || start.elapsed() >= limits.total {
            return Err(Hung);
        }
    }
}

fn spawn_helper(name: &str, channel: &OwnedFd, descriptors: Descriptors) -> io::Result<i32> {
    let Descriptors { stdio: [stdin, stdout, stderr], console } = descriptors;
    // The agent starts processes from one thread only, so no other process can inherit these descriptors before they
    // are closed at the end of this function.
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

/// Sends a request and reads the reply.
async fn exchange(
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::timeout;

    use super::{cleanup::tests::LaunchProcess, *};

    /// Far more than any test takes.
    const NO_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);
    const NO_LIMITS: Limits = Limits { idle: NO_LIMIT, cpu: NO_LIMIT, total: NO_LIMIT };

    /// How long a launch is waited for that never ends.
    async fn given_up_after(name: &str, limits: Limits) -> Duration {
        let start = Instant::now();
        timeout(2 * NO_LIMIT, unless_it_hangs(name, limits, pending::<()>())).await.unwrap().unwrap_err();
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_launch_that_nobody_works_on_is_given_up() {
        let after = given_up_after("launch-of-nobody", Limits { idle: IDLE_LIMIT, ..NO_LIMITS }).await;
        assert!((IDLE_LIMIT..IDLE_LIMIT + 2 * CHECK_INTERVAL).contains(&after), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_launch_that_goes_on_is_waited_for_but_not_for_ever() {
        let busy = LaunchProcess::start("while :; do :; done");
        let limits = Limits { idle: IDLE_LIMIT, total: TIME_LIMIT, ..NO_LIMITS };
        let after = given_up_after(&busy.name, limits).await;
        assert!((TIME_LIMIT..TIME_LIMIT + 2 * CHECK_INTERVAL).contains(&after), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_launch_that_uses_up_its_cpu_time_is_given_up() {
        let busy = LaunchProcess::start("while :; do :; done");
        let after = given_up_after(&busy.name, Limits { cpu: Duration::from_millis(1), ..NO_LIMITS }).await;
        assert!(after < NO_LIMIT, "{after:?}");
    }

    #[test]
    fn a_command_has_less_time_than_a_container() {
        let exec = Limits::of(&Action::Exec { spec: Box::default(), serial: 0 });
        assert!(exec.total < Limits::of(&Action::Create(Box::default())).total);
    }

    #[test]
    fn no_two_launches_have_the_same_name() {
        assert_ne!(new_name().unwrap(), new_name().unwrap());
    }
}
