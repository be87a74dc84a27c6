//! How long each phase of a start took, as the controller reports it in verbose `PodSandboxStatus`.

use anyhow::{Context, Result};
use serde_json::Value;

/// The phases of a pod's start with their durations in milliseconds, in the order in which they happen.
pub fn boot_timeline(info: &Value) -> Result<Vec<(String, f64)>> {
    const ORDER: [&str; 9] = [
        "queued",
        "network",
        "vmmSpawn",
        "kvmSetup",
        "kernelLoad",
        "kernelToInit",
        "agentReady",
        "configure",
        "total",
    ];
    phases(&info["pericarp"]["bootTimeline"], &ORDER).with_context(|| format!("bootTimeline of {info}"))
}

/// The phases of a container's start with their durations in milliseconds, in the order in which they happen.
pub fn container_timeline(info: &Value, id: &str) -> Result<Vec<(String, f64)>> {
    phases(&info["pericarp"]["containers"][id], &["prepare", "create", "start"])
        .with_context(|| format!("timeline of container {id} in {info}"))
}

fn phases(timeline: &Value, order: &[&str]) -> Result<Vec<(String, f64)>> {
    let phase = |name: &&str| {
        let milliseconds = timeline[name].as_f64().with_context(|| format!("no {name} in {timeline}"))?;
        Ok(((*name).to_owned(), milliseconds))
    };
    order.iter().map(phase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_come_in_the_order_in_which_they_happen() {
        let timeline = serde_json::json!({"total": 8, "configure": 7, "agentReady": 6, "kernelToInit": 5,
            "kernelLoad": 4, "kvmSetup": 3, "vmmSpawn": 2, "network": 1, "queued": 0});
        let info = serde_json::json!({"pericarp": {"bootTimeline": timeline}});
        let timeline = boot_timeline(&info).unwrap();
        assert_eq!(
            timeline.iter().map(|(_, time)| *time).collect::<Vec<_>>(),
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        );
    }
}
