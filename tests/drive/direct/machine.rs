//! A machine without containerd and without a controller: `pericarp vmm` itself, with the test in the controller's
//! place. It serves tests of what the controller has no reason to do with every pod.

use std::{
    collections::HashMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use async_trait::async_trait;
use containerd_shim_protos::{api, shim_async::TaskClient};
use pericarp_protos::{
    agent::{AgentClient, ConfigureRequest},
    guest::{AGENT_PORT, HOST_PORT, REQUESTS_PORT, SHARE_DIR, SHARE_TAG},
    host::{
        Boot, Disk, Host, PrepareContainerRequest, PrepareContainerResponse, ReadyRequest, ReadyResponse,
        ReleaseContainerRequest, ReleaseContainerResponse, create_boot, create_host,
    },
    ttrpc::{
        self, Code,
        r#async::{
            Client, Server, TtrpcContext,
            transport::{Listener, Socket},
        },
        context,
    },
    vmm::MachineClient,
};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};

use crate::HANG_LIMIT;

/// A running machine, configured and without containers.
pub struct DirectMachine {
    process: Child,
    directory: tempfile::TempDir,
    host: Arc<FakeHost>,
    _servers: [Server; 2],
    /// The time from the start of its process until its agent was ready.
    pub boot: Duration,
    /// The machine's control service, which the controller would call.
    pub control: MachineClient,
    /// The agent's service, which the controller would call.
    pub agent: AgentClient,
    task: TaskClient,
}

/// The services that the guest calls on the controller.
#[derive(Default)]
struct FakeHost {
    prepared: Mutex<HashMap<String, PrepareContainerResponse>>,
    released: Mutex<Vec<String>>,
    ready: Mutex<Option<mpsc::Sender<()>>>,
}

#[async_trait]
impl Boot for FakeHost {
    async fn ready(&self, _: &TtrpcContext, _: ReadyRequest) -> ttrpc::Result<ReadyResponse> {
        if let Some(ready) = self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            // This fails only if nobody waits any more.
            let _ = ready.try_send(());
        }
        Ok(ReadyResponse::new())
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn prepare_container(
        &self,
        _: &TtrpcContext,
        request: PrepareContainerRequest,
    ) -> ttrpc::Result<PrepareContainerResponse> {
        let prepared = self.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        prepared
            .get(&request.container_id)
            .cloned()
            .ok_or_else(|| ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, "no such container")))
    }

    async fn release_container(
        &self,
        _: &TtrpcContext,
        request: ReleaseContainerRequest,
    ) -> ttrpc::Result<ReleaseContainerResponse> {
        self.released.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(request.container_id);
        Ok(ReleaseContainerResponse::new())
    }
}

