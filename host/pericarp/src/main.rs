//! The `pericarp` command.

mod check;
mod shim;

use std::{
    env, fs,
    net::TcpListener,
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Mutex,
};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use pericarp_controller::config::Config;
use pericarp_vmm::{ExitReason, InheritedDescriptors, MachineConfig, PortForward, VsockSockets};

/// One KVM microVM around every Kubernetes pod.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the controller: serve containerd's sandboxes on this node.
    Serve {
        /// The configuration file (TOML). Without it, the defaults hold if there is none in its usual place.
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Run one machine until it ends. The controller starts this; by hand it is for looking into a
    /// machine on its own.
    Vmm {
        /// The machine's description (JSON).
        #[arg(long)]
        config: PathBuf,
        #[command(flatten)]
        control: ControlSocket,
        #[command(flatten)]
        descriptors: DescriptorSocket,
        #[command(flatten)]
        vsock: VsockArguments,
        /// An inherited descriptor: the user namespace that the machine enters. Without it, its capabilities are those
        /// on the host.
        #[arg(long)]
        user_namespace_fd: Option<RawFd>,
    },
    /// Say whether this node can run Pericarp, and what to do where it cannot. Exits with 1 if anything
    /// has failed.
    Check(check::Arguments),
}

/// Where the machine serves its control service.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct ControlSocket {
    /// An inherited descriptor: a unix socket that is listening already.
    #[arg(long)]
    control_fd: Option<RawFd>,
    /// A path to make the socket at.
    #[arg(long)]
    control_socket: Option<PathBuf>,
}

impl ControlSocket {
    fn listener(self) -> anyhow::Result<UnixListener> {
        listener(self.control_fd, self.control_socket, "the control socket")
    }
}

/// Where the machine takes the files of disks that are inserted while it runs.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct DescriptorSocket {
    /// An inherited descriptor: a unix socket (`SOCK_SEQPACKET`) that is listening already.
    #[arg(long)]
    descriptors_fd: Option<RawFd>,
    /// A path to make that socket at.
    #[arg(long)]
    descriptors_socket: Option<PathBuf>,
}

impl DescriptorSocket {
    fn listener(self) -> anyhow::Result<OwnedFd> {
        match (self.descriptors_fd, self.descriptors_socket) {
            (Some(fd), _) => inherited(fd, "the descriptors' socket"),
            (None, Some(path)) => pericarp_protos::descriptors::listen_at(&path)
                .with_context(|| format!("cannot listen on {}", path.display())),
            (None, None) => bail!("either --descriptors-fd or --descriptors-socket is needed"),
        }
    }
}

/// What the guest's vsock device is connected with.
#[derive(Args)]
struct VsockArguments {
    /// An inherited descriptor: a unix socket that is listening already, for programs that connect to the guest.
    #[arg(long, required_unless_present = "vsock_socket")]
    vsock_fd: Option<RawFd>,
    /// A path to make that socket at.
    #[arg(long, conflicts_with = "vsock_fd")]
    vsock_socket: Option<PathBuf>,
    /// An inherited descriptor: a connected unix socket, to which the guest's one connection to the host leads. Without
    /// it, there is no such connection.
    #[arg(long)]
    host_fd: Option<RawFd>,
    /// A path of a socket to connect to instead.
    #[arg(long, conflicts_with = "host_fd")]
    host_socket: Option<PathBuf>,
    /// An inherited descriptor: a TCP socket that is listening already, for connections to all ports of the pod's
    /// localhost. Without it, there are none.
    #[arg(long, requires = "steering_fd")]
    forward_fd: Option<RawFd>,
    /// An inherited descriptor to be kept open for as long as connections are to come: the BPF link that leads them to
    /// that socket.
    #[arg(long, requires = "forward_fd")]
    steering_fd: Option<RawFd>,
}

impl VsockArguments {
    fn sockets(self) -> anyhow::Result<VsockSockets> {
        let listener = listener(self.vsock_fd, self.vsock_socket, "the vsock socket")?;
        let host = match (self.host_fd, self.host_socket) {
            (Some(fd), _) => Some(inherited(fd, "the guest's connection to the host")?.into()),
            (None, Some(path)) => {
                let stream = UnixStream::connect(&path);
                Some(stream.with_context(|| format!("cannot connect to {}", path.display()))?)
            }
            (None, None) => None,
        };
        let forward = match self.forward_fd.zip(self.steering_fd) {
            Some((listener, steering)) => Some(PortForward {
                listener: TcpListener::from(inherited(listener, "the socket of forwarded connections")?),
                steering: inherited(steering, "a BPF link")?,
            }),
            None => None,
        };
        Ok(VsockSockets { listener, host, forward })
    }
}

