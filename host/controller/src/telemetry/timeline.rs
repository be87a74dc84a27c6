//! The boot timeline: how long each phase of a pod's and of its containers' start took.

use pericarp_protos::vmm::BootTimes;
use serde::Serialize;

/// When the steps of a pod's start that the controller sees happened: nanoseconds on the host's
/// `CLOCK_MONOTONIC`, which the machine uses too.
#[derive(Clone, Copy, Debug, Default)]
pub struct StartMarks {
    /// `Start` was called.
    pub start: u64,
    /// It was the pod's turn to boot.
    pub queued: u64,
    /// The pod's network leads to taps, and all else that its machine needs on the host is there.
    pub network: u64,
    /// The agent's `Ready` arrived.
    pub ready: u64,
    /// How long the agent had run by then, on the guest's clock.
    pub since_init: u64,
    /// `Configure` was answered.
    pub configured: u64,
    /// `Start` is about to be answered.
    pub end: u64,
}

/// How long each phase of a pod's start took, in milliseconds. Except for the answer itself, they add up
/// to the total.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PodTimeline {
    /// Waiting for other pods to boot.
    pub queued: f64,
    /// Reading the pod's network and leading it to taps; directory, sockets, share and cgroup meanwhile.
    pub network: f64,
    /// From there until the machine's process runs.
    pub vmm_spawn: f64,
    /// Until the VM, its memory and its devices exist.
    pub kvm_setup: f64,
    /// Until kernel and initramfs are in guest memory and the first vCPU is about to run.
    pub kernel_load: f64,
    /// From there to the agent's first instruction.
    pub kernel_to_init: f64,
    /// From there until the agent says that it is ready.
    pub agent_ready: f64,
    /// Until the agent has made the guest into the pod.
    pub configure: f64,
    /// From the call of `Start` to its answer.
    pub total: f64,
}

impl PodTimeline {
    /// Puts what the controller and what the machine saw together.
    pub fn new(marks: &StartMarks, boot: &BootTimes) -> PodTimeline {
        // The guest says how long it ran; it cannot have run longer than its vCPUs.
        let running = marks.ready.saturating_sub(boot.vcpus_started_ns);
        let since_init = marks.since_init.min(running);
        PodTimeline {
            queued: between(marks.start, marks.queued),
            network: between(marks.queued, marks.network),
            vmm_spawn: between(marks.network, boot.process_start_ns),
            kvm_setup: between(boot.process_start_ns, boot.kvm_ready_ns),
            kernel_load: between(boot.kvm_ready_ns, boot.vcpus_started_ns),
            kernel_to_init: milliseconds(running - since_init),
            agent_ready: milliseconds(since_init),
            configure: between(marks.ready, marks.configured),
            total: between(marks.start, marks.end),
        }
    }
}

fn between(from: u64, to: u64) -> f64 {
    milliseconds(to.saturating_sub(from))
}

/// Nanoseconds as milliseconds, to the microsecond.
pub fn milliseconds(nanoseconds: u64) -> f64 {
    // A phase of more than u32::MAX microseconds is over an hour long: no guest gets that far.
    f64::from(u32::try_from(nanoseconds / 1000).unwrap_or(u32::MAX)) / 1000.0
}

/// How long each phase of a container's start took, in milliseconds; absent until it is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ContainerTimeline {
    /// Look-up in containerd, mounts and translation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare: Option<f64>,
    /// The agent's part of `Create`, without the wait for `prepare`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub create: Option<f64>,
    /// The agent's part of `Start`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start: Option<f64>,
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

    fn marks() -> StartMarks {
        StartMarks {
            start: 3 * MS,
            queued: 5 * MS,
            network: 8 * MS,
            ready: 126 * MS,
            since_init: 30 * MS,
            configured: 130 * MS,
            end: 131 * MS,
        }
    }

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 0.001
    }

    #[test]
    fn the_phases_add_up_to_the_total() {
        let timeline = PodTimeline::new(&marks(), &boot());
        assert!(close(timeline.kernel_to_init, 70.0) && close(timeline.agent_ready, 30.0), "{timeline:?}");
        assert!(close(timeline.network, 3.0) && close(timeline.vmm_spawn, 4.0), "{timeline:?}");
        let sum = timeline.queued
            + timeline.network
            + timeline.vmm_spawn
            + timeline.kvm_setup
            + timeline.kernel_load
            + timeline.kernel_to_init
            + timeline.agent_ready
            + timeline.configure;
        // The answer itself takes the last millisecond.
        assert!(close(sum + 1.0, timeline.total), "{timeline:?}");
    }

    #[test]
    fn a_guest_that_lies_about_its_clock_changes_only_its_own_phases() {
        let timeline = PodTimeline::new(&StartMarks { since_init: u64::MAX, ..marks() }, &boot());
        assert!(close(timeline.kernel_to_init, 0.0) && close(timeline.agent_ready, 100.0), "{timeline:?}");
        assert!(close(timeline.vmm_spawn, 4.0), "{timeline:?}");
    }

    #[test]
    fn an_absurd_duration_is_cut_off() {
        assert!(milliseconds(u64::MAX) < 5_000_000.0);
    }
}
