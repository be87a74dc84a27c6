//! The controller is killed in the middle of an operation, which the next one finishes or undoes.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pericarp_tests::{
    Node, Pod,
    node::{
        controller::{KilledController, NODE_RUN_DIR, pod_directories},
        machine::MachineProcess,
        process,
    },
    on_pericarp_alone, wait_until,
};

use super::{clean_up, remains, wait_until_ready};
use crate::machine::disks::disks_of;

/// Fault points of a pod's start before containerd has had a response.
pub(super) const OF_START: [&str; 8] = [
    "directory-made",
    "pod-recorded-first",
    "network-made",
    "machine-spawned",
    "record-written",
    "machine-recorded",
    "guest-ready",
    "pod-recorded",
];

/// Steps of `StopPodSandbox`, in their order.
pub(super) const OF_STOP: [&str; 3] = ["undo-machine", "undo-cgroup", "undo-network"];

/// Steps of `RemovePodSandbox` after that.
pub(super) const OF_REMOVAL: [&str; 2] = ["undo-directory", "pod-removed"];

/// The names of the pods' directories.
fn directories() -> Result<Vec<String>> {
    pod_directories(Path::new(NODE_RUN_DIR))
}

#[test]
fn a_pod_whose_start_was_cut_off_is_undone() -> Result<()> {
    on_pericarp_alone(async |node| {
        let bystander = node.pod("bystander").run().await?;
        let before = directories()?;
        for point in OF_START {
            let pending_kill = KilledController::kill_at(point)?;
            let name = point.to_lowercase();
            let error =
                node.pod(&name).try_run().await?.err().with_context(|| format!("{point}: it started"))?;
            pending_kill.wait_for_death().await?.restart().await?;
            wait_until_ready(&bystander).await.with_context(|| format!("after {point}: {error}"))?;
            // containerd knows of no pod, so the controller must not either; what it has to ask containerd for takes
            // time.
            for pod in node.pods().await?.iter().filter(|pod| pod.id != bystander.id) {
                clean_up(node, &pod.id).await.with_context(|| format!("after {point}"))?;
            }
            wait_until("the pod's directory to go", async || Ok(directories()? == before))
                .await
                .with_context(|| format!("after {point}: {error}"))?;
        }
        // Kubelet tries again with the same name.
        node.pod(OF_START[0]).run().await?;
        Ok(())
    })
}

#[test]
fn a_pod_whose_end_was_cut_off_is_finished() -> Result<()> {
    on_pericarp_alone(async |node| {
        for (point, removes) in
            OF_STOP.map(|point| (point, false)).into_iter().chain(OF_REMOVAL.map(|point| (point, true)))
        {
            let name: String = point.chars().filter(char::is_ascii_alphabetic).take(20).collect();
            let pod = node.pod(&name.to_lowercase()).run().await?;
            if removes {
                pod.stop().await?;
            } else {
                pod.idle_container("idle").await?;
            }
            let pending_kill = KilledController::kill_at(point)?;
            let cut_off = if removes { pod.remove().await } else { pod.stop().await };
            pending_kill
                .wait_for_death()
                .await
                .with_context(|| format!("{point}: {cut_off:?}"))?
                .restart()
                .await?;
            clean_up(node, &pod.id).await.with_context(|| format!("after {point}: {cut_off:?}"))?;
            assert_eq!(remains(&pod.id)?, Vec::<String>::new(), "after {point}");
            assert_eq!(pod.status().await?, None, "after {point}");
        }
        Ok(())
    })
}

