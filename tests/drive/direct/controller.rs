//! The sandbox Controller, called as containerd calls it, for errors that no request over CRI can cause.

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

use super::netns::NetworkNamespace;
use crate::{HANG_LIMIT, api, cri, node::controller::pod_directories};

/// A connection to a controller.
pub type Client = ControllerClient<InterceptedService<Channel, NamespaceInterceptor>>;

/// Sends CRI's namespace with every call, as containerd does.
#[derive(Clone, Copy, Debug)]
pub struct NamespaceInterceptor;

impl Interceptor for NamespaceInterceptor {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static("k8s.io"));
        Ok(request)
    }
}

/// Connects to a controller's socket.
pub async fn connect(socket: &Path) -> Result<Client> {
    let socket = socket.to_str().context("a socket path in UTF-8")?;
    Ok(ControllerClient::with_interceptor(cri::connect(socket).await?, NamespaceInterceptor))
}

/// What containerd puts into `Create`: the pod's CRI configuration.
pub fn options(config: &api::PodSandboxConfig) -> prost_types::Any {
    prost_types::Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: config.encode_to_vec() }
}

/// The smallest CRI configuration of a pod that the controller accepts.
pub fn pod_config(name: &str) -> api::PodSandboxConfig {
    let metadata =
        api::PodSandboxMetadata { name: name.to_owned(), uid: name.to_owned(), ..Default::default() };
    api::PodSandboxConfig { metadata: Some(metadata), ..Default::default() }
}

/// A second controller on the node, with a configuration and a run directory of its own. Dropping it kills it.
pub struct Controller {
    child: Child,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// A connection to it.
    pub client: Client,
}

impl Controller {
    /// Starts a controller. `config` is appended to its configuration file.
    pub async fn serve(config: &str) -> Result<Self> {
        Self::start(Command::new("pericarp").arg("serve"), config).await
    }

    /// Starts a controller in a mount namespace of its own, which a shell command has changed before.
    pub async fn serve_where(change: &str, config: &str) -> Result<Self> {
        let script = format!("{change} && exec pericarp serve \"$@\"");
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "slave", "sh", "-c", &script, "sh"]);
        Self::start(&mut unshare, config).await
    }

    /// Starts a controller whose files are in an existing directory. Its path has to be short, because the paths of the
    /// sockets in it must fit a socket address.
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
        // Other tests keep the node busy at the same time.
        let ready_timeout =
            if config.contains("ready_timeout_seconds") { "" } else { "ready_timeout_seconds = 90\n" };
        fs::write(
            run_dir.join("config.toml"),
            format!("run_dir = '{}'\n{ready_timeout}{config}\n", run_dir.join("r").display()),
        )?;
        Self::start_in(command, run_dir).await
    }

    /// Kills the controller, and starts another in its place.
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
        bail!("pericarp serve does not accept connections: {}", fs::read_to_string(run_dir.join("log"))?)
    }

    /// `Create` and `Start`, as containerd calls them for one pod, and its clean-up if `Start` fails.
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

    /// Calls `Wait` for a pod in the background, as containerd does: the controller takes a pod without a caller of
    /// `Wait` for one that containerd has forgotten.
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

    /// The id of its process.
    pub fn pid(&self) -> Result<i32> {
        Ok(self.child.id().context("it has ended")?.cast_signed())
    }

    /// Names of the pods' directories in its run directory.
    pub fn pod_directories(&self) -> Result<Vec<String>> {
        pod_directories(&self.run_dir.join("r"))
    }

    /// Ends the controller as an init system would, and removes its directory.
    pub async fn stop(self) -> Result<()> {
        let directory = self.end().await?.0;
        match fs::remove_dir_all(&directory) {
            // A directory that is a mount point is removed with the mount.
            Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => {
                Err(error).context("remove its directory")
            }
            _ => Ok(()),
        }
    }

    /// Ends the controller as an init system would; its pods keep running.
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

/// The directory of a controller that has been ended, while its pods may still run.
pub struct StoppedController(PathBuf);

impl StoppedController {
    /// The controller's directory.
    pub fn run_dir(&self) -> &Path {
        &self.0
    }

    /// Starts another controller in its place, with a variable in its environment.
    pub async fn start_with_env(self, key: &str, value: &Path) -> Result<Controller> {
        Controller::start_in(Command::new("pericarp").arg("serve").env(key, value), self.0).await
    }
}
