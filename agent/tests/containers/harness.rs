//! The agent as containerd and the controller see it.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{api, shim_async::TaskClient};
use pericarp_protos::{
    agent::{AgentClient, ConfigureRequest, Event, EventsRequest, TaskEvent, event},
    host::{
        Boot, FitResourcesRequest, FitResourcesResponse, Host, MemoryVolume, PrepareContainerRequest,
        PrepareContainerResponse, ReadyRequest, ReadyResponse, ReleaseContainerRequest,
        ReleaseContainerResponse, create_boot, create_host,
    },
    protobuf::{MessageField, well_known_types::any::Any},
    ttrpc::{
        self, Code,
        r#async::{Client, Server, TtrpcContext, transport},
        context,
    },
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::client_stream::Stream;

/// No call of a test takes longer.
pub const LIMIT: Duration = Duration::from_secs(300);

/// The agent to be tested: the one of the guest's image, where the tests run on a node.
fn agent() -> PathBuf {
    std::env::var_os("PERICARP_AGENT").map_or(env!("CARGO_BIN_EXE_pericarp-agent").into(), PathBuf::from)
}

fn busybox() -> Option<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.exists())
}

/// A running agent.
pub struct Agent {
    process: Child,
    directory: tempfile::TempDir,
    pub host: Arc<FakeHost>,
    _servers: [Server; 2],
    pub task: TaskClient,
    pub own: AgentClient,
}

/// The controller's side.
#[derive(Default)]
pub struct FakeHost {
    pub specs: Mutex<HashMap<String, Value>>,
    /// What every container is told of the pod's volumes in memory.
    pub memory_volumes: Mutex<Vec<MemoryVolume>>,
    pub released: Mutex<Vec<String>>,
    /// While a test holds it, no container is prepared.
    pub prepare: tokio::sync::Mutex<()>,
    /// Told when the agent has asked for a container.
    pub asked: tokio::sync::Notify,
    /// While a test holds it, no container is released.
    pub release: tokio::sync::Mutex<()>,
    ready: Mutex<Option<mpsc::Sender<()>>>,
}

#[async_trait]
impl Boot for FakeHost {
    async fn ready(&self, _: &TtrpcContext, request: ReadyRequest) -> ttrpc::Result<ReadyResponse> {
        assert!(!request.kernel_release.is_empty());
        let ready = self.ready.lock().unwrap().take();
        ready.expect("Ready is called once").send(()).await.unwrap();
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
        self.asked.notify_one();
        let _allowed = self.prepare.lock().await;
        let specs = self.specs.lock().unwrap();
        let Some(spec) = specs.get(&request.container_id) else {
            let message = format!("no container {} in this pod", request.container_id);
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, message)));
        };
        let mut response = PrepareContainerResponse::new();
        response.spec = serde_json::to_vec(spec).unwrap();
        assert!(request.makes_memory_volumes);
        response.memory_volumes.clone_from(&self.memory_volumes.lock().unwrap());
        Ok(response)
    }

    async fn release_container(
        &self,
        _: &TtrpcContext,
        request: ReleaseContainerRequest,
    ) -> ttrpc::Result<ReleaseContainerResponse> {
        let _allowed = self.release.lock().await;
        self.released.lock().unwrap().push(request.container_id);
        Ok(ReleaseContainerResponse::new())
    }

    async fn fit_resources(
        &self,
        _: &TtrpcContext,
        _: FitResourcesRequest,
    ) -> ttrpc::Result<FitResourcesResponse> {
        Ok(FitResourcesResponse::new())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let cgroup = PathBuf::from(format!("/sys/fs/cgroup/pod-{}", self.process.id()));
        let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        let containers = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        for directory in containers.map(|entry| entry.path()).filter(|path| path.is_dir()).chain([cgroup]) {
            // What was killed a moment ago may not be quite gone.
            let removed = (0..100).any(|_| {
                std::thread::sleep(Duration::from_millis(10));
                fs::remove_dir(&directory).is_ok()
            });
            assert!(removed || std::thread::panicking(), "{} is busy", directory.display());
        }
    }
}

impl Agent {
    /// Starts an agent and configures the pod.
    pub async fn start() -> Self {
        let agent = Self::start_unconfigured().await;
        agent.own.configure(context(), &ConfigureRequest::new()).await.unwrap();
        agent
    }

