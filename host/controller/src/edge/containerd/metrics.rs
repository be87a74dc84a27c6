//! A pod's numbers for containerd, which from 2.4 on makes CRI's pod statistics of them.

use std::time::SystemTime;

use pericarp_protos::sandbox::types::Metric;

use crate::{host::cgroup_stats::Metrics, pod::Pod};

/// A pod's numbers. One without numbers, as it is being made, has ended, or is on a host without cgroup v2, has an empty
/// message: an error would fail the statistics of the whole node (containerd: `ListPodSandboxStats`).
pub async fn of_pod(pod: &Pod) -> Metric {
    let metrics = match pod.status().owned.cgroup() {
        Some(cgroup) => pod.read_blocking(move || Metrics::read(&cgroup)).await,
        None => Metrics::default(),
    };
    Metric {
        timestamp: Some(SystemTime::now().into()),
        id: pod.id().to_owned(),
        data: Some(metrics.to_any()),
    }
}
