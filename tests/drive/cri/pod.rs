//! Pods: how a test describes one, and what it can ask of it.

use std::{collections::HashMap, fs, iter, net::IpAddr, path::PathBuf};

use anyhow::{Context, Result};
use tonic::{Code, Status};

use crate::{
    Container, ContainerBuilder, Node, api,
    node::{cgroup, empty_dir::MemoryEmptyDir},
};

/// Describes a pod as kubelet would: own namespaces, a cgroup, a log directory.
#[derive(Clone, Debug)]
pub struct PodBuilder {
    node: Node,
    config: api::PodSandboxConfig,
    /// The name of its cgroup, if it gets one.
    cgroup: Option<String>,
    /// How many tasks kubelet would allow the pod; `None` if there is no limit.
    tasks_max: Option<u32>,
}

/// The user id on the node of the root of a pod with a user namespace. As with kubelet, the pod's range has 65,536 ids.
pub const POD_ROOT: u32 = 1_000_000;

/// How often [`PodBuilder::try_run`] calls `RunPodSandbox` if containerd has lost the helper process of a user
/// namespace.
const ATTEMPTS_MAX: usize = 5;

/// The id mapping of a pod with a user namespace.
fn id_mapping() -> Vec<api::IdMapping> {
    vec![api::IdMapping { container_id: 0, host_id: POD_ROOT, length: 65536 }]
}

/// Maps the ids of a volume like those of a pod with a user namespace, as kubelet does for every volume of such a pod.
pub fn with_mapped_ids(mount: api::Mount) -> api::Mount {
    api::Mount { uid_mappings: id_mapping(), gid_mappings: id_mapping(), ..mount }
}

/// A pod that runs, or has run.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The sandbox id.
    pub id: String,
    /// What it was made with; kubelet hands it in again for every container.
    pub config: api::PodSandboxConfig,
    pub(crate) node: Node,
}

