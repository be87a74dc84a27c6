//! A pod: its machine, its directory, its containers' file systems.
//!
//! [`boot`] starts it, [`requests`] takes the guest's requests, [`containers`] serves them, [`teardown`] ends it, [`record`] is what is
//! on disk about it, [`adopt`] goes on with it from there, [`health`] finds out that it is stuck.

mod adopt;
mod boot;
mod configuration;
mod containers;
mod disks;
mod guest_errors;
mod health;
mod log_limit;
mod network;
mod progress;
mod record;
mod refusals;
mod requests;
mod resize;
mod teardown;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use pericarp_protos::{
    cri,
    id::{ContainerId, SandboxId},
    vmm::StatusResponse,
};
use prost::{DecodeError, Message as _};
use serde_json::json;
use thiserror::Error;
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};

pub use self::{adopt::adopt_all, boot::BootError, record::end_on_record};
use self::{log_limit::LogLimit, progress::Progress, record::Identity, refusals::Refusal};
use crate::{
    config::Config,
    cpuset::CpuSet,
    cri_fields,
    events::Forwarder,
    machine::{self, Exit, file},
    nested,
    network::InterfaceStatus,
    share::Share,
    size::{self, Host, Limits, Size},
    source::ContainerSource,
    timeline::{ContainerTimeline, Marks, PodTimeline},
    undo::Undo,
    user_namespace::{IdMap, UserNamespace, UserNamespaceError},
};

/// What a pod is made from, in CRI.
pub const POD_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// What all pods share.
pub struct Node {
    pub config: Config,
    pub source: Arc<dyn ContainerSource>,
    pub forwarder: Forwarder,
    pub host: Host,
}

/// Where a pod is in its life. It only ever goes forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// containerd has told of it.
    Created,
    /// The machine is being started.
    Starting,
    /// The agent serves.
    Running { pid: u32 },
    /// The machine has ended, by itself or by `Stop`.
    Ended,
}

/// The end of a pod's machine.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    pub exit: Exit,
    pub at: SystemTime,
}

/// Why a request about a pod fails. Each names the pod.
#[derive(Debug, Error)]
pub enum PodError {
    #[error("pod sandbox {id:?}: its PodSandboxConfig cannot be read")]
    Unreadable {
        id: String,
        #[source]
        source: DecodeError,
    },
    #[error("{pod}: {what} cannot be given to a pod in a machine of its own: {remedy}")]
    Refused { pod: String, what: String, remedy: &'static str },
    #[error("{pod}")]
    Size {
        pod: String,
        #[source]
        source: size::Error,
    },
    #[error("{pod}")]
    Nested {
        pod: String,
        #[source]
        source: nested::Error,
    },
    #[error("{pod} cannot be started: it is {phase:?}")]
    Phase { pod: String, phase: Phase },
    #[error("{pod} cannot be started")]
    Boot {
        pod: String,
        #[source]
        source: BootError,
    },
    #[error("{pod} cannot be taken down")]
    Teardown {
        pod: String,
        #[source]
        source: std::io::Error,
    },
}

/// A pod and everything that belongs to it.
pub struct Pod {
    /// For messages.
    pub id: String,
    /// The same, for paths and names.
    sandbox: SandboxId,
    /// containerd's namespace, usually `k8s.io`.
    pub namespace: String,
    pub config: cri::PodSandboxConfig,
    pub netns: String,
    /// Of its user namespace, if it has one.
    id_map: Option<IdMap>,
    pub size: Size,
    pub created_at: SystemTime,
    directory: PathBuf,
    node: Arc<Node>,
    /// Start, stop and shutdown, one at a time.
    lifecycle: AsyncMutex<()>,
    /// What the guest sees of the host; changed by one at a time.
    share: AsyncMutex<Share>,
    state: Mutex<State>,
    ended: watch::Sender<Option<Ended>>,
    /// Whether containerd waits, or has waited, for its end.
    claimed: watch::Sender<bool>,
    /// Of what the guest causes.
    log_limit: LogLimit,
    /// Told when the machine is to end, before anything is undone that may take its time.
    stopping: Notify,
}

/// What changes in a pod's life. Never locked across a wait.
struct State {
    phase: Phase,
    /// Takes down what runs: machine, mounts, cgroup, sockets.
    running: Undo,
    /// The machine's cgroup, once there is one.
    cgroup: Option<PathBuf>,
    /// What the guest has of the pod's network.
    interfaces: Vec<InterfaceStatus>,
    /// Whether port-forward works or why it does not, once that is known.
    port_forward: Option<String>,
    /// Removes the directory.
    directory: Undo,
    /// Whether somebody waits for the end of the machine: see [`Pod::watch`].
    watched: bool,
    marks: Marks,
    timeline: Option<PodTimeline>,
    containers: HashMap<ContainerId, ContainerTimeline>,
    /// What each prepared container may use.
    limits: HashMap<ContainerId, Limits>,
    /// The machine's size now, as far as this controller has set it.
    size_now: Option<Size>,
    /// The host's CPUs and memory nodes that the machine is kept on, as far as this controller has set them.
    pinned: Option<(CpuSet, CpuSet)>,
    /// What has been taken of the agent's events.
    progress: Progress,
    guest_kernel: String,
    /// Why the machine ended, where it was not asked to.
    reason: Option<String>,
}

impl Pod {
    /// Checks what is asked for and takes note of it; nothing is made yet.
    pub fn from_message(
        id: SandboxId,
        namespace: String,
        message: &[u8],
        netns: String,
        node: Arc<Node>,
    ) -> Result<Pod, PodError> {
        let unreadable = |source| PodError::Unreadable { id: id.to_string(), source };
        let config = cri::PodSandboxConfig::decode(message).map_err(unreadable)?;
        if let Some(unknown) = cri_fields::unknown_in_message(POD_CONFIG_TYPE, message).map_err(unreadable)? {
            let Refusal { what, remedy } = Refusal::of_unknown(&unknown);
            return Err(PodError::Refused { pod: name_of(&config, id.as_str()), what, remedy });
        }
        Pod::new(id, namespace, config, netns, node)
    }

