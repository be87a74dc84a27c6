//! The node that a test runs on, and the frame that every test runs in.

use std::{
    env, fmt,
    fs::{self, File},
    io::{self, Write as _},
    panic::{AssertUnwindSafe, resume_unwind},
    path::PathBuf,
    process,
    sync::{PoisonError, RwLock},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use tokio::time::timeout;

/// Where a run's results are collected, if they are: what the next run deals tests to nodes by (`tests/node/deal`).
const DURATIONS: &str = "/results/durations";

use crate::{Cri, PodBuilder, api};

/// A test that takes longer than this has hung. Cleaning up has as long again.
const TEST_LIMIT: Duration = Duration::from_secs(900);

/// The label that every pod of one test carries, so that all of them are found again.
const TEST_LABEL: &str = "pericarp.test";

/// Parent of all pods' cgroups, as kubelet has one.
const PODS_CGROUP: &str = "/sys/fs/cgroup/kubepods";

/// Every test has it for reading, and one that wants the node for itself for writing.
static NODE_IN_USE: RwLock<()> = RwLock::new(());

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
    /// If the variable names neither: a run against something else would prove nothing.
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
    /// A bridge with IPv4, and portmap.
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

/// Pods that another handler of the same runtime makes: see `tests/node/containerd-config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// Their images are file systems of their own.
    Erofs,
    /// containerd knows what their handler can do.
    Features,
}

/// A node, and everything that one test has made on it.
#[derive(Clone, Debug)]
pub struct Node {
    /// The connection to containerd.
    pub cri: Cri,
    /// What runs this node's pods.
    pub runtime: Runtime,
    /// What connects them.
    network: Network,
    /// What else of theirs is not the ordinary.
    variant: Option<Variant>,
    /// Unlike any other test's, and short enough for a host name.
    unique: String,
}

/// What else may run on the node meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Company {
    /// Other tests.
    Shared,
    /// Nothing, because the test takes away what all others need.
    Alone,
}

/// Runs one test: gives it a node, bounds its time, and removes every pod it made, also when it fails.
pub fn on_node(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    run(Company::Shared, TEST_LIMIT, test)
}

/// Like [`on_node`], for a test of something that only Pericarp has.
pub fn on_pericarp(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    unless_runc(|| run(Company::Shared, TEST_LIMIT, test))
}

/// Like [`on_pericarp`], for a test that takes away what all others need: none runs at the same time.
pub fn on_pericarp_alone(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    on_pericarp_alone_for(TEST_LIMIT, test)
}

/// Like [`on_pericarp_alone`], for a test that takes as long as it was asked to.
pub fn on_pericarp_alone_for(limit: Duration, test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    unless_runc(|| run(Company::Alone, limit, test))
}

/// Like [`on_node`], for a test that takes away what all others need: none runs at the same time.
pub fn on_node_alone(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    run(Company::Alone, TEST_LIMIT, test)
}

fn unless_runc(test: impl FnOnce() -> Result<()>) -> Result<()> {
    match Runtime::under_test() {
        Runtime::Pericarp => test(),
        Runtime::Runc => {
            // Not captured, unlike what `eprintln!` writes: `scripts/test` tells it at its end.
            let _ = writeln!(io::stderr(), "\nskipped: not for runc");
            Ok(())
        }
    }
}

fn run(company: Company, limit: Duration, test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    let (_shared, _alone) = match company {
        Company::Shared => (Some(NODE_IN_USE.read().unwrap_or_else(PoisonError::into_inner)), None),
        Company::Alone => (None, Some(NODE_IN_USE.write().unwrap_or_else(PoisonError::into_inner))),
    };
    recorded(company, async |name| {
        let node = Node::connect(Runtime::under_test(), name).await?;
        let bounded = async { timeout(limit, test(&node)).await.context("the test ran into its limit")? };
        let outcome = AssertUnwindSafe(bounded).catch_unwind().await;
        let cleanup = timeout(TEST_LIMIT, node.clean_up()).await;
        outcome.unwrap_or_else(|panic| resume_unwind(panic))?;
        cleanup.context("cleaning up ran into its limit")?.context("clean up")
    })
}

/// Runs one test of a machine that has neither containerd nor a controller.
pub fn without_containerd(test: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let _in_use = NODE_IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    recorded(Company::Shared, async |_| {
        timeout(TEST_LIMIT, test()).await.context("the test ran into its limit")?
    })
}