impl PodBuilder {
    pub(crate) fn new(node: &Node, name: &str, unique: &str) -> Self {
        let uid = format!("{unique}-{name}");
        let namespaces = api::NamespaceOption {
            network: api::NamespaceMode::Pod.into(),
            pid: api::NamespaceMode::Container.into(),
            ipc: api::NamespaceMode::Pod.into(),
            ..Default::default()
        };
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: uid.clone(),
                uid: uid.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: node.directory().join(name).display().to_string(),
            dns_config: Some(api::DnsConfig {
                servers: vec!["10.96.0.10".to_owned()],
                searches: vec!["default.svc.cluster.local".to_owned(), "cluster.local".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            linux: Some(api::LinuxPodSandboxConfig {
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    seccomp: Some(api::SecurityProfile {
                        profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self { node: node.clone(), config, cgroup: Some(uid), tasks_max: None }
    }

    /// Leaves out everything except names and labels, as critest, the validation suite of CRI, does.
    #[must_use]
    pub fn minimal(mut self) -> Self {
        self.config = api::PodSandboxConfig {
            metadata: self.config.metadata.map(|metadata| api::PodSandboxMetadata { attempt: 2, ..metadata }),
            labels: self.config.labels,
            linux: Some(api::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        self.cgroup = None;
        self
    }

    /// Limits the tasks that the pod may have, as kubelet does with `podPidsLimit`.
    #[must_use]
    pub fn tasks_max(mut self, max: u32) -> Self {
        self.tasks_max = Some(max);
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Changes anything that has no method of its own.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut api::PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the Linux part.
    #[must_use]
    pub fn with_linux(mut self, change: impl FnOnce(&mut api::LinuxPodSandboxConfig)) -> Self {
        change(self.config.linux.get_or_insert_default());
        self
    }

    /// Changes which namespaces the pod has.
    #[must_use]
    pub fn with_namespaces(self, change: impl FnOnce(&mut api::NamespaceOption)) -> Self {
        self.with_linux(|linux| {
            let security = linux.security_context.get_or_insert_default();
            change(security.namespace_options.get_or_insert_default());
        })
    }

    /// Gives the pod a user namespace, as `hostUsers: false` does.
    #[must_use]
    pub fn in_user_namespace(self) -> Self {
        self.with_namespaces(|namespaces| {
            namespaces.userns_options = Some(api::UserNamespace {
                mode: api::NamespaceMode::Pod.into(),
                uids: id_mapping(),
                gids: id_mapping(),
            });
        })
    }

    /// Sets what the pod's containers ask for together; kubelet adds it up in the sandbox's resources.
    #[must_use]
    pub fn resources(self, resources: api::LinuxContainerResources) -> Self {
        self.with_linux(|linux| linux.resources = Some(resources))
    }

    /// Makes the cgroup and the log directory, then calls `RunPodSandbox`.
    pub async fn run(self) -> Result<Pod> {
        self.try_run().await?.context("RunPodSandbox")
    }

    /// Like [`PodBuilder::run`], with the call's own error for tests of errors.
    pub async fn try_run(mut self) -> Result<Result<Pod, Status>> {
        if let Some(cgroup) = &self.cgroup {
            self.config.linux.get_or_insert_default().cgroup_parent = cgroup::make(cgroup)?;
            if let Some(max) = self.tasks_max {
                cgroup::limit_tasks(cgroup, max)?;
            }
        }
        fs::create_dir_all(&self.config.log_directory)?;
        let request = api::RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.node.handler(),
        };
        let mut attempt = 1;
        let response = loop {
            let response = Box::pin(self.node.cri.runtime().run_pod_sandbox(request.clone())).await;
            if attempt == ATTEMPTS_MAX || !response.as_ref().is_err_and(is_lost_helper) {
                break response;
            }
            attempt += 1;
        };
        Ok(response.map(|response| Pod {
            id: response.into_inner().pod_sandbox_id,
            config: self.config,
            node: self.node,
        }))
    }
}

/// Whether containerd has lost the helper process by which it makes a user namespace (`UnshareAfterEnterUserns` in
/// 2.1). The kernel kills that process if the thread that started it happens to end; kubelet tries again.
fn is_lost_helper(status: &Status) -> bool {
    ["failed to mount netns from pid", "failed to ensure child process is alive"]
        .iter()
        .any(|text| status.message().contains(text))
}

impl Pod {
    /// Describes a new container of this pod, with the test image and a command that never ends.
    pub fn container(&self, name: &str) -> ContainerBuilder {
        ContainerBuilder::new(self, name)
    }

    /// The pod's UID in Kubernetes, which is in the paths of its volumes.
    pub fn uid(&self) -> String {
        self.config.metadata.as_ref().map(|metadata| metadata.uid.clone()).unwrap_or_default()
    }

    /// Mounts an emptyDir in memory for this pod, as kubelet does. `size` is a size such as `8m`.
    pub fn empty_dir_in_memory(&self, name: &str, size: &str) -> Result<MemoryEmptyDir> {
        let kubelet = self.node.directory().join("kubelet").display().to_string();
        MemoryEmptyDir::new(&kubelet, &self.uid(), name, size)
    }

    /// A container of this pod that only waits.
    pub async fn idle_container(&self, name: &str) -> Result<Container> {
        self.container(name).start().await
    }

    /// `PodSandboxStatus`; `None` when containerd knows no such pod.
    pub async fn status(&self) -> Result<Option<api::PodSandboxStatus>> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        match self.node.cri.runtime().pod_sandbox_status(request).await {
            Ok(response) => Ok(response.into_inner().status),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status).context("PodSandboxStatus"),
        }
    }

    /// The JSON that verbose `PodSandboxStatus` returns under "info", with what a pod of Pericarp's has under a key of
    /// its own below "pericarp".
    pub async fn info(&self) -> Result<serde_json::Value> {
        let request = api::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let info: HashMap<String, String> =
            self.node.cri.runtime().pod_sandbox_status(request).await?.into_inner().info;
        let json = info.get("info").context("verbose status has no \"info\"")?;
        let mut all: serde_json::Value =
            serde_json::from_str(json).with_context(|| format!("verbose status is not JSON: {json}"))?;
        if let Some(json) = info.get("pericarp") {
            all["pericarp"] = serde_json::from_str(json).with_context(|| format!("not JSON: {json}"))?;
        }
        Ok(all)
    }

    /// The pod's addresses; its main one first.
    pub async fn addresses(&self) -> Result<Vec<IpAddr>> {
        let status = self.status().await?.context("the pod is gone")?;
        let network = status.network.context("the pod has no network")?;
        let further = network.additional_ips.into_iter().map(|further| further.ip);
        iter::once(network.ip)
            .chain(further)
            .map(|ip| ip.parse().with_context(|| format!("the pod's address {ip:?}")))
            .collect()
    }

    /// `PodSandboxStats`.
    pub async fn stats(&self) -> Result<api::PodSandboxStats> {
        let request = api::PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let response = self.node.cri.runtime().pod_sandbox_stats(request).await.context("PodSandboxStats")?;
        response.into_inner().stats.context("PodSandboxStats returned no statistics")
    }

    /// Whether the pod's state is READY.
    pub async fn is_ready(&self) -> Result<bool> {
        Ok(self.status().await?.is_some_and(|status| status.state() == api::PodSandboxState::SandboxReady))
    }

    /// `StopPodSandbox`.
    pub async fn stop(&self) -> Result<()> {
        let request = api::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.node.cri.runtime().stop_pod_sandbox(request).await.context("StopPodSandbox")?;
        Ok(())
    }

    /// `RemovePodSandbox`.
    pub async fn remove(&self) -> Result<()> {
        let request = api::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.node.cri.runtime().remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
        Ok(())
    }

    pub(crate) fn log_directory(&self) -> PathBuf {
        PathBuf::from(&self.config.log_directory)
    }
}