    /// The same of a configuration of which everything has been understood.
    pub fn new(
        id: SandboxId,
        namespace: String,
        config: cri::PodSandboxConfig,
        netns: String,
        node: Arc<Node>,
    ) -> Result<Pod, PodError> {
        let pod = name_of(&config, id.as_str());
        if let Some(Refusal { what, remedy }) = refusals::refusal(&config) {
            return Err(PodError::Refused { pod, what, remedy });
        }
        if let Err(source) = nested::of(&config, &node.config) {
            return Err(PodError::Nested { pod, source });
        }
        let size =
            Size::of(&config, &node.config, node.host).map_err(|source| PodError::Size { pod, source })?;
        let created_at = SystemTime::now();
        Ok(Pod::make(Identity { id, namespace, netns, config, created_at }, size, node))
    }

    fn make(identity: Identity, size: Size, node: Arc<Node>) -> Pod {
        let Identity { id, namespace, netns, config, created_at } = identity;
        let directory = node.config.run_dir.join(&id);
        // What is no map was refused when the pod was new.
        let id_map = IdMap::of(&config).ok().flatten();
        Pod {
            share: AsyncMutex::new(Share::at(directory.join(file::SHARE))),
            directory,
            id: id.to_string(),
            sandbox: id,
            namespace,
            config,
            netns,
            id_map,
            size,
            created_at,
            node,
            lifecycle: AsyncMutex::new(()),
            state: Mutex::new(State {
                phase: Phase::Created,
                running: Undo::default(),
                cgroup: None,
                interfaces: Vec::new(),
                port_forward: None,
                directory: Undo::default(),
                watched: false,
                marks: Marks::default(),
                timeline: None,
                containers: HashMap::new(),
                limits: HashMap::new(),
                size_now: Some(size),
                pinned: Some(Default::default()),
                progress: Progress::default(),
                guest_kernel: String::new(),
                reason: None,
            }),
            ended: watch::Sender::new(None),
            claimed: watch::Sender::new(false),
            log_limit: LogLimit::new(),
            stopping: Notify::new(),
        }
    }

    fn identity(&self) -> Identity {
        Identity {
            id: self.sandbox.clone(),
            namespace: self.namespace.clone(),
            netns: self.netns.clone(),
            config: self.config.clone(),
            created_at: self.created_at,
        }
    }

    /// "pod namespace/name (id)", for messages.
    pub fn name(&self) -> String {
        name_of(&self.config, &self.id)
    }

    /// The address on which containerd reaches the tasks.
    pub fn address(&self) -> String {
        let socket = self.directory.join(file::VSOCK);
        format!("ttrpc+hvsock://{}:{}", socket.display(), pericarp_protos::guest::AGENT_PORT)
    }

    pub fn phase(&self) -> Phase {
        self.state().phase.clone()
    }

