//! What can be seen of a pod from outside.

use std::collections::BTreeMap;

use pericarp_protos::{id::ContainerId, vmm::StatusResponse};

use super::{Pod, life::Phase, owned::Owned};
use crate::{
    host::{network::InterfaceStatus, size::Size},
    telemetry::timeline::{ContainerTimeline, PodTimeline, StartMarks},
};

/// A pod at one moment. Its task replaces it; everybody may read it.
#[derive(Clone, Debug)]
pub struct PodStatus {
    pub phase: Phase,
    /// The machine's size.
    pub size: Size,
    pub owned: Owned,
    /// What the guest has of the pod's network.
    pub interfaces: Vec<InterfaceStatus>,
    /// Whether port-forward works or why it does not, once that is known.
    pub port_forward: Option<String>,
    pub guest_kernel: String,
    pub marks: StartMarks,
    /// Those that are prepared.
    pub containers: BTreeMap<ContainerId, ContainerTimeline>,
    /// Why the machine ended, where it was not asked to.
    pub reason: Option<String>,
}

impl PodStatus {
    /// The status of a pod of which nothing has been made.
    pub fn new(size: Size) -> Self {
        Self {
            phase: Phase::Created,
            size,
            owned: Owned::default(),
            interfaces: Vec::new(),
            port_forward: None,
            guest_kernel: String::new(),
            marks: StartMarks::default(),
            containers: BTreeMap::new(),
            reason: None,
        }
    }
}

impl Pod {
    /// Asks the machine for its numbers; `None` if it does not run or does not answer.
    pub async fn machine_status(&self) -> Option<StatusResponse> {
        if !matches!(self.phase(), Phase::Running { .. }) {
            return None;
        }
        let status = match self.control.status().await {
            Ok(status) => status,
            Err(error) => {
                tracing::debug!(pod = self.id(), %error, "the machine tells no numbers");
                return None;
            }
        };
        if let Some(boot) = status.boot.as_ref() {
            // They do not change.
            let _ = self.boot_times.set(boot.clone());
        }
        Some(status)
    }

    /// How long its start took, once it is over and the machine has told its part.
    pub fn timeline(&self) -> Option<PodTimeline> {
        let marks = self.status.borrow().marks;
        let boot = self.boot_times.get()?;
        (marks.end > 0).then(|| PodTimeline::new(&marks, boot))
    }
}
