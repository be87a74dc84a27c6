//! The order in which the host's kernel kills machines when it has no memory left (`oom_score_adj`, proc(5)).
//!
//! kubelet gives each container a number by the pod's class of service: -997 to all of a Guaranteed pod, 1000 to all of
//! a `BestEffort` one, and to those of a Burstable one 1000 less a thousandth for each thousandth of the node's memory
//! that they have requested (`pkg/kubelet/qos`, `GetContainerOOMScoreAdjust`). A machine holds all of a pod's
//! containers, and gets what kubelet would give one container with all of their requests.

use std::{fs, io, ops::RangeInclusive};

/// What the kernel takes.
const RANGE: RangeInclusive<i64> = -1000..=1000;
/// The number of a container that has requested nothing.
const NOTHING_REQUESTED: i64 = 1000;
/// The least that kubelet gives a container of a Burstable pod, however much it has requested.
const LEAST_OF_BURSTABLE: i64 = 2;

/// The machine's number for those of its containers; `None` if there are none.
pub fn of_machine(containers: impl IntoIterator<Item = i64>) -> Option<i64> {
    let containers: Vec<i64> = containers.into_iter().map(bounded).collect();
    let least = *containers.iter().min()?;
    // Kubelet gives it to none: to be spared altogether is asked for by name, and counts for all.
    if least <= 0 {
        return Some(least);
    }
    let requested: i64 = containers.iter().map(|number| NOTHING_REQUESTED - number).sum();
    Some((NOTHING_REQUESTED - requested).max(LEAST_OF_BURSTABLE.min(least)))
}

fn bounded(number: i64) -> i64 {
    number.clamp(*RANGE.start(), *RANGE.end())
}

/// Gives a process its number.
pub fn set(pid: u32, number: i64) -> io::Result<()> {
    fs::write(format!("/proc/{pid}/oom_score_adj"), number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_killed_as_a_container_with_all_requests_of_its_own_would_be() {
        for (class, containers, machine) in [
            ("nobody", &[][..], None),
            ("Guaranteed", &[-997, -997], Some(-997)),
            ("BestEffort", &[1000, 1000, 1000], Some(1000)),
            ("Burstable, one", &[750], Some(750)),
            ("Burstable, a quarter and a tenth of the node", &[750, 900], Some(650)),
            ("Burstable, one without a request", &[750, 1000], Some(750)),
            ("Burstable, more than the node has", &[300, 400], Some(2)),
            ("nobody asked", &[0, 0], Some(0)),
            ("one is spared", &[-998, 1000], Some(-998)),
            ("not a number of the kernel's", &[i64::MIN], Some(-1000)),
            ("nor this", &[i64::MAX], Some(1000)),
        ] {
            assert_eq!(of_machine(containers.iter().copied()), machine, "{class}");
        }
    }
}
