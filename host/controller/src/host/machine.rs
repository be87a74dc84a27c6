//! A machine's process as the controller sees it: spawned, watched through a pidfd, asked over its
//! control socket.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{
            fs::{OpenOptionsExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use pericarp_jail::{JailedChild, JailedCommand};
use pericarp_protos::{
    descriptors,
    ttrpc::{self, asynchronous::Client, context},
    vmm::{
        InsertDiskRequest, InsertDiskResponse, MachineClient, RemoveDiskRequest, ResizeRequest,
        ResizeResponse, StatusRequest, StatusResponse, WaitMemoryRequest,
    },
};
use pericarp_vmm::{FILTER_EXIT_STATUS, InheritedDescriptors, MachineConfig, PortForward, VsockSockets};
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::fault::requested_attack;

/// Names of a pod's files in its directory.
pub mod file {
    pub const CONFIG: &str = "machine.json";
    pub const CONTROL: &str = "vmm.sock";
    pub const DESCRIPTORS: &str = "descriptors.sock";
    pub const VSOCK: &str = "vsock.sock";
    pub const CONSOLE: &str = "console.log";
    pub const LOG: &str = "vmm.log";
    pub const VOLUMES: &str = "volumes.json";
    /// A directory with mounts, in which older versions have their machines' shares.
    pub const OLDER_SHARE: &str = "share";
    pub const STATE: &str = "state.json";
    pub const PROGRESS: &str = "progress.json";
}

/// The environment variable that decides what a machine logs.
const LOG_FILTER: &str = "PERICARP_LOG";

/// Limit of every call to a machine's control socket.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a machine is asked to remove a disk that is not closed yet.
const REMOVE_TRIES: u32 = 5;

/// How a machine's process ended, as far as that can be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exit {
    /// It exited by itself, with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It was no child of this controller, so nobody told.
    Unknown,
}

impl Exit {
    /// Whether one of the machine's own filters of system calls has ended it, as far as this tells.
    pub fn is_by_filter(self) -> bool {
        matches!(self, Exit::Code(FILTER_EXIT_STATUS) | Exit::Signal(libc::SIGSYS))
    }

    /// As a shell would report it; what `Controller.Wait` answers.
    pub fn status(self) -> u32 {
        match self {
            Exit::Code(code) => code.unsigned_abs(),
            Exit::Signal(signal) => 128 + signal.unsigned_abs(),
            Exit::Unknown => 255,
        }
    }
}

/// A machine's process. Dropping this changes nothing: machines outlive the controller.
pub struct Machine {
    pid: Pid,
    pidfd: AsyncFd<OwnedFd>,
}

