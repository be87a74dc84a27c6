//! A pod's numbers for containerd, which from 2.4 on makes CRI's pod statistics of them.

use std::time::SystemTime;

use containerd_shim_protos::protobuf::Message as _;
use pericarp_cgroup_stats::{METRICS_TYPE, Metrics};
use pericarp_protos::sandbox::types::Metric;
use prost_types::Any;

use crate::pod::Pod;

/// A pod's numbers. One without numbers, as it is being made, has ended, or is on a host without cgroup v2, has an
/// empty message: an error would fail the statistics of the whole node (containerd: `ListPodSandboxStats`).
pub async fn of_pod(pod: &Pod) -> Metric {
    let metrics = match pod.status().owned.cgroup() {
        Some(cgroup) => pod.read_blocking(move || pericarp_cgroup_stats::read(&cgroup)).await,
        None => Metrics::new(),
    };
    // Only a message with required fields can fail to be encoded, and this one has none.
    let value = metrics.write_to_bytes().unwrap_or_default();
    Metric {
        timestamp: Some(SystemTime::now().into()),
        id: pod.id().to_owned(),
        data: Some(Any { type_url: METRICS_TYPE.to_owned(), value }),
    }
}