    /// Resolves when the machine has ended; at once if it has.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        loop {
            if let Some(ended) = *ended.borrow_and_update() {
                return ended;
            }
            // The sender is part of this pod, which is borrowed here.
            let _ = ended.changed().await;
        }
    }

    /// containerd waits for its end: it knows this pod.
    pub fn claim(&self) {
        self.claimed.send_replace(true);
    }

    /// Resolves when containerd has shown that it knows this pod; at once if it has.
    pub async fn claimed(&self) {
        // The sender is part of this pod, which is borrowed here.
        let _ = self.claimed.subscribe().wait_for(|claimed| *claimed).await;
    }

    /// When and how the machine ended, if it has.
    pub fn end(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds this; if something did, the numbers in it would still be sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cgroup that has the pod's numbers; `None` on a host without cgroup v2.
    pub fn cgroup(&self) -> Option<PathBuf> {
        self.state().cgroup.clone()
    }

    /// The pod's user namespace on the host, if it has one.
    fn user_namespace(&self) -> Result<Option<UserNamespace>, UserNamespaceError> {
        let of_netns = |map| UserNamespace::of_netns(Path::new(&self.netns), map);
        self.id_map.map(of_netns).transpose()
    }

    /// Writes a line of the log that the guest can cause, unless it has caused too many.
    pub(crate) fn caused_by_guest(&self, write: impl FnOnce()) {
        let Some(suppressed) = self.log_limit.permit() else { return };
        if suppressed > 0 {
            tracing::warn!(pod = self.id, suppressed, "the guest has caused more lines than are written");
        }
        write();
    }

    /// What the guest has of the pod's network, and whether port-forward works.
    fn network_status(&self) -> (Vec<InterfaceStatus>, Option<String>) {
        let state = self.state();
        (state.interfaces.clone(), state.port_forward.clone())
    }

    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// The machine's vsock socket.
    pub(crate) fn vsock(&self) -> PathBuf {
        self.directory.join(file::VSOCK)
    }

    pub(crate) fn last_event(&self) -> u64 {
        self.state().progress.last_event
    }

    /// Whether a container is, or was, this pod's.
    pub(crate) fn knows_container(&self, id: &str) -> bool {
        self.state().progress.knows(id)
    }

    /// Changes what is on record about the pod's events.
    pub(crate) fn progress(&self, change: impl FnOnce(&mut Progress)) {
        // Written under the lock, so that an older record never replaces a newer one.
        let mut state = self.state();
        change(&mut state.progress);
        if let Err(error) = state.progress.write(&self.directory) {
            tracing::warn!(pod = self.id, %error, "events may be told twice after a restart of the controller");
        }
    }

    /// Changes a prepared container's timeline; `None` if the guest speaks of one that is not.
    pub(crate) fn with_container_timeline(
        &self,
        id: &str,
        change: impl FnOnce(&mut ContainerTimeline),
    ) -> Option<ContainerTimeline> {
        let mut state = self.state();
        let timeline = state.containers.get_mut(id)?;
        change(timeline);
        Some(*timeline)
    }

    /// What `crictl inspectp` prints: the keys that containerd's own sandboxes have, and the machine.
    pub async fn verbose_info(&self) -> serde_json::Value {
        let running = matches!(self.phase(), Phase::Running { .. });
        let machine = if running { machine::status(&self.directory).await.ok() } else { None };
        let timeline = self.timeline(machine.as_ref());
        let state = self.state();
        let pid = match state.phase {
            Phase::Running { pid } => pid,
            _ => 0,
        };
        json!({
            "pid": pid,
            "processStatus": if running { "running" } else { "stopped" },
            "netNamespaceClosed": !self.netns.is_empty() && !Path::new(&self.netns).exists(),
            "runtimeHandler": "pericarp",
            "runtimeType": "io.containerd.pericarp.v1",
            "runtimeOptions": null,
            "config": self.config,
            "runtimeSpec": null,
            "cniResult": null,
            "pericarp": {
                "directory": self.directory,
                "vcpus": state.size_now.unwrap_or(self.size).vcpus,
                "memoryMib": state.size_now.unwrap_or(self.size).memory_mib,
                "residentBytes": machine.as_ref().map(|machine| machine.resident_bytes),
                "devices": machine.as_ref().map(|machine| {
                    machine.devices.iter().map(|device| (device.device.clone(), json!(device.counters))).collect::<serde_json::Map<_, _>>()
                }),
                "netns": self.netns,
                "interfaces": state.interfaces,
                "portForward": state.port_forward,
                "guestKernel": state.guest_kernel,
                "bootTimeline": timeline,
                "containers": state.containers,
                "reason": state.reason,
            },
        })
    }

    /// The boot timeline, once the machine has told its part.
    fn timeline(&self, machine: Option<&StatusResponse>) -> Option<PodTimeline> {
        let mut state = self.state();
        if state.timeline.is_none()
            && state.marks.end > 0
            && let Some(boot) = machine.and_then(|machine| machine.boot.as_ref())
        {
            state.timeline = Some(PodTimeline::new(&state.marks, boot));
        }
        state.timeline
    }
}

/// "pod namespace/name (id)".
fn name_of(config: &cri::PodSandboxConfig, id: &str) -> String {
    let metadata = config.metadata.clone().unwrap_or_default();
    format!("pod {}/{} ({id})", metadata.namespace, metadata.name)
}

#[cfg(test)]
pub(crate) mod tests;