impl DirectMachine {
    /// Starts a machine and configures its guest. `change` holds the configuration's keys that are not as in
    /// [`configuration`].
    pub async fn start(change: Value) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path();
        make_rootfs(&path.join("share/rootfs"))?;
        fs::create_dir(path.join("share/out"))?;
        let (sender, mut ready) = mpsc::channel(1);
        let host = Arc::new(FakeHost { ready: Mutex::new(Some(sender)), ..FakeHost::default() });
        let socket = path.join("host.sock");
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))?
            .register_service(create_boot(Arc::clone(&host) as Arc<_>));
        server.start().await?;
        fs::write(path.join("machine.json"), configuration(path, &change)?.to_string())?;
        let began = Instant::now();
        let process = Command::new("pericarp")
            .arg("vmm")
            .arg("--config")
            .arg(path.join("machine.json"))
            .arg("--control-socket")
            .arg(path.join("vmm.sock"))
            .arg("--descriptors-socket")
            .arg(path.join("descriptors.sock"))
            .arg("--vsock-socket")
            .arg(path.join("vsock.sock"))
            .arg("--host-socket")
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()?;
        let ready = timeout(HANG_LIMIT, ready.recv()).await;
        let console = || fs::read_to_string(path.join("console.log")).unwrap_or_default();
        ready.with_context(|| format!("the guest is not ready: {}", console()))?;
        let boot = began.elapsed();
        let control = MachineClient::new(
            Client::connect(&format!("unix://{}", path.join("vmm.sock").display())).await?,
        );
        let client = Client::new(Socket::new(connect(&path.join("vsock.sock"), AGENT_PORT)?));
        let (agent, task) = (AgentClient::new(client.clone()), TaskClient::new(client));
        let connection = connect(&path.join("vsock.sock"), REQUESTS_PORT)?;
        let mut requests = Server::new()
            .add_listener(Listener::new(futures::stream::iter([Ok(connection)])))
            .register_service(create_host(Arc::clone(&host) as Arc<_>));
        requests.start().await?;
        agent.configure(call_context(), &ConfigureRequest::new()).await?;
        Ok(Self { process, directory, host, _servers: [server, requests], boot, control, agent, task })
    }

    /// The path on the node of a file that containers write to `/out`.
    pub fn out(&self, name: &str) -> PathBuf {
        self.directory.path().join("share/out").join(name)
    }

    /// Makes a directory below the share; returns its path in the guest.
    pub fn share_directory(&self, name: &str) -> Result<String> {
        fs::create_dir_all(self.directory.path().join("share").join(name))?;
        Ok(format!("{SHARE_DIR}/{name}"))
    }

    /// A path on the node for the file of a disk.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs shell commands in a container, which must succeed; returns what they wrote to `/out/<id>`.
    pub async fn shell(&self, id: &str, commands: &str) -> Result<String> {
        self.run_container(id, commands, Vec::new(), |_| {}).await?;
        Ok(fs::read_to_string(self.out(id)).unwrap_or_default().trim().to_owned())
    }

    /// Runs shell commands in a container with disks; they must succeed. `change` changes the container's spec.
    pub async fn run_container(
        &self,
        id: &str,
        commands: &str,
        disks: Vec<Disk>,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        self.start_container(id, commands, disks, change).await?;
        let status = self.wait_container(id).await?;
        self.delete_container(id).await?;
        ensure!(status == 0, "{id} has exited with {status}");
        Ok(())
    }

    /// Starts a container that runs shell commands, with disks. `change` changes its spec.
    pub async fn start_container(
        &self,
        id: &str,
        commands: &str,
        disks: Vec<Disk>,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let mut spec = spec(id, commands);
        change(&mut spec);
        let mut prepared = PrepareContainerResponse::new();
        prepared.spec = serde_json::to_vec(&spec)?;
        prepared.disks = disks;
        self.host
            .prepared
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .insert(id.to_owned(), prepared);
        let mut request = api::CreateTaskRequest::new();
        request.id = id.to_owned();
        self.task.create(call_context(), &request).await?;
        let mut request = api::StartRequest::new();
        request.id = id.to_owned();
        self.task.start(call_context(), &request).await?;
        Ok(())
    }

    /// Waits until a container has exited; returns its exit status.
    pub async fn wait_container(&self, id: &str) -> Result<u32> {
        let mut request = api::WaitRequest::new();
        request.id = id.to_owned();
        Ok(self.task.wait(call_context(), &request).await?.exit_status)
    }

    /// Kills a container.
    pub async fn kill_container(&self, id: &str) -> Result<()> {
        let mut request = api::KillRequest::new();
        request.id = id.to_owned();
        request.signal = 9;
        self.task.kill(call_context(), &request).await?;
        Ok(())
    }

    /// Deletes a container that has exited, and checks that the agent has released it on the host.
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let mut request = api::DeleteRequest::new();
        request.id = id.to_owned();
        self.task.delete(call_context(), &request).await?;
        let released = self.host.released.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        ensure!(released.last().is_some_and(|last| last == id), "{id} was not released");
        Ok(())
    }

    /// The messages of the guest's kernel and of the agent.
    pub fn console(&self) -> String {
        fs::read_to_string(self.directory.path().join("console.log")).unwrap_or_default()
    }
}

impl Drop for DirectMachine {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The context of one ttrpc call, with a time limit.
pub fn call_context() -> context::Context {
    context::with_duration(HANG_LIMIT)
}

/// The machine's configuration file, with `change` added.
fn configuration(path: &Path, change: &Value) -> Result<Value> {
    let mut config = json!({
        "id": "direct",
        "kernel": "/usr/lib/pericarp/vmlinux",
        "initramfs": "/usr/lib/pericarp/initramfs.cpio",
        "vcpus": 1,
        "memory_mib": 256,
        "console": { "path": path.join("console.log"), "limit_bytes": 1 << 20 },
        "vsock": { "host_port": HOST_PORT },
        "share": { "tag": SHARE_TAG, "directory": path.join("share") },
    });
    let config_object = config.as_object_mut().context("an object")?;
    for (key, value) in change.as_object().context("an object")? {
        config_object.insert(key.clone(), value.clone());
    }
    Ok(config)
}

/// Connects to a port of the agent as containerd does.
fn connect(socket: &Path, port: u32) -> Result<tokio::net::UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = String::new();
    // The agent sends nothing before it is called, so nothing is lost in the reader's buffer.
    BufReader::new(&stream).read_line(&mut answer)?;
    ensure!(answer.starts_with("OK "), "the agent's port answers {answer:?}");
    stream.set_nonblocking(true)?;
    Ok(tokio::net::UnixStream::from_std(stream)?)
}

/// The OCI spec of a container that runs shell commands and writes what they print to `/out/<id>`.
fn spec(id: &str, commands: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["/bin/sh", "-ec", format!("exec > /out/{id} 2>&1\n{commands}")],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
            "capabilities": {
                "bounding": ["CAP_DAC_OVERRIDE"],
                "effective": ["CAP_DAC_OVERRIDE"],
                "permitted": ["CAP_DAC_OVERRIDE"],
            },
        },
        "root": { "path": format!("{SHARE_DIR}/rootfs") },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            { "destination": "/out", "type": "bind", "source": format!("{SHARE_DIR}/out"), "options": ["rbind", "rw"] },
        ],
        "linux": {
            "cgroupsPath": format!("/pod/{id}"),
            "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }],
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
        },
    })
}

/// A root file system with busybox.
pub fn make_rootfs(root: &Path) -> Result<()> {
    for directory in ["bin", "dev", "proc", "out"] {
        fs::create_dir_all(root.join(directory))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("copy the node's busybox")?;
    for applet in ["sh", "cat", "echo", "sleep", "ls", "dd", "nproc", "awk", "mkdir", "rm", "stat", "grep"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}