/// Runs a test, which is told its name, and records how long it took.
fn recorded(company: Company, test: impl AsyncFnOnce(&str) -> Result<()>) -> Result<()> {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    executor.block_on(async {
        let start = Instant::now();
        let name = thread::current().name().unwrap_or("test").to_owned();
        let outcome = AssertUnwindSafe(test(&name)).catch_unwind().await;
        if let Ok(mut file) = File::options().append(true).create(true).open(DURATIONS) {
            let (seconds, company) = (start.elapsed().as_secs_f64(), format!("{company:?}").to_lowercase());
            writeln!(file, "{seconds:.1} {company} e2e {name}")?;
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    })
}

impl Node {
    /// Connects to the node's containerd. `name` is what the pods made here are called after.
    pub async fn connect(runtime: Runtime, name: &str) -> Result<Self> {
        let short: String =
            name.rsplit("::").next().unwrap_or(name).replace('_', "-").chars().take(40).collect();
        let unique = format!("{}-{}", short.trim_matches('-'), process::id());
        Ok(Self { cri: Cri::connect().await?, runtime, network: Network::Node, variant: None, unique })
    }

    /// The same node, for pods of another runtime.
    #[must_use]
    pub fn with_runtime(&self, runtime: Runtime) -> Self {
        Self { runtime, ..self.clone() }
    }

    /// The same node, for pods on another network.
    #[must_use]
    pub fn with_network(&self, network: Network) -> Self {
        Self { network, ..self.clone() }
    }

    /// The same node, for pods whose images containerd keeps with its erofs snapshotter.
    #[must_use]
    pub fn with_erofs(&self) -> Self {
        Self { variant: Some(Variant::Erofs), ..self.clone() }
    }

    /// The same node, for pods whose handler containerd knows the features of. It always does for runc's.
    #[must_use]
    pub fn with_features(&self) -> Self {
        let variant = (self.runtime == Runtime::Pericarp).then_some(Variant::Features);
        Self { variant, ..self.clone() }
    }

    /// The name of the runtime handler that the pods get.
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
        for name in children(&PathBuf::from(PODS_CGROUP))? {
            if name.starts_with(&self.unique) {
                remove_cgroup(&PathBuf::from(PODS_CGROUP).join(name)).await?;
            }
        }
        match fs::remove_dir_all(self.directory()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// A name of this test's own, for what is not a pod.
    pub fn name(&self) -> &str {
        &self.unique
    }

    /// A directory of this test's own on the node, made when it is first asked for: logs and volumes.
    pub(crate) fn directory(&self) -> PathBuf {
        PathBuf::from("/run/pods").join(&self.unique)
    }

    /// Makes a directory for volumes below this test's own and answers with its path on the node.
    pub fn directory_for(&self, name: &str) -> Result<String> {
        let path = self.directory().join("volumes").join(name);
        fs::create_dir_all(&path)?;
        Ok(path.display().to_string())
    }

    /// Makes a file below this test's directory and answers with its path on the node.
    pub fn file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.directory().join("volumes").join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, content)?;
        Ok(path.display().to_string())
    }
}

/// Makes a pod's cgroup, as kubelet does before it calls `RunPodSandbox`; answers with the `cgroup_parent`.
pub(crate) fn make_cgroup(name: &str) -> Result<String> {
    let parent = PathBuf::from(PODS_CGROUP);
    let cgroup = parent.join(name);
    fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
    for directory in [&parent, &cgroup] {
        fs::write(directory.join("cgroup.subtree_control"), "+cpuset +cpu +io +memory +pids")
            .with_context(|| format!("delegate controllers in {}", directory.display()))?;
    }
    Ok(format!("/kubepods/{name}"))
}

/// Removes a pod's cgroup. Processes in it would be a pod's that nobody ended: an error that names them.
async fn remove_cgroup(cgroup: &PathBuf) -> Result<()> {
    // The kernel is done with a dead process's cgroup a moment after its parent has seen it die.
    for _ in 0..300 {
        for child in children(cgroup)? {
            let _ = fs::remove_dir(cgroup.join(child));
        }
        if fs::remove_dir(cgroup).is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut processes = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    for child in children(cgroup)? {
        processes += &fs::read_to_string(cgroup.join(&child).join("cgroup.procs"))?;
    }
    ensure!(processes.is_empty(), "processes {processes:?} are left in {}", cgroup.display());
    bail!("{} cannot be removed", cgroup.display())
}

/// Names of the directories in a directory; none if it does not exist.
fn children(directory: &PathBuf) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}
