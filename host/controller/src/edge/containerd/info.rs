//! What `crictl inspectp` prints of a pod.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::{
    pod::{Pod, life::Phase},
    telemetry::counters,
};

/// Two entries: one with the keys that containerd's own sandboxes have (`podsandbox`, `SandboxInfo`), which containerd
/// 2.3 writes anew with what it knows itself, and one with what belongs to Pericarp.
pub async fn of_pod(pod: &Pod) -> HashMap<String, String> {
    let machine = pod.machine_status().await;
    let status = pod.status();
    let (pid, process_status) = match status.phase {
        Phase::Running { pid } => (pid, "running"),
        Phase::Created | Phase::Starting | Phase::Ended => (0, "stopped"),
    };
    let sandbox = json!({
        "pid": pid,
        "processStatus": process_status,
        "netNamespaceClosed": pod.spec().is_netns_closed(),
        "runtimeHandler": "pericarp",
        "runtimeType": "io.containerd.pericarp.v1",
        "runtimeOptions": null,
        "config": pod.spec().request,
        "runtimeSpec": null,
    });
    let devices = machine.as_ref().map(|machine| {
        let counters =
            |device: &pericarp_protos::vmm::DeviceCounters| (device.device.clone(), json!(device.counters));
        machine.devices.iter().map(counters).collect::<Map<_, Value>>()
    });
    let pericarp = json!({
        "directory": pod.directory(),
        "vcpus": status.size.vcpus,
        "memoryMib": status.size.memory_mib,
        "residentBytes": machine.as_ref().map(|machine| machine.resident_bytes),
        "devices": devices,
        "netns": pod.spec().netns,
        "interfaces": status.interfaces,
        "portForward": status.port_forward,
        "guestKernel": status.guest_kernel,
        "bootTimeline": pod.timeline(),
        "containers": status.containers,
        "owned": status.owned,
        "reason": status.reason,
        // Not of this pod: those of all pods since the controller was started.
        "machinesEndedByFilter": counters::MACHINES_ENDED_BY_FILTER.get(),
    });
    HashMap::from([("info".to_owned(), sandbox.to_string()), ("pericarp".to_owned(), pericarp.to_string())])
}