/// A unix socket that listens: an inherited one, or one that is made at a path. The arguments have one of them.
fn listener(fd: Option<RawFd>, path: Option<PathBuf>, what: &str) -> anyhow::Result<UnixListener> {
    match (fd, path) {
        (Some(fd), _) => Ok(inherited(fd, what)?.into()),
        (None, Some(path)) => {
            UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))
        }
        (None, None) => bail!("neither a descriptor nor a path is given for {what}"),
    }
}

/// Takes a descriptor that the caller has handed to this process.
fn inherited(fd: RawFd, what: &str) -> anyhow::Result<OwnedFd> {
    if fd <= 2 {
        bail!("descriptor {fd} cannot be {what}; pass one above 2");
    }
    // SAFETY: the caller passes this descriptor for us to own; nothing else in this process, which has only just
    // started, uses descriptors above 2.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The controller waits far more than it works: two threads serve any number of pods.
const CONTROLLER_THREADS: usize = 2;

/// Where the configuration usually is.
const CONFIG: &str = "/etc/pericarp/config.toml";

fn main() -> ExitCode {
    let process_start_ns = pericarp_vmm::monotonic_ns();
    match run(process_start_ns) {
        Ok(status) => status,
        Err(error) => {
            // One line: the controller quotes a machine's last words.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(process_start_ns: u64) -> anyhow::Result<ExitCode> {
    let mut arguments = env::args_os();
    if shim::is_called(arguments.next().as_deref()) {
        shim::run(arguments, Path::new(CONFIG))?;
        return Ok(ExitCode::SUCCESS);
    }
    match Arguments::parse().command {
        Command::Serve { config } => serve(config.as_deref())?,
        Command::Vmm { config, control, descriptors, vsock, user_namespace_fd } => {
            vmm(
                &config,
                || {
                    Ok(InheritedDescriptors {
                        control: control.listener()?,
                        descriptors: descriptors.listener()?,
                        vsock: vsock.sockets()?,
                        user_namespace: user_namespace_fd
                            .map(|fd| inherited(fd, "the machine's user namespace"))
                            .transpose()?,
                    })
                },
                process_start_ns,
            )?;
        }
        Command::Check(arguments) => {
            let good = check::run(&arguments, Path::new(CONFIG)).context("cannot print what was found")?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(path: Option<&Path>) -> anyhow::Result<()> {
    let config = Config::load(path.unwrap_or(Path::new(CONFIG)), path.is_none())?;
    log_to_stderr(&config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROLLER_THREADS)
        .enable_all()
        .build()
        .context("cannot start the controller's threads")?;
    runtime.block_on(pericarp_controller::serve(config))?;
    // What still runs in the background ends with the process; pods go on.
    runtime.shutdown_background();
    Ok(())
}

fn vmm(
    config: &Path,
    open: impl FnOnce() -> anyhow::Result<InheritedDescriptors>,
    process_start_ns: u64,
) -> anyhow::Result<()> {
    let log = pericarp_vmm::Log::to_stderr().context("cannot write the machine's log")?;
    log_to("info", Mutex::new(log));
    // When the host runs out of memory the controller is spared (its unit file says so), but not the machine.
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "0") {
        tracing::warn!(%error, "the machine keeps the controller's OOM score");
    }
    let text = fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
    let config: MachineConfig = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a machine's description", config.display()))?;
    let reason = pericarp_vmm::run(&config, open()?, process_start_ns)?;
    match reason {
        ExitReason::GuestReset | ExitReason::Shutdown => {
            tracing::info!(%reason, "{}", pericarp_vmm::LAST_WORDS);
        }
        ExitReason::TripleFault(_) | ExitReason::Kvm(_) => bail!("{reason}"),
    }
    // Threads of the machine may still run; they end with the process.
    std::process::exit(0);
}

/// `default` is a filter such as "info"; the environment's `PERICARP_LOG` wins.
fn log_to_stderr(default: &str) {
    log_to(default, std::io::stderr);
}

fn log_to(
    default: &str,
    writer: impl for<'w> tracing_subscriber::fmt::MakeWriter<'w> + Send + Sync + 'static,
) {
    use tracing_subscriber::{EnvFilter, fmt};
    let filter = EnvFilter::try_from_env("PERICARP_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(false)
        // It would say that it cannot write by writing to the same disk, and panic when that fails.
        .log_internal_errors(false)
        .init();
}
