//! The boot timeline: how long each phase of a pod's and of its containers' start took.
//!
//! Points in time are nanoseconds on the host's `CLOCK_MONOTONIC`, which the machine uses too.

use std::collections::BTreeMap;

use pericarp_protos::vmm::BootTimes;
use serde::{Deserialize, Serialize};

/// Containers whose times are kept, per pod; a guest cannot make the controller grow without bound.
const CONTAINERS_KEPT: usize = 256;

/// When the controller's steps of one pod's start happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// `Start` was called.
    pub called_ns: u64,
    /// The machine's process is about to be made.
    pub spawn_ns: u64,
    /// The agent's `Ready` arrived.
    pub ready_ns: u64,
    /// How long the agent had run by then, on the guest's clock.
    pub since_init_ns: u64,
    /// `Configure` was answered.
    pub configured_ns: u64,
    /// `Start` is about to be answered.
    pub done_ns: u64,
}

/// How long each phase took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// Directory, sockets, share and cgroup.
    pub prepare_us: u64,
    /// Until the machine's process runs.
    pub vmm_spawn_us: u64,
    /// Until VM, memory and devices exist.
    pub kvm_setup_us: u64,
    /// Until kernel and initramfs are in guest memory.
    pub kernel_load_us: u64,
    /// Until the first vCPU is about to run.
    pub vcpu_start_us: u64,
    /// From there to the agent's first instruction.
    pub kernel_to_init_us: u64,
    /// From there until the agent says that it is ready.
    pub agent_ready_us: u64,
    /// Until the agent has been told what pod it is.
    pub configure_us: u64,
    /// From the call of `Start` to its answer.
    pub total_us: u64,
}

impl Phases {
    /// Puts the controller's and the machine's clocks together.
    pub fn new(steps: &Steps, boot: &BootTimes) -> Phases {
        let between = |from: u64, to: u64| to.saturating_sub(from) / 1000;
        // The guest says how long it ran; it cannot have run longer than its vCPUs.
        let running = steps.ready_ns.saturating_sub(boot.vcpus_started_ns);
        let since_init = steps.since_init_ns.min(running);
        Phases {
            prepare_us: between(steps.called_ns, steps.spawn_ns),
            vmm_spawn_us: between(steps.spawn_ns, boot.process_start_ns),
            kvm_setup_us: between(boot.process_start_ns, boot.kvm_ready_ns),
            kernel_load_us: between(boot.kvm_ready_ns, boot.kernel_loaded_ns),
            vcpu_start_us: between(boot.kernel_loaded_ns, boot.vcpus_started_ns),
            kernel_to_init_us: (running - since_init) / 1000,
            agent_ready_us: since_init / 1000,
            configure_us: between(steps.ready_ns, steps.configured_ns),
            total_us: between(steps.called_ns, steps.done_ns),
        }
    }
}

/// How long each phase of a container's start took, in microseconds; absent until it is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPhases {
    /// Look-up in containerd, mounts and translation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare_us: Option<u64>,
    /// The agent's part of `Create`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub create_us: Option<u64>,
    /// The agent's part of `Start`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_us: Option<u64>,
}

/// The times of a pod's containers, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Containers(BTreeMap<String, ContainerPhases>);

impl Containers {
    /// The entry of a container that the pod really has; `None` when there are too many.
    pub fn entry(&mut self, id: &str) -> Option<&mut ContainerPhases> {
        if !self.0.contains_key(id) && self.0.len() >= CONTAINERS_KEPT {
            return None;
        }
        Some(self.0.entry(id.to_owned()).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn boot() -> BootTimes {
        BootTimes {
            process_start_ns: 12 * MS,
            kvm_ready_ns: 20 * MS,
            kernel_loaded_ns: 25 * MS,
            vcpus_started_ns: 26 * MS,
            ..Default::default()
        }
    }

    fn steps() -> Steps {
        Steps {
            called_ns: 5 * MS,
            spawn_ns: 10 * MS,
            ready_ns: 126 * MS,
            since_init_ns: 30 * MS,
            configured_ns: 130 * MS,
            done_ns: 131 * MS,
        }
    }

    #[test]
    fn the_phases_add_up_to_the_total() {
        let phases = Phases::new(&steps(), &boot());
        assert_eq!(phases.kernel_to_init_us, 70_000);
        assert_eq!(phases.agent_ready_us, 30_000);
        let sum = phases.prepare_us
            + phases.vmm_spawn_us
            + phases.kvm_setup_us
            + phases.kernel_load_us
            + phases.vcpu_start_us
            + phases.kernel_to_init_us
            + phases.agent_ready_us
            + phases.configure_us;
        // The answer itself takes the last millisecond.
        assert_eq!(sum + 1000, phases.total_us);
    }

    #[test]
    fn a_guest_that_lies_about_its_clock_changes_only_its_own_phases() {
        let phases = Phases::new(&Steps { since_init_ns: u64::MAX, ..steps() }, &boot());
        assert_eq!((phases.kernel_to_init_us, phases.agent_ready_us), (0, 100_000));
    }

    #[test]
    fn the_number_of_containers_kept_is_bounded() {
        let mut containers = Containers::default();
        for number in 0..CONTAINERS_KEPT {
            assert!(containers.entry(&number.to_string()).is_some());
        }
        assert!(containers.entry("one more").is_none());
        assert!(containers.entry("0").is_some());
    }
}
