//! Controllers, containerd, machines and guests die at any time, and nothing is lost or left behind.

mod cancellation;
mod containerd;
mod controller;
mod faults;
mod guest;
mod model;

mod node;
mod records;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{Container, Node, Pod, node::machine::MachineProcess, wait_until};

/// A pod's directory.
fn directory(id: &str) -> PathBuf {
    PathBuf::from("/run/pericarp").join(id)
}

/// What is left of a pod that was removed.
fn remains(id: &str) -> Result<Vec<String>> {
    let mut remains = Vec::new();
    if let Some(machine) = MachineProcess::of_pod(id)? {
        remains.push(format!("process {}", machine.pid));
    }
    if directory(id).exists() {
        remains.push(directory(id).display().to_string());
    }
    for line in fs::read_to_string("/proc/self/mountinfo")?.lines().filter(|line| line.contains(id)) {
        remains.push(format!("mount {line}"));
    }
    Ok(remains)
}

/// Waits until a pod is no longer READY.
async fn wait_until_not_ready(pod: &Pod) -> Result<()> {
    wait_for_readiness(pod, false).await
}

/// Waits until containerd, which may have to dial a new controller first, says that a pod is READY.
pub async fn wait_until_ready(pod: &Pod) -> Result<()> {
    wait_for_readiness(pod, true).await
}

async fn wait_for_readiness(pod: &Pod, ready: bool) -> Result<()> {
    let what = format!("pod {} to be {}READY", pod.id, if ready { "" } else { "not " });
    // containerd takes its time to dial a new controller.
    wait_until(&what, async || Ok(pod.is_ready().await? == ready)).await
}

/// The log of a container that counts from 0 on, a number a line.
struct CountingLog {
    /// The number after the last one.
    next: usize,
    /// The lengths of the gaps between the numbers.
    gaps: Vec<usize>,
}

impl CountingLog {
    fn of(container: &Container) -> Result<Self> {
        let mut counted = Self { next: 0, gaps: Vec::new() };
        for line in container.log()?.stdout().lines() {
            let number: usize = line.parse().with_context(|| format!("{line:?} in the log"))?;
            ensure!(line == number.to_string(), "{line:?} in the log");
            ensure!(number >= counted.next, "{number} in the place of {}", counted.next);
            if number > counted.next {
                counted.gaps.push(number - counted.next);
            }
            counted.next = number + 1;
        }
        Ok(counted)
    }
}

/// Stops and removes a pod as kubelet does: again and again until it is gone, and once more than needed.
async fn clean_up(node: &Node, pod: &str) -> Result<()> {
    wait_until("the pod's removal", async || node.remove_pod(pod).await.map(|()| true)).await?;
    node.remove_pod(pod).await
}
