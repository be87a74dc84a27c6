//! The sandbox Controller, called directly as containerd calls it: for errors that CRI cannot bring about.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use pericarp_protos::sandbox::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStartResponse,
    ControllerWaitRequest, controller_client::ControllerClient,
};
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    time::timeout,
};
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use crate::{HANG_LIMIT, api, cri, machine, until};

/// The socket of the node's own controller.
pub const NODE_CONTROLLER: &str = "/run/pericarp/controller.sock";

/// A connection to a controller.
pub type Client = ControllerClient<InterceptedService<Channel, InNamespace>>;

/// The run directory of the node's own controller.
pub const NODE_RUN_DIR: &str = "/run/pericarp";

/// Names of the pods' directories in a run directory, which are all gone when no pod is left.
pub fn pod_directories(run_dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(run_dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

/// Sends CRI's namespace with every call, as containerd does.
#[derive(Clone, Copy, Debug)]
pub struct InNamespace;

impl Interceptor for InNamespace {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static("k8s.io"));
        Ok(request)
    }
}

/// Connects to a controller's socket.
pub async fn connect(socket: &Path) -> Result<Client> {
    let socket = socket.to_str().context("a socket path in UTF-8")?;
    Ok(ControllerClient::with_interceptor(cri::connect(socket).await?, InNamespace))
}

/// What containerd puts into `Create`: the pod's CRI configuration.
pub fn options(config: &api::PodSandboxConfig) -> prost_types::Any {
    prost_types::Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: config.encode_to_vec() }
}

/// The least that containerd says of a pod.
pub fn pod_config(name: &str) -> api::PodSandboxConfig {
    let metadata =
        api::PodSandboxMetadata { name: name.to_owned(), uid: name.to_owned(), ..Default::default() };
    api::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
}

/// A second controller on the node, with a configuration and a run directory of its own.
pub struct Controller {
    child: Child,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// A connection to it.
    pub client: Client,
}

impl Controller {
    /// Starts one. `config` is added to its configuration file.
    pub async fn serve(config: &str) -> Result<Self> {
        Self::start(Command::new("pericarp").arg("serve"), config).await
    }

    /// Starts one in a mount namespace of its own, after a shell command has changed that.
    pub async fn serve_where(change: &str, config: &str) -> Result<Self> {
        let script = format!("{change} && exec pericarp serve \"$@\"");
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "slave", "sh", "-c", &script, "sh"]);
        Self::start(&mut unshare, config).await
    }

    /// Starts one whose files are in a directory that is there already. Its path has to be short:
    /// the sockets' paths in it must fit a socket address.
    pub async fn serve_at(directory: PathBuf, config: &str) -> Result<Self> {
        Self::start_at(Command::new("pericarp").arg("serve"), directory, config).await
    }

    async fn start(command: &mut Command, config: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let run_dir = PathBuf::from(format!("/run/{}.{number}", std::process::id()));
        fs::create_dir_all(&run_dir)?;
        Self::start_at(command, run_dir, config).await
    }

    async fn start_at(command: &mut Command, run_dir: PathBuf, config: &str) -> Result<Self> {
        // Other tests keep the node busy meanwhile.
        let patient =
            if config.contains("ready_timeout_seconds") { "" } else { "ready_timeout_seconds = 90\n" };
        fs::write(
            run_dir.join("config.toml"),
            format!("run_dir = '{}'\n{patient}{config}\n", run_dir.join("r").display()),
        )?;
        Self::start_in(command, run_dir).await
    }

    /// Kills it, and starts one that takes its place.
    pub async fn replace(mut self) -> Result<Self> {
        self.child.kill().await.context("kill pericarp serve")?;
        Self::start_in(Command::new("pericarp").arg("serve"), self.run_dir.clone()).await
    }

    async fn start_in(command: &mut Command, run_dir: PathBuf) -> Result<Self> {
        let log = fs::File::options().create(true).append(true).open(run_dir.join("log"))?;
        let mut child = command
            .arg("--config")
            .arg(run_dir.join("config.toml"))
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .context("start pericarp serve")?;
        let socket = run_dir.join("r/controller.sock");
        for _ in 0..2000 {
            if let Ok(client) = connect(&socket).await {
                let controller = Self { child, run_dir, client };
                for id in controller.pod_directories()? {
                    controller.wait_for(&id);
                }
                return Ok(controller);
            }
            if let Some(status) = child.try_wait()? {
                bail!("pericarp serve ended, {status}: {}", fs::read_to_string(run_dir.join("log"))?);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("pericarp serve does not answer: {}", fs::read_to_string(run_dir.join("log"))?)
    }

    /// `Create` and `Start`, as containerd calls them for one pod.
    pub async fn start_pod(
        &mut self,
        id: &str,
        config: &api::PodSandboxConfig,
        netns: &NetworkNamespace,
    ) -> Result<ControllerStartResponse, Status> {
        let request = ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            options: Some(options(config)),
            netns_path: netns.path(),
            sandboxer: "pericarp".to_owned(),
            ..Default::default()
        };
        self.client.create(request).await?;
        let request = ControllerStartRequest { sandbox_id: id.to_owned(), sandboxer: "pericarp".to_owned() };
        let started = self.client.start(request).await;
        if started.is_err() {
            // containerd's own clean-up after a failed start.
            match self.shut_down_pod(id).await {
                Err(error) if error.code() != tonic::Code::NotFound => return Err(error),
                _ => {}
            }
        }
        self.wait_for(id);
        Ok(started?.into_inner())
    }

    /// `Wait` for a pod in the background, as containerd does: a pod that nobody waits for has been forgotten.
    fn wait_for(&self, id: &str) {
        let request = ControllerWaitRequest { sandbox_id: id.to_owned(), ..Default::default() };
        let mut client = self.client.clone();
        tokio::spawn(async move { client.wait(request).await });
    }

    /// `Shutdown` of one pod.
    pub async fn shut_down_pod(&mut self, id: &str) -> Result<(), Status> {
        let request =
            ControllerShutdownRequest { sandbox_id: id.to_owned(), sandboxer: "pericarp".to_owned() };
        self.client.shutdown(request).await.map(drop)
    }

    /// Its process id.
    pub fn pid(&self) -> Result<i32> {
        Ok(self.child.id().context("it has ended")?.cast_signed())
    }

    /// Names of the pods' directories, which are all gone when no pod is left.
    pub fn pod_directories(&self) -> Result<Vec<String>> {
        pod_directories(&self.run_dir.join("r"))
    }

    /// Ends it as an init system would, and removes its directory.
    pub async fn stop(self) -> Result<()> {
        let directory = self.end().await?.0;
        match fs::remove_dir_all(&directory) {
            // A mount point's goes with the mount.
            Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => {
                Err(error).context("remove its directory")
            }
            _ => Ok(()),
        }
    }

    /// Ends it as an init system would; its pods go on.
    pub async fn end(mut self) -> Result<StoppedController> {
        let pid =
            self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).context("it ended before")?;
        kill_process(pid, Signal::TERM)?;
        let status =
            timeout(HANG_LIMIT, self.child.wait()).await.context("pericarp serve does not end on TERM")??;
        if !status.success() {
            bail!("pericarp serve ended with {status}: {}", fs::read_to_string(self.run_dir.join("log"))?);
        }
        Ok(StoppedController(self.run_dir))
    }
}

