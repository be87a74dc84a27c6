//! Nothing lost and nothing left behind, whoever dies.

mod containerd;
mod controller;
mod faults;
mod guest;
mod model;

mod node;
mod records;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{Container, Node, Pod, machine::MachineProcess, until};

/// A pod's directory.
fn directory(id: &str) -> PathBuf {
    PathBuf::from("/run/pericarp").join(id)
}

/// What of a pod is still there although it was removed.
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

/// Waits until a pod is no longer READY; it has as long as a kubelet would be patient.
async fn not_ready(pod: &Pod) -> Result<()> {
    becomes(pod, false).await
}

/// Waits until a pod is READY, in the eyes of a containerd that has to dial a new controller.
pub async fn ready(pod: &Pod) -> Result<()> {
    becomes(pod, true).await
}

async fn becomes(pod: &Pod, ready: bool) -> Result<()> {
    let what = format!("pod {} to be {}READY", pod.id, if ready { "" } else { "not " });
    // containerd takes its time to dial a new controller.
    until(&what, async || Ok(pod.is_ready().await? == ready)).await
}

/// What a container has written that counts from 0 on, a number a line.
struct Counted {
    /// The number that is to come.
    next: usize,
    /// How many are missing, at each place where some are. None has come twice.
    gaps: Vec<usize>,
}

impl Counted {
    fn by(container: &Container) -> Result<Self> {
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
    until("the pod's removal", async || node.remove_pod(pod).await.map(|()| true)).await?;
    node.remove_pod(pod).await
}
