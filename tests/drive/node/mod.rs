//! The node that a test runs on: its runtimes, its pods, and what runs on it besides.

pub(crate) mod cgroup;
pub mod containerd;
pub mod contention;
pub mod controller;
pub mod empty_dir;
pub mod frame;
pub mod leaks;
pub mod machine;
pub mod mount;
pub mod pool;
pub mod process;

use std::{
    env, fmt, fs, mem,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};

use crate::{Cri, Pod, PodBuilder, api};
use pool::PooledPod;

/// The label that every pod of one test carries, so that all of them are found again.
const TEST_LABEL: &str = "pericarp.test";

/// The runtime handler that the tests use: `PERICARP_TEST_RUNTIME`, by default Pericarp.
///
/// Run with `runc`, a test shows that its expectations are containerd's and not Pericarp's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// A machine per pod.
    Pericarp,
    /// containerd's default.
    Runc,
}

impl Runtime {
    /// The runtime that this run of the tests is for.
    ///
    /// # Panics
    ///
    /// Panics if the variable names neither, because a run against something else would prove nothing.
    pub fn under_test() -> Self {
        match env::var("PERICARP_TEST_RUNTIME").as_deref() {
            Ok("runc") => Self::Runc,
            Ok("pericarp") | Err(_) => Self::Pericarp,
            Ok(other) => panic!("PERICARP_TEST_RUNTIME is {other:?}; it may be pericarp or runc"),
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pericarp => "pericarp",
            Self::Runc => "runc",
        })
    }
}

/// The pods' network on a node: see `tests/node/containerd-config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// A bridge with IPv4.
    Node,
    /// A bridge with IPv4 and IPv6, an MTU of 1400 bytes, and portmap.
    Dual,
    /// A bridge with IPv6 only.
    Six,
    /// A bridge with one fixed IPv4 and one fixed MAC address, an MTU of 9000 bytes, and a route besides the default.
    Static,
    /// A veth pair without a bridge, IPv4 and IPv6, portmap and bandwidth limits.
    Ptp,
    /// Two interfaces: a bridge's and a macvlan.
    Two,
    /// A macvlan interface on the link `lan0`.
    Macvlan,
    /// An ipvlan interface on the link `lan1`.
    Ipvlan,
    /// A tap that a CNI plugin has made.
    Tap,
    /// A link that leads nowhere.
    Dummy,
}

/// Further handlers of the same runtime: see `tests/node/containerd-config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HandlerVariant {
    /// containerd keeps the images of their pods with its erofs snapshotter.
    Erofs,
    /// containerd knows the features of this handler.
    Features,
}

/// A node, and everything that one test has made on it.
#[derive(Clone, Debug)]
pub struct Node {
    /// The connection to containerd.
    pub cri: Cri,
    /// The runtime of the pods that are made here.
    pub runtime: Runtime,
    /// The network of the pods that are made here.
    network: Network,
    /// The handler of the same runtime that makes its pods, if it is not the ordinary one.
    variant: Option<HandlerVariant>,
    /// A name that no other test has, and that is short enough for a host name.
    unique: String,
    /// The pods of the pool that this test has.
    pooled: Arc<Mutex<Vec<PooledPod>>>,
}

impl Node {
    /// Connects to the node's containerd. The names of the pods that are made here derive from `name`.
    pub async fn connect(runtime: Runtime, name: &str) -> Result<Self> {
        let short: String =
            name.rsplit("::").next().unwrap_or(name).replace('_', "-").chars().take(40).collect();
        let unique = format!("{}-{}", short.trim_matches('-'), std::process::id());
        Ok(Self {
            cri: Cri::connect().await?,
            runtime,
            network: Network::Node,
            variant: None,
            unique,
            pooled: Arc::default(),
        })
    }

    /// Returns this node for pods whose names derive from `unique`.
    fn named(&self, unique: &str) -> Self {
        Self { unique: unique.to_owned(), ..self.clone() }
    }

    /// Returns this node with another runtime for the pods that are made on it.
    #[must_use]
    pub fn with_runtime(&self, runtime: Runtime) -> Self {
        Self { runtime, ..self.clone() }
    }

