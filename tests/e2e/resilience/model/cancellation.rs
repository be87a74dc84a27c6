//! Clients that go away in the middle of a call.

use std::time::Duration;

use anyhow::{Result, ensure};
use pericarp_tests::wait_until;
use tokio::time::timeout;
use tonic::Code;

use super::{CONTAINERS_MAX, Model, ModelPod};
use crate::resilience::clean_up;

/// A call that is given up.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    RunPod,
    StartContainer,
    StopPod,
}

impl Model<'_> {
    /// Makes a call, and goes away at a random moment of it.
    pub(super) async fn give_up(&mut self, call: Call) -> Result<bool> {
        let patience = Duration::from_millis(self.random.next() % 2500);
        match call {
            Call::RunPod => {
                let name = self.name("given-up");
                let run = timeout(patience, Box::pin(self.node.pod(&name).try_run())).await;
                if let Ok(run) = run {
                    match run? {
                        Ok(pod) => self.pods.push(ModelPod { pod, runs: true, containers: Vec::new() }),
                        // The controller has been away, perhaps.
                        Err(error) => ensure!(error.code() == Code::Unavailable, "RunPodSandbox: {error}"),
                    }
                    return Ok(true);
                }
                // What containerd keeps of it, kubelet removes.
                for pod in self.node.pods().await? {
                    if self.pods.iter().all(|known| known.pod.id != pod.id) {
                        clean_up(self.node, &pod.id).await?;
                    }
                }
            }
            Call::StartContainer => {
                let Some(at) = self.any_pod(true) else { return Ok(false) };
                if self.pods[at].containers.len() == CONTAINERS_MAX {
                    return Ok(false);
                }
                let name = self.name("given-up");
                let container = self.pods[at].pod.container(&name).create().await?;
                let _ = timeout(patience, container.try_start()).await;
                // Until the guest has made it, containerd says that it is starting.
                wait_until("the given-up container's removal", async || {
                    Ok(container.stop(0).await.is_ok() && container.remove().await.is_ok())
                })
                .await?;
            }
            Call::StopPod => {
                let Some(at) = self.any_pod(false) else { return Ok(false) };
                let pod = &mut self.pods[at];
                let _ = timeout(patience, pod.pod.stop()).await;
                wait_until("the pod's stop", async || pod.pod.stop().await.map(|()| true)).await?;
                pod.end();
            }
        }
        Ok(true)
    }
}
