//! Figures of a run: what verbose status tells about a pod's start, and statistics over many pods.

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// The phases of a pod's start as the controller measured them, in milliseconds, in the order in which they happen.
pub fn boot_timeline(info: &Value) -> Result<Vec<(String, f64)>> {
    const ORDER: [&str; 8] =
        ["network", "vmmSpawn", "kvmSetup", "kernelLoad", "kernelToInit", "agentReady", "configure", "total"];
    phases(&info["pericarp"]["bootTimeline"], &ORDER).with_context(|| format!("bootTimeline of {info}"))
}

/// The phases of a container's start, in milliseconds.
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

/// Median, 95th percentile and count of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the values are not above it.
    pub p50: f64,
    /// 95 of 100 values are not above it.
    pub p95: f64,
    /// How many values there were.
    pub count: usize,
}

impl Summary {
    /// Sums values up; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        // Nearest rank: always a value that was measured.
        let rank =
            |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { p50: rank(50)?, p95: rank(95)?, count: sorted.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let values: Vec<f64> = (1..=20).rev().map(f64::from).collect();
        assert_eq!(Summary::of(&values), Some(Summary { p50: 10.0, p95: 19.0, count: 20 }));
        assert_eq!(Summary::of(&[7.0]), Some(Summary { p50: 7.0, p95: 7.0, count: 1 }));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn phases_come_in_the_order_in_which_they_happen() {
        let timeline = serde_json::json!({"total": 8, "configure": 7, "agentReady": 6, "kernelToInit": 5,
            "kernelLoad": 4, "kvmSetup": 3, "vmmSpawn": 2, "network": 1});
        let info = serde_json::json!({"pericarp": {"bootTimeline": timeline}});
        let timeline = boot_timeline(&info).unwrap();
        assert_eq!(
            timeline.iter().map(|(_, time)| *time).collect::<Vec<_>>(),
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
        );
    }
}
