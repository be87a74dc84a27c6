//! A pod's network in the pod's life.

use std::{path::Path, sync::Arc};

use pericarp_vmm::{PortForward, monotonic_ns};

use super::{Phase, Pod, boot::BootError};
use crate::{
    errors::chain,
    network::{self, PodNetwork, Watch},
    undo::Undo,
};

impl Pod {
    /// Gives the pod's network to its machine, or undoes what has been done of it.
    pub(super) async fn set_up_network(&self) -> Result<PodNetwork, BootError> {
        let mut running = Undo::default();
        let network = network::set_up(Path::new(&self.netns), self.size.vcpus, &mut running).await;
        let mut state = self.state();
        // Registered before any error is returned, so that it is undone.
        state.running = running;
        let network = network.map_err(BootError::Network)?;
        state.interfaces = network.status();
        state.marks.network = monotonic_ns();
        Ok(network)
    }

    /// What port-forward needs. A pod without it is a pod nonetheless.
    pub(super) fn take_forward(&self, network: &mut PodNetwork) -> Option<PortForward> {
        let forward = network.forward.take()?;
        let status = match &forward {
            Ok(_) => "works".to_owned(),
            Err(error) => {
                let reason = chain(error);
                tracing::warn!(pod = self.id, error = reason, "port-forward to this pod will not work");
                format!("does not work: {reason}")
            }
        };
        self.state().port_forward = Some(status);
        forward.ok()
    }

    /// Reports links of the pod's that are removed while it runs. The pod lives on: its containers may have other work.
    pub(super) fn watch_network(self: &Arc<Self>) {
        if self.netns.is_empty() {
            return;
        }
        let pod = self.clone();
        tokio::spawn(async move {
            let watched = tokio::select! {
                watched = pod.report_removed_links() => watched,
                _ = pod.wait() => return,
            };
            if let Err(error) = watched {
                tracing::warn!(
                    pod = pod.id,
                    error,
                    "nobody will say when an interface of the pod is removed"
                );
            }
        });
    }

    async fn report_removed_links(&self) -> Result<(), String> {
        let mut watch = Watch::new(Path::new(&self.netns)).await.map_err(|error| chain(&error))?;
        loop {
            let removed = watch.removed().await.map_err(|error| chain(&error))?;
            let mut state = self.state();
            if state.phase == Phase::Ended {
                // The pod is being taken down.
                return Ok(());
            }
            for link in removed {
                tracing::warn!(
                    pod = self.id,
                    link,
                    "a link of the pod's network was removed from under it; its guest is cut off there until the pod is made again"
                );
                for interface in state.interfaces.iter_mut().filter(|interface| interface.name == link) {
                    interface.removed = true;
                }
            }
        }
    }
}
