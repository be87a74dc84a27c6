//! What a pod is made from, in words that belong to no one who asks for pods.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use pericarp_protos::id::SandboxId;
use pericarp_vmm::RateLimits;
use serde::{Deserialize, Serialize};

use crate::host::{size::PodResources, user_namespace::IdMap};

/// A pod as it was asked for. It never changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    pub id: SandboxId,
    /// Its name for people, and the Kubernetes namespace that this name is in.
    pub name: String,
    pub namespace: String,
    /// kubelet's id of the pod, which is in the paths of its volumes; empty if nobody knows it.
    #[serde(default)]
    pub uid: String,
    /// Where its containers are on record: containerd's namespace, usually `k8s.io`.
    pub source_namespace: String,
    /// The network namespace that has been made for it, if any.
    pub netns: Option<PathBuf>,
    pub created_at: SystemTime,
    /// Empty: the node's.
    pub hostname: String,
    /// `None`: the node's.
    pub dns: Option<Dns>,
    pub sysctls: BTreeMap<String, String>,
    /// The map of its user namespace, if it has one.
    pub id_map: Option<IdMap>,
    /// The cgroup that its own is to be made in; empty: one of Pericarp's.
    pub cgroup_parent: String,
    pub resources: PodResources,
    /// Whether it may have virtual machines of its own.
    pub nested_virtualization: bool,
    /// How much the machine's devices may do in a second, if that is less than the node allows.
    #[serde(default)]
    pub rate_limits: RateLimits,
    /// The request for it as it was made, for people who look into the pod.
    pub request: serde_json::Value,
}

/// How names are resolved (resolv.conf(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

impl PodSpec {
    /// A pod of which nothing is known except its id, which has left its directory behind.
    pub fn unknown(id: SandboxId, source_namespace: &str) -> Self {
        Self {
            id,
            name: String::new(),
            namespace: String::new(),
            uid: String::new(),
            source_namespace: source_namespace.to_owned(),
            // Its taps are removed with it by whoever has made it.
            netns: None,
            created_at: SystemTime::now(),
            hostname: String::new(),
            dns: None,
            sysctls: BTreeMap::new(),
            id_map: None,
            cgroup_parent: String::new(),
            resources: PodResources::default(),
            nested_virtualization: false,
            rate_limits: RateLimits::default(),
            request: serde_json::Value::Null,
        }
    }

    /// "pod namespace/name (id)", for messages.
    pub fn title(&self) -> String {
        let Self { namespace, name, id, .. } = self;
        format!("pod {namespace}/{name} ({id})")
    }

    /// Whether its network namespace was there and is no more.
    pub fn is_netns_closed(&self) -> bool {
        self.netns.as_deref().is_some_and(|netns: &Path| !netns.exists())
    }
}