/// Binds a socket of a pod, for the controller's user alone.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Binds the socket through which a machine is given descriptors, for the controller's user alone.
pub fn bind_descriptors(path: &Path) -> io::Result<OwnedFd> {
    let listener = descriptors::listen_at(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

impl Machine {
    /// Starts `pericarp vmm` in the pod's directory. It alone has what it inherits from then on. `cgroup` is the
    /// directory of the cgroup that it belongs to. After an error there is no process. Blocks for as long as the kernel
    /// takes to start one.
    pub fn spawn(
        directory: &Path,
        config: &MachineConfig,
        inherited: InheritedDescriptors,
        cgroup: Option<File>,
    ) -> io::Result<Machine> {
        let path = directory.join(file::CONFIG);
        fs::write(&path, serde_json::to_vec_pretty(config)?)?;
        // The machine reads it when it is full, to keep the newest half.
        let log = directory.join(file::LOG);
        let log = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(log)?;
        let mut command = JailedCommand::new("/proc/self/exe", "pericarp", log)?;
        command.argument("vmm")?.argument("--config")?.argument(&path)?;
        if let Some(filter) = std::env::var_os(LOG_FILTER) {
            command.variable(LOG_FILTER, filter)?;
        }
        if let Some((name, attack)) = requested_attack() {
            command.variable(name, attack)?;
        }
        let InheritedDescriptors {
            control,
            descriptors,
            vsock: VsockSockets { listener, host, forward },
            user_namespace,
        } = inherited;
        command
            .hand_down("--control-fd", control)?
            .hand_down("--descriptors-fd", descriptors)?
            .hand_down("--vsock-fd", listener)?;
        if let Some(user_namespace) = user_namespace {
            command.hand_down("--user-namespace-fd", user_namespace)?;
        }
        if let Some(host) = host {
            command.hand_down("--host-fd", host)?;
        }
        if let Some(PortForward { listener, steering }) = forward {
            command.hand_down("--forward-fd", listener)?.hand_down("--steering-fd", steering)?;
        }
        if let Some(cgroup) = cgroup {
            command.cgroup(cgroup.into());
        }
        Machine::attend(Unattended(Some(command.spawn()?)), Unattended::share)
    }

    /// Takes care of a machine that was just started, `share` being how its pid and a descriptor of it are had.
    fn attend(
        mut child: Unattended,
        share: impl FnOnce(&Unattended) -> io::Result<(Pid, OwnedFd)>,
    ) -> io::Result<Machine> {
        let (pid, pidfd) = share(&child)?;
        let machine = Machine::new(pid, pidfd)?;
        // From here it is watched and ended by whoever has the machine.
        child.0 = None;
        Ok(machine)
    }

    /// A machine that an earlier controller has started.
    pub fn adopt(pid: Pid, pidfd: OwnedFd) -> io::Result<Machine> {
        Machine::new(pid, pidfd)
    }

    fn new(pid: Pid, pidfd: OwnedFd) -> io::Result<Machine> {
        // SAFETY: an owned descriptor stands for the same open file until it is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Machine { pid, pidfd })
    }

    /// The process id, for messages and for containerd.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Kills the process without waiting for its end.
    pub fn signal_kill(&self) -> io::Result<()> {
        signal_kill(self.pidfd.get_ref())
    }

    /// Waits for the end of the process and takes its exit status.
    pub async fn exited(&self) -> io::Result<Exit> {
        // Readable means ended, and stays so.
        let _ = self.pidfd.readable().await?;
        reap(self.pidfd.get_ref())
    }
}

/// A machine's process that nobody could end or wait for yet. It is ended with this.
struct Unattended(Option<JailedChild>);

impl Unattended {
    /// Its pid, and another descriptor of it, which does not block.
    fn share(&self) -> io::Result<(Pid, OwnedFd)> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let child = self.0.as_ref().ok_or_else(gone)?;
        let pidfd = child.pidfd.try_clone()?;
        fcntl_setfl(&pidfd, fcntl_getfl(&pidfd)? | OFlags::NONBLOCK)?;
        Ok((Pid::from_raw(child.pid).ok_or_else(gone)?, pidfd))
    }
}

impl Drop for Unattended {
    fn drop(&mut self) {
        let Some(child) = &self.0 else { return };
        if let Err(error) = kill(&child.pidfd).and_then(|()| reap(&child.pidfd)) {
            tracing::error!(pid = child.pid, %error, "cannot end a machine that nobody attends to");
        }
    }
}

fn reap(pidfd: &OwnedFd) -> io::Result<Exit> {
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => Ok(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Unknown,
        }),
        // Not ours, or already taken.
        Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(Exit::Unknown),
        Err(errno) => Err(errno.into()),
    }
}

/// Sends SIGKILL, unless the process has ended already.
fn signal_kill(pidfd: &OwnedFd) -> io::Result<()> {
    match pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Kills a machine and waits until it is gone. Blocks for the milliseconds that the kernel needs to free a
/// guest's memory.
pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    /// Far more than any machine takes to die; reached only if the host's kernel is stuck.
    const LIMIT: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    signal_kill(pidfd)?;
    let mut poll = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut poll, Some(&LIMIT)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "the machine does not end")),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// A machine's control socket, at which it may or may not listen.
#[derive(Clone, Debug)]
pub struct MachineControl {
    socket: PathBuf,
}

impl MachineControl {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Connects to the machine. It serves each connection by threads of its own, so that none is kept.
    async fn connect(&self) -> ttrpc::Result<MachineClient> {
        let address = format!("unix://{}", self.socket.display());
        let client = tokio::time::timeout(CONTROL_TIMEOUT, Client::connect(&address))
            .await
            .map_err(|_| ttrpc::Error::Others("the machine's control socket does not answer".into()))??;
        Ok(MachineClient::new(client))
    }

    /// Its boot times and numbers.
    pub async fn status(&self) -> ttrpc::Result<StatusResponse> {
        self.connect().await?.status(context::with_duration(CONTROL_TIMEOUT), &StatusRequest::default()).await
    }

    /// Puts the files that were given to it under a ticket into it as one disk, one after the other.
    pub async fn insert_disk(
        &self,
        ticket: u64,
        read_only: bool,
        serial: String,
    ) -> ttrpc::Result<InsertDiskResponse> {
        let request = InsertDiskRequest { ticket, read_only, serial, ..InsertDiskRequest::default() };
        self.connect().await?.insert_disk(context::with_duration(CONTROL_TIMEOUT), &request).await
    }

    /// Takes a disk out of it, if it is there.
    pub async fn remove_disk(&self, device: u32) -> ttrpc::Result<()> {
        let request = RemoveDiskRequest { device, ..RemoveDiskRequest::default() };
        let client = self.connect().await?;
        let mut tries = 0;
        loop {
            tries += 1;
            match client.remove_disk(context::with_duration(CONTROL_TIMEOUT), &request).await {
                Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {
                    return Ok(());
                }
                // The machine has waited for its files to be closed before it answered so.
                Err(ttrpc::Error::RpcStatus(status))
                    if status.code() == ttrpc::Code::UNAVAILABLE && tries < REMOVE_TRIES => {}
                other => return other.map(drop),
            }
        }
    }