    /// Starts an agent and waits until it is ready.
    pub async fn start_unconfigured() -> Self {
        let directory = tempfile::tempdir().unwrap();
        make_rootfs(&directory.path().join("rootfs"));
        let (sender, mut ready) = mpsc::channel(1);
        let host = Arc::new(FakeHost { ready: Mutex::new(Some(sender)), ..FakeHost::default() });
        let host_socket = directory.path().join("host.sock");
        let mut server = Server::new()
            .bind(&format!("unix://{}", host_socket.display()))
            .unwrap()
            .register_service(create_boot(Arc::clone(&host) as Arc<_>));
        server.start().await.unwrap();
        let agent_socket = directory.path().join("agent.sock");
        let requests_socket = directory.path().join("requests.sock");
        let process = Command::new("unshare")
            .args(["-m", "-n", "-u", "-i", "sh", "-c", SET_UP])
            .args([&agent(), &agent_socket, &host_socket, &requests_socket])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        tokio::time::timeout(LIMIT, ready.recv()).await.expect("the agent says that it is ready");
        let connection = tokio::net::UnixStream::connect(&requests_socket).await;
        let mut requests = Server::new()
            .add_listener(transport::Listener::new(futures::stream::iter([connection])))
            .register_service(create_host(Arc::clone(&host) as Arc<_>));
        requests.start().await.unwrap();
        let client = Client::connect(&format!("unix://{}", agent_socket.display())).await.unwrap();
        Self {
            process,
            directory,
            host,
            _servers: [server, requests],
            task: TaskClient::new(client.clone()),
            own: AgentClient::new(client),
        }
    }

    /// Whether this machine's cgroups have the file. What cannot be tested here is said.
    pub fn cgroup_has(&self, container: &str, file: &str) -> bool {
        let has = fs::exists(format!("/sys/fs/cgroup/pod-{}/{container}/{file}", self.pid())).unwrap();
        // RDMA's are those of devices that hardly a machine has.
        if !has && !file.starts_with("rdma.") {
            let _ = writeln!(std::io::stderr(), "\nskipped: this machine's cgroups have no {file}");
        }
        has
    }

    /// The agent's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a container known to the controller.
    pub fn add_container(&self, id: &str, command: &[&str]) -> Spec<'_> {
        self.host.specs.lock().unwrap().insert(id.to_owned(), self.spec(id, command));
        Spec { host: &self.host, id: id.to_owned() }
    }

    /// What containerd's CRI plugin makes of a plain container, translated by the controller.
    fn spec(&self, id: &str, command: &[&str]) -> Value {
        let capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID"];
        json!({
            "ociVersion": "1.2.0",
            "process": process(command),
            "root": { "path": self.path().join("rootfs") },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "bind", "source": "/run/pericarp/shm",
                  "options": ["rbind", "rprivate", "rw"] },
                { "destination": "/etc/resolv.conf", "type": "bind", "source": "/run/pericarp/etc/resolv.conf",
                  "options": ["rbind", "rprivate", "ro"] },
            ],
            "linux": {
                "cgroupsPath": format!("/pod-{}/{id}", self.process.id()),
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "cgroup" }],
                "maskedPaths": ["/proc/kcore", "/proc/keys"],
                "readonlyPaths": ["/proc/sys"],
                "resources": { "cpu": { "shares": 2 } },
                // As small as a filter can be: it forbids to change the host's name.
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW",
                    "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [{ "names": ["sethostname", "not_a_syscall_at_all"], "action": "SCMP_ACT_ERRNO" }],
                },
            },
            "annotations": { "capabilities": capabilities.join(",") },
        })
    }

    pub fn create_request(id: &str, streams: &[&str]) -> api::CreateTaskRequest {
        let mut request = api::CreateTaskRequest::new();
        request.id = id.to_owned();
        request.bundle = format!("/host/{id}");
        for name in streams {
            let url = format!("ttrpc+hvsock:///host/vsock.sock:1024?streaming_id={id}-{name}");
            match *name {
                "stdin" => request.stdin = url,
                "stdout" => request.stdout = url,
                _ => request.stderr = url,
            }
        }
        request
    }

    pub async fn create(&self, id: &str, streams: &[&str]) -> u32 {
        self.task.create(context(), &Self::create_request(id, streams)).await.unwrap().pid
    }

    pub async fn start_task(&self, id: &str) {
        let mut request = api::StartRequest::new();
        request.id = id.to_owned();
        self.task.start(context(), &request).await.unwrap();
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let mut request = api::WaitRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.task.wait(context(), &request).await.unwrap().exit_status
    }

    pub async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let mut request = api::KillRequest::new();
        request.id = id.to_owned();
        request.signal = signal;
        self.task.kill(context(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<api::DeleteResponse> {
        let mut request = api::DeleteRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.task.delete(context(), &request).await
    }

    pub async fn state(&self, id: &str) -> ttrpc::Result<api::StateResponse> {
        let mut request = api::StateRequest::new();
        request.id = id.to_owned();
        self.task.state(context(), &request).await
    }

    /// Announces and starts an exec.
    pub async fn exec(&self, id: &str, exec_id: &str, process: Value, streams: &[&str]) -> ttrpc::Result<()> {
        self.add_exec(id, exec_id, process, streams).await?;
        self.start_exec(id, exec_id).await
    }

    /// Announces an exec.
    pub async fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        process: Value,
        streams: &[&str],
    ) -> ttrpc::Result<()> {
        let urls = Self::create_request(exec_id, streams);
        let mut spec = Any::new();
        spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".into();
        spec.value = serde_json::to_vec(&process).unwrap();
        let mut request = api::ExecProcessRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        request.terminal = process["terminal"] == true;
        request.stdin = urls.stdin;
        request.stdout = urls.stdout;
        request.stderr = urls.stderr;
        request.spec = MessageField::some(spec);
        self.task.exec(context(), &request).await.map(drop)
    }

    /// Starts an exec that was announced.
    pub async fn start_exec(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let mut request = api::StartRequest::new();
        request.id = id.to_owned();
        request.exec_id = exec_id.to_owned();
        self.task.start(context(), &request).await.map(drop)
    }

    /// Opens a stream as containerd does, over a connection of its own.
    pub async fn stream(&self, id: &str) -> Stream {
        Stream::open(&self.path().join("agent.sock"), id).await
    }

    /// The task events up to the first one with this topic.
    pub async fn task_events(&self, last: &str) -> Vec<TaskEvent> {
        let mut stream = self.own.events(context(), &EventsRequest::new()).await.unwrap();
        let mut events = Vec::new();
        loop {
            let event = tokio::time::timeout(LIMIT, stream.recv()).await.expect("an event").unwrap();
            let Some(event::Event::Task(task)) = event.expect("no end of events").event else { continue };
            let is_last = task.topic == last;
            events.push(task);
            if is_last {
                return events;
            }
        }
    }

    /// The topics of the events so far, with the decoded container ids left out.
    pub async fn events(&self, count: usize) -> Vec<Event> {
        let mut stream = self.own.events(context(), &EventsRequest::new()).await.unwrap();
        let mut events = Vec::new();
        while events.len() < count {
            let event = tokio::time::timeout(LIMIT, stream.recv()).await.expect("an event");
            events.push(event.unwrap().expect("no end of events"));
        }
        events
    }
}