/// A controller's directory, with its pods, while it is not running.
pub struct StoppedController(PathBuf);

impl StoppedController {
    /// Its directory.
    pub fn run_dir(&self) -> &Path {
        &self.0
    }

    /// Starts another in its place, with a variable in its environment.
    pub async fn start_with_env(self, key: &str, value: &Path) -> Result<Controller> {
        Controller::start_in(Command::new("pericarp").arg("serve").env(key, value), self.0).await
    }
}

/// The file through which a controller is told where to die (`host/controller/src/fault.rs`).
const FAULT_FILE: &str = "PERICARP_FAULT_FILE";

/// The node's own controller, which will be killed when it comes to a named point.
pub struct Condemned {
    file: PathBuf,
    process: Option<machine::Process>,
}

impl Condemned {
    /// Waits until it is dead. An error if it has not come to that point by then.
    pub async fn dead(mut self) -> Result<NodeController> {
        let Self { file, process } = &mut self;
        let process = process.take().context("it was waited for before")?;
        process.ended().await.with_context(|| format!("it never came to {:?}", fs::read_to_string(file)))?;
        Ok(NodeController(()))
    }

    /// Whether it is dead by now; if not, it will not be killed any more.
    pub async fn dead_by_now(self) -> Result<Option<NodeController>> {
        match fs::remove_file(&self.file) {
            Ok(()) => Ok(None),
            // It has taken the request and is being killed.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.dead().await.map(Some),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Condemned {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

/// The node's own controller while it is dead.
pub struct NodeController(());

impl NodeController {
    /// Kills it. It is started again at the latest when the answer is dropped.
    pub fn kill() -> Result<Self> {
        let pid = Pid::from_raw(machine::controller_pid()?).context("the controller's pid")?;
        kill_process(pid, Signal::KILL)?;
        Ok(Self(()))
    }

    /// It is dead already.
    pub fn down() -> Self {
        Self(())
    }

    /// Has it killed when it comes to a point of its code.
    pub fn kill_at(point: &str) -> Result<Condemned> {
        let file =
            std::env::var_os(FAULT_FILE).context("the node's controller is not told of fault points")?;
        let process = Some(machine::Process::of(machine::controller_pid()?)?);
        fs::write(&file, point)?;
        Ok(Condemned { file: file.into(), process })
    }

    /// Starts it again and waits until it serves.
    pub async fn restart(self) -> Result<()> {
        let socket = Path::new(NODE_CONTROLLER);
        std::mem::drop(self);
        until("the node's controller to answer", async || Ok(connect(socket).await.map(|_| true)?)).await
    }
}

impl Drop for NodeController {
    fn drop(&mut self) {
        let log = fs::File::options().create(true).append(true).open("/results/pericarp.log");
        let log = log.map_or_else(|_| Stdio::null(), Stdio::from);
        // It outlives the tests, as the one before would have.
        let started =
            std::process::Command::new("pericarp").arg("serve").stdout(Stdio::null()).stderr(log).spawn();
        if let Err(error) = started {
            println!("the node's controller cannot be started again: {error}");
        }
    }
}

/// A network namespace like the one that containerd makes for a pod.
pub struct NetworkNamespace(String);

impl NetworkNamespace {
    /// Makes one.
    pub async fn new(name: &str) -> Result<Self> {
        ip(&["netns", "add", name]).await?;
        Ok(Self(name.to_owned()))
    }

    /// Where it is mounted.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// Runs shell commands in it.
    pub async fn run(&self, commands: &str) -> Result<String> {
        let netns = format!("--net={}", self.path());
        let output = Command::new("nsenter").args([&netns, "sh", "-ec", commands]).output().await?;
        if !output.status.success() {
            bail!("{commands:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Removes it.
    pub async fn remove(self) -> Result<()> {
        ip(&["netns", "delete", &self.0]).await
    }
}

async fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().await.context("run ip")?;
    if !output.status.success() {
        bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