    /// Asks for another size; the guest has to do its part.
    pub async fn resize(&self, vcpus: u8, memory_bytes: u64) -> ttrpc::Result<ResizeResponse> {
        let request = ResizeRequest { vcpus: u32::from(vcpus), memory_bytes, ..ResizeRequest::default() };
        self.connect().await?.resize(context::with_duration(CONTROL_TIMEOUT), &request).await
    }

    /// Waits until the guest's memory is as it was asked for.
    pub async fn wait_memory(&self, limit: Duration) -> ttrpc::Result<()> {
        let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let request = WaitMemoryRequest { limit_ms, ..WaitMemoryRequest::default() };
        self.connect()
            .await?
            .wait_memory(context::with_duration(limit + CONTROL_TIMEOUT), &request)
            .await
            .map(drop)
    }
}

/// The last lines of a pod's log file, at most `limit` bytes, as text.
pub fn tail(path: &Path, limit: u64) -> String {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    // A guest wrote this: nothing in it may move a terminal's cursor or split a log.
    String::from_utf8_lossy(&bytes)
        .chars()
        .map(|character| if character == '\n' || !character.is_control() { character } else { ' ' })
        .collect::<String>()
        .trim()
        .to_owned()
}

/// What a guest has printed last: its kernel's panic if there is one, without the trace that follows it.
pub fn last_printed(console: &Path) -> String {
    const PANIC: &str = "Kernel panic - not syncing";
    /// More than a kernel's trace.
    const LOOKED_AT: u64 = 16 << 10;
    const QUOTED: usize = 600;
    let text = tail(console, LOOKED_AT);
    // The first: one panic may lead to another.
    match text.lines().find(|line| line.contains(PANIC)) {
        Some(line) => line.chars().take(QUOTED).collect(),
        None => text.chars().skip(text.chars().count().saturating_sub(QUOTED)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_quoted_without_what_follows_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = "[ 1.0]  ? some_function+0x1/0x2\n".repeat(200);
        fs::write(file.path(), format!("boot\n[ 1.0] Kernel panic - not syncing: no init\n{trace}")).unwrap();
        assert_eq!(last_printed(file.path()), "[ 1.0] Kernel panic - not syncing: no init");
        fs::write(file.path(), "ä".repeat(1000)).unwrap();
        assert_eq!(last_printed(file.path()), "ä".repeat(600));
        assert_eq!(last_printed(Path::new("/no/such/console")), "");
    }

    #[test]
    fn the_tail_of_a_log_is_bounded_and_has_no_control_characters() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "first\nsecond \x1b[2J\nlast\n").unwrap();
        assert_eq!(tail(file.path(), 1000), "first\nsecond  [2J\nlast");
        assert_eq!(tail(file.path(), 5), "last");
        assert_eq!(tail(Path::new("/no/such/log"), 5), "");
    }

    #[test]
    fn the_end_by_a_filter_is_told_from_others_with_and_without_its_handler() {
        assert!(Exit::Code(FILTER_EXIT_STATUS).is_by_filter() && Exit::Signal(libc::SIGSYS).is_by_filter());
        let others = [Exit::Code(0), Exit::Code(1), Exit::Signal(9), Exit::Signal(6), Exit::Unknown];
        assert!(!others.into_iter().any(Exit::is_by_filter));
    }

    #[test]
    fn exit_statuses_are_a_shells() {
        assert_eq!((Exit::Code(3).status(), Exit::Signal(9).status()), (3, 137));
    }

    /// A process, as a machine is before anybody attends to it, and its directory in /proc.
    fn unattended() -> (Unattended, PathBuf) {
        let mut command = JailedCommand::new("/bin/sleep", "sleep", tempfile::tempfile().unwrap()).unwrap();
        command.argument("60").unwrap();
        let child = command.spawn().unwrap();
        let process = PathBuf::from(format!("/proc/{}", child.pid));
        assert!(process.exists());
        (Unattended(Some(child)), process)
    }

    #[tokio::test]
    async fn a_machine_of_which_no_descriptor_can_be_had_is_ended() {
        let (child, process) = unattended();
        let error = Machine::attend(child, |_| Err(rustix::io::Errno::MFILE.into())).err().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
        assert!(!process.exists(), "neither it nor its exit status is left");
    }

    #[tokio::test]
    async fn a_machine_that_is_watched_outlives_who_started_it() {
        let (child, process) = unattended();
        let machine = Machine::attend(child, Unattended::share).unwrap();
        let to_end_it = machine.pidfd.get_ref().try_clone().unwrap();
        drop(machine);
        assert!(process.exists());
        kill(&to_end_it).unwrap();
        reap(&to_end_it).unwrap();
    }

    #[tokio::test]
    async fn a_killed_process_is_reported_with_its_signal() {
        let machine = Machine::attend(unattended().0, Unattended::share).unwrap();
        kill(machine.pidfd.get_ref()).unwrap();
        assert_eq!(machine.exited().await.unwrap(), Exit::Signal(9));
    }
}