    /// Returns this node with another network for the pods that are made on it.
    #[must_use]
    pub fn with_network(&self, network: Network) -> Self {
        Self { network, ..self.clone() }
    }

    /// Returns this node with a handler whose images containerd keeps with its erofs snapshotter.
    #[must_use]
    pub fn with_erofs(&self) -> Self {
        Self { variant: Some(HandlerVariant::Erofs), ..self.clone() }
    }

    /// Returns this node with a handler whose features containerd knows. It always knows those of runc's.
    #[must_use]
    pub fn with_features(&self) -> Self {
        let variant = (self.runtime == Runtime::Pericarp).then_some(HandlerVariant::Features);
        Self { variant, ..self.clone() }
    }

    /// The name of the runtime handler for the pods that are made here.
    pub fn handler(&self) -> String {
        let name = match (self.variant, self.network) {
            (Some(variant), _) => format!("{}-{variant:?}", self.runtime),
            (None, Network::Node) => self.runtime.to_string(),
            (None, network) => format!("{}-{network:?}", self.runtime),
        };
        name.to_lowercase()
    }

    /// Describes a new pod; `name` need only differ from the names of this test's other pods.
    pub fn pod(&self, name: &str) -> PodBuilder {
        PodBuilder::new(self, name, &self.unique).label(TEST_LABEL, &self.unique)
    }

    /// An ordinary pod that tests have one after the other, for a test that needs some pod and does nothing to it.
    pub async fn pooled_pod(&self) -> Result<Pod> {
        let pooled = PooledPod::start_or_reuse(self).await?;
        let pod = pooled.on(self);
        self.pooled.lock().unwrap_or_else(PoisonError::into_inner).push(pooled);
        Ok(pod)
    }

    /// Puts the pool's pods that this test has had back, or removes them if it has failed.
    pub(crate) async fn return_pooled_pods(&self, succeeded: bool) -> Result<()> {
        let pooled = mem::take(&mut *self.pooled.lock().unwrap_or_else(PoisonError::into_inner));
        let mut outcome = Ok(());
        for pod in pooled {
            let returned = if succeeded { pod.put_back(self).await } else { pod.remove(self).await };
            outcome = outcome.and(returned.context("return a pod of the pool"));
        }
        outcome
    }

    /// All pods of this test that containerd knows.
    pub async fn pods(&self) -> Result<Vec<api::PodSandbox>> {
        let filter = api::PodSandboxFilter {
            label_selector: [(TEST_LABEL.to_owned(), self.unique.clone())].into(),
            ..Default::default()
        };
        let request = api::ListPodSandboxRequest { filter: Some(filter) };
        Ok(self.cri.runtime().list_pod_sandbox(request).await?.into_inner().items)
    }

    /// Stops and removes a pod by its id.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let stop = api::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.cri.runtime().stop_pod_sandbox(stop).await.context("StopPodSandbox")?;
        let remove = api::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.cri.runtime().remove_pod_sandbox(remove).await.context("RemovePodSandbox")?;
        Ok(())
    }

    /// Stops and removes every pod of this test, and what kubelet would remove: its cgroup and its logs.
    pub async fn clean_up(&self) -> Result<()> {
        for pod in self.pods().await? {
            self.remove_pod(&pod.id).await?;
        }
        cgroup::remove_all(&self.unique).await?;
        match fs::remove_dir_all(self.directory()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// A name that no other test has, for objects that are not pods.
    pub fn name(&self) -> &str {
        &self.unique
    }

    /// The directory on the node for the logs and volumes of this test. It may not exist yet.
    pub(crate) fn directory(&self) -> PathBuf {
        PathBuf::from("/run/pods").join(&self.unique)
    }

    /// Makes a directory for volumes below this test's own, and returns its path on the node.
    pub fn directory_for(&self, name: &str) -> Result<String> {
        let path = self.directory().join("volumes").join(name);
        fs::create_dir_all(&path)?;
        Ok(path.display().to_string())
    }

    /// Makes a file below this test's directory, and returns its path on the node.
    pub fn file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.directory().join("volumes").join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content)?;
        Ok(path.display().to_string())
    }
}