/// An error's code and text.
pub fn status(error: &ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message.clone()),
        other => panic!("not a status: {other}"),
    }
}

pub fn topic(event: &Event) -> &str {
    match &event.event {
        Some(event::Event::Task(task)) => &task.topic,
        Some(event::Event::Timing(_)) => "timing",
        _ => "",
    }
}

/// A spec that can still be changed.
pub struct Spec<'a> {
    host: &'a FakeHost,
    id: String,
}

impl Spec<'_> {
    pub fn change(self, change: impl FnOnce(&mut Value)) -> Self {
        change(self.host.specs.lock().unwrap().get_mut(&self.id).unwrap());
        self
    }
}

/// An OCI process.
pub fn process(command: &[&str]) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_SYS_ADMIN"];
    json!({
        "args": command,
        "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GREETING=hello"],
        "user": { "uid": 0, "gid": 0, "additionalGids": [0] },
        "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        "apparmorProfile": "cri-containerd.apparmor.d",
        "oomScoreAdj": 1000,
    })
}

pub fn context() -> context::Context {
    context::with_duration(LIMIT)
}

/// `$0` is the agent; the arguments are its. What a guest's boot provides, in namespaces of its own.
const SET_UP: &str = "mount -t tmpfs tmpfs /run && mount -t cgroup2 cgroup2 /sys/fs/cgroup && \
                      mkdir -p /sys/fs/cgroup/pod-$$/agent && \
                      echo $$ > /sys/fs/cgroup/pod-$$/agent/cgroup.procs && \
                      for controller in $(cat /sys/fs/cgroup/cgroup.subtree_control); do \
                          echo +$controller > /sys/fs/cgroup/pod-$$/cgroup.subtree_control; \
                      done && \
                      exec \"$0\" serve-on-sockets \"$@\"";

fn make_rootfs(root: &Path) {
    for directory in ["bin", "dev", "proc", "etc", "tmp", "sys"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy(busybox().unwrap(), root.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "cat", "echo", "sleep", "hostname", "id", "kill", "ls", "true", "false", "head", "yes",
        "md5sum", "seq", "tr", "env", "stty", "readlink", "dd", "wc", "grep", "ps", "stat",
    ] {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/resolv.conf"), "").unwrap();
    fs::write(root.join("etc/not-a-program"), "").unwrap();
}
