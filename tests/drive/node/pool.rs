//! Pods that tests have one after the other. A test of what happens in a pod, and not to it, needs none of its own, and
//! most of such a test's time would be its pod's start and end.
//!
//! Only one test has a pod at a time. A pod that a test leaves is emptied for the next; if the test has failed, the pod
//! is removed, so that nothing spreads.

use std::{
    fs, process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context, Result, ensure};

use super::{Node, Runtime, TEST_LABEL};
use crate::{Pod, api};

/// How the names of the pool's pods begin, and of all that belongs to them.
const PREFIX: &str = "pool-";

/// The pods that no test has at the moment.
static IDLE: Mutex<Vec<PooledPod>> = Mutex::new(Vec::new());

/// The number of the next pod.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// A pod without the connection of the test that has had it: each test has an executor of its own, and a connection
/// belongs to one.
#[derive(Clone, Debug)]
pub(super) struct PooledPod {
    id: String,
    config: api::PodSandboxConfig,
    /// The name that all its belongings derive from: see [`Node::clean_up`].
    unique: String,
    handler: String,
}

impl PooledPod {
    /// Takes a pod of `node`'s handler, or starts one if other tests have all of them.
    pub(super) async fn start_or_reuse(node: &Node) -> Result<Self> {
        let handler = node.handler();
        let idle = {
            let mut idle = idle();
            idle.iter().position(|pod| pod.handler == handler).map(|index| idle.swap_remove(index))
        };
        if let Some(pod) = idle {
            ensure!(pod.on(node).is_ready().await?, "a pod of the pool has ended while no test had it");
            return Ok(pod);
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("{PREFIX}{}-{number:03}", process::id());
        let pod = match node.named(&unique).pod("pooled").run().await {
            Ok(pod) => pod,
            Err(error) => {
                // It may exist nevertheless, and nobody would know of it.
                node.named(&unique).clean_up().await?;
                return Err(error);
            }
        };
        Ok(Self { id: pod.id, config: pod.config, unique, handler })
    }

    /// The pod, on the connection of `node`.
    pub(super) fn on(&self, node: &Node) -> Pod {
        Pod { id: self.id.clone(), config: self.config.clone(), node: node.named(&self.unique) }
    }

    /// Empties the pod for the next test. If that fails, it is removed.
    pub(super) async fn put_back(self, node: &Node) -> Result<()> {
        match self.empty(node).await {
            Ok(()) => {
                idle().push(self);
                Ok(())
            }
            Err(error) => {
                self.remove(node).await?;
                Err(error)
            }
        }
    }

    async fn empty(&self, node: &Node) -> Result<()> {
        let pod = self.on(node);
        ensure!(pod.is_ready().await?, "the pod has ended in a test that needs it only for its containers");
        let mut runtime = node.cri.runtime();
        let filter = api::ContainerFilter { pod_sandbox_id: pod.id.clone(), ..Default::default() };
        let request = api::ListContainersRequest { filter: Some(filter) };
        for container in runtime.list_containers(request).await?.into_inner().containers {
            let request = api::RemoveContainerRequest { container_id: container.id };
            runtime.remove_container(request).await.context("RemoveContainer")?;
        }
        // Its logs, which later containers of the same names would go on writing, and its volumes.
        fs::remove_dir_all(pod.node.directory()).context("remove what a test has left in its pod")?;
        fs::create_dir_all(pod.log_directory())?;
        Ok(())
    }

    /// Removes the pod, which no test is to have any more.
    pub(super) async fn remove(self, node: &Node) -> Result<()> {
        node.named(&self.unique).clean_up().await
    }
}

/// Removes the pods that no test has, for a test that is to be alone.
pub(super) async fn remove_idle(node: &Node) -> Result<()> {
    let pods = std::mem::take(&mut *idle());
    for pod in pods {
        pod.remove(node).await?;
    }
    Ok(())
}

/// Removes the pool's pods at the end of a run: those of earlier processes, too.
pub async fn remove_all() -> Result<()> {
    let node = Node::connect(Runtime::Pericarp, PREFIX).await?;
    let list = api::ListPodSandboxRequest::default();
    for pod in node.cri.runtime().list_pod_sandbox(list).await?.into_inner().items {
        if let Some(unique) = pod.labels.get(TEST_LABEL).filter(|unique| unique.starts_with(PREFIX)) {
            node.named(unique).clean_up().await?;
        }
    }
    Ok(())
}

fn idle() -> MutexGuard<'static, Vec<PooledPod>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}