#[test]
fn a_container_whose_start_or_end_was_cut_off_can_be_tried_again() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("again").run().await?;
        for (number, point) in ["container-looked-up", "container-prepared"].into_iter().enumerate() {
            let container = pod.container(&format!("start-{number}")).create().await?;
            let pending_kill = KilledController::kill_at(point)?;
            let started = container.try_start().await;
            pending_kill.wait_for_death().await?.restart().await?;
            wait_until_ready(&pod).await?;
            if started.is_err() {
                // Kubelet makes a new one.
                container.remove().await?;
                let again = pod.idle_container(&format!("again-{number}")).await?;
                assert_eq!(again.shell("echo alive").await?, "alive");
                again.stop(0).await?;
            } else {
                assert_eq!(container.shell("echo alive").await?, "alive");
                container.stop(0).await?;
            }
        }
        for (number, point) in ["event-handed-on", "container-released"].into_iter().enumerate() {
            let container = pod.idle_container(&format!("end-{number}")).await?;
            let pending_kill = KilledController::kill_at(point)?;
            let _ = container.stop(0).await;
            pending_kill.wait_for_death().await?.restart().await?;
            wait_until_ready(&pod).await?;
            container.stop(0).await?;
            container.remove().await?;
            wait_until_released(&pod, &container.id).await?;
        }
        Ok(())
    })
}

/// Whether something of a container is mounted for its guest.
fn is_prepared(pod: &Pod, container: &str) -> Result<bool> {
    let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
    Ok(machine.mounts()?.lines().any(|line| line.contains("/share/") && line.contains(container)))
}

/// Waits until nothing of a container is mounted for its guest.
async fn wait_until_released(pod: &Pod, container: &str) -> Result<()> {
    wait_until("the container's mounts to go", async || Ok(!is_prepared(pod, container)?)).await
}

#[test]
fn a_container_that_was_deleted_while_no_controller_ran_is_released() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("deleted").run().await?;
        let other = pod.idle_container("other").await?;
        // Its guest never hears of it, so that nobody but containerd can tell of its end.
        let container = pod.container("never-started").create().await?;
        wait_until("it to be prepared", async || is_prepared(&pod, &container.id)).await?;
        let killed = KilledController::kill()?;
        container.remove().await?;
        killed.restart().await?;
        wait_until_released(&pod, &container.id).await?;
        assert!(is_prepared(&pod, &other.id)?, "one that was not deleted has lost its files");
        assert_eq!(other.shell("echo alive").await?, "alive");
        Ok(())
    })
}

#[test]
fn a_disk_that_was_inserted_when_the_controller_was_killed_is_taken_out() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.with_erofs().pod("disk").run().await?;
        let pending_kill = KilledController::kill_at("disk-inserted")?;
        let container = pod.container("cut-off").create().await?;
        let killed = pending_kill.wait_for_death().await?;
        // Nobody asks for its disk again.
        container.remove().await?;
        killed.restart().await?;
        wait_until_ready(&pod).await?;
        wait_until("the disk to be taken out", async || Ok(disks_of(&pod).await? == 0)).await?;
        let again = pod.idle_container("again").await?;
        assert_eq!(again.shell("echo alive").await?, "alive");
        assert_eq!(disks_of(&pod).await?, 1);
        Ok(())
    })
}

#[test]
fn a_controller_that_is_killed_while_it_takes_pods_over_is_followed_by_one_that_does() -> Result<()> {
    on_pericarp_alone(async |node: &Node| {
        let pods = [node.pod("first").run().await?, node.pod("second").run().await?];
        let container = pods[1].idle_container("idle").await?;
        let killed = KilledController::kill()?;
        let file = PathBuf::from(std::env::var_os("PERICARP_FAULT_FILE").context("the fault file")?);
        std::fs::write(&file, "adopting")?;
        // The next one dies as soon as it has found a pod.
        drop(killed);
        wait_until("its death", async || Ok(!file.exists() && process::controller_pid().is_err())).await?;
        KilledController::already_dead().restart().await?;
        for pod in &pods {
            wait_until_ready(pod).await?;
            assert!(MachineProcess::of_pod(&pod.id)?.is_some());
        }
        assert_eq!(container.shell("echo alive").await?, "alive");
        Ok(())
    })
}
