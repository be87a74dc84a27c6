//! Links that are removed from under a pod that runs.

use std::{path::Path, sync::Arc};

use super::{Pod, task::Command};
use crate::{host::network::Watch, telemetry::error_chain::chain};

impl Pod {
    /// Reports links of the pod's that are removed while it runs. The pod lives on: its containers may have other work.
    pub(super) fn watch_network(self: &Arc<Self>) {
        let Some(netns) = self.spec.netns.clone() else { return };
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let watched = tokio::select! {
                watched = pod.report_removed_links(&netns) => watched,
                _ended = pod.wait() => return,
                () = pod.stop_requested() => return,
            };
            if let Err(error) = watched {
                tracing::warn!(
                    pod = pod.id(),
                    error,
                    "nobody will say when an interface of the pod is removed"
                );
            }
        });
    }

    async fn report_removed_links(&self, netns: &Path) -> Result<(), String> {
        let mut watch = Watch::new(netns).await.map_err(|error| chain(&error))?;
        loop {
            let removed = watch.removed().await.map_err(|error| chain(&error))?;
            for link in &removed {
                tracing::warn!(
                    pod = self.id(),
                    link,
                    "a link of the pod's network was removed from under it; its guest is cut off there until the \
                     pod is made again"
                );
            }
            if self.mailbox.send(Command::LinksRemoved(removed)).await.is_err() {
                // The pod has been removed.
                return Ok(());
            }
        }
    }
}
