//! containerd is stopped and started again.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use pericarp_protos::protobuf::Message;
use pericarp_tests::{
    Container, Runtime, api,
    node::{containerd::StoppedContainerd, machine::MachineProcess},
    on_node_alone, on_pericarp, on_pericarp_alone, wait_until,
};
use rustix::process::Signal;
use tokio::process::Command;

use super::{CountingLog, clean_up, remains, wait_until_not_ready, wait_until_ready};

/// The number of lines that may be on their way to a containerd that dies: those of one second.
const LINES_LOST_MAX: usize = 20;

/// The last number in the log of a container that counts. No number may come twice, and none may be missing except
/// those that were on their way to a containerd that died.
fn counted(container: &Container) -> Result<usize> {
    let CountingLog { next, gaps } = CountingLog::of(container)?;
    ensure!(gaps.len() <= 1 && gaps.iter().all(|gap| *gap <= LINES_LOST_MAX), "lines are missing: {gaps:?}");
    Ok(next)
}

#[test]
fn tasks_are_found_again_when_containerd_was_away() -> Result<()> {
    on_node_alone(async |node| {
        for signal in [Signal::TERM, Signal::KILL] {
            let pod = node.pod(&format!("away-{}", signal.as_raw())).run().await?;
            let counter = pod
                .container("counter")
                .script(
                    "i=0; while [ ! -e /dev/shm/end ]; do echo $i; i=$((i + 1)); sleep 0.05; done; exit 5",
                )
                .start()
                .await?;
            let signs = node.directory_for(&format!("signs-{}", signal.as_raw()))?;
            let ends = pod
                .container("ends")
                .mount(&signs, "/signs", false)
                .script("until [ -e /signs/go ]; do sleep 0.1; done; echo gone; touch /signs/gone; exit 7")
                .start()
                .await?;
            let idle = pod.idle_container("idle").await?;
            let before = counted(&counter)?;
            let stopped = StoppedContainerd::stop(signal).await?;
            // The container exits while there is no containerd to hear of it.
            fs::write(format!("{signs}/go"), "")?;
            wait_until("the container's last act", async || Ok(Path::new(&signs).join("gone").exists()))
                .await?;
            stopped.restart(node).await?;
            wait_until_ready(&pod).await?;

            // containerd 2.1 takes runc's for a task that was never made, and deletes it.
            let code = if node.runtime == Runtime::Runc { 255 } else { 7 };
            assert_eq!(ends.wait_for_exit().await?.exit_code, code);
            assert_eq!(idle.shell("echo alive").await?, "alive");
            for container in [&counter, &idle] {
                assert_eq!(container.status().await?.state(), api::ContainerState::ContainerRunning);
            }
            wait_until("a hundred more lines", async || Ok(counted(&counter)? >= before + 100)).await?;
            idle.shell("touch /dev/shm/end").await?;
            assert_eq!(counter.wait_for_exit().await?.exit_code, 5);
            counted(&counter)?;
            assert_eq!(ends.log()?.stdout(), "gone\n");
            pod.container("new").command(["true"]).run().await?;
            clean_up(node, &pod.id).await?;
            if node.runtime == Runtime::Pericarp {
                assert_eq!(remains(&pod.id)?, Vec::<String>::new());
            }
        }
        Ok(())
    })
}

#[test]
fn a_machine_that_ends_while_containerd_is_away_is_cleaned_up() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("gone").run().await?;
        let container = pod.idle_container("idle").await?;
        let other = node.pod("other").run().await?;
        let others = other.idle_container("idle").await?;
        let stopped = StoppedContainerd::stop(Signal::KILL).await?;
        MachineProcess::of_pod(&pod.id)?.context("a machine")?.kill()?;
        stopped.restart(node).await?;
        wait_until_not_ready(&pod).await?;
        wait_until_ready(&other).await?;
        assert_ne!(container.wait_for_exit().await?.exit_code, 0);
        assert_eq!(others.shell("echo alive").await?, "alive");
        // What containerd had of the task was removed by the one-shot `delete`.
        let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{}", container.id);
        assert!(!Path::new(&bundle).exists(), "{bundle} is there still");
        clean_up(node, &pod.id).await?;
        assert_eq!(remains(&pod.id)?, Vec::<String>::new());

        // This connection was made by the new containerd, which deletes what is at its end.
        MachineProcess::of_pod(&other.id)?.context("a machine")?.kill()?;
        wait_until_not_ready(&other).await?;
        assert_ne!(others.wait_for_exit().await?.exit_code, 0);
        clean_up(node, &other.id).await
    })
}

#[test]
fn a_container_that_containerd_has_given_up_is_ended_by_the_one_shot_delete() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("given-up").run().await?;
        let container = pod.idle_container("idle").await?;
        let other = pod.idle_container("other").await?;
        let bundle = format!("/run/containerd/io.containerd.runtime.v2.task/k8s.io/{}", container.id);
        let delete = || {
            Command::new("containerd-shim-pericarp-v1")
                .args(["-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock"])
                .args(["-id", &container.id, "-bundle", &bundle, "delete"])
                .output()
        };
        let output = delete().await?;
        ensure!(output.status.success(), "{output:?}");
        let answer = DeleteResponse::parse_from_bytes(&output.stdout)?;
        assert_eq!(answer.exit_status, 137);
        assert!(answer.exited_at.seconds > 0);
        assert_eq!(container.wait_for_exit().await?.exit_code, 137);
        assert_eq!(other.shell("echo alive").await?, "alive");
        container.remove().await?;
        // Its bundle is containerd's, which has removed it.
        let output = delete().await?;
        assert!(String::from_utf8_lossy(&output.stderr).contains("no pod is known"), "{output:?}");
        Ok(())
    })
}
