//! A client gives up in the middle of something: that is finished or undone, and nothing else notices.

use std::path::Path;

use anyhow::{Context, Result};
use pericarp_tests::{
    Pod,
    node::{
        controller::{HeldController, NODE_RUN_DIR, pod_directories},
        machine::MachineProcess,
    },
    on_pericarp_alone, wait_until,
};

use super::{
    clean_up,
    faults::{OF_REMOVAL, OF_START, OF_STOP},
    remains, wait_until_ready,
};

/// Begins something, and gives it up when the controller has reached a point of it.
async fn give_up_at<T>(point: &str, call: impl Future<Output = T>) -> Result<()> {
    let held = HeldController::hold_at(point)?;
    tokio::select! {
        _ = call => anyhow::bail!("{point} was not reached"),
        held = held.wait_until_held() => held?,
    }
    // The call has been dropped, and with it its connection's stream; now the controller goes on.
    drop(held);
    Ok(())
}

/// What the node has of pods, apart from one.
fn directories_except(pod: &Pod) -> Result<Vec<String>> {
    let mut directories = pod_directories(Path::new(NODE_RUN_DIR))?;
    directories.retain(|name| *name != pod.id);
    Ok(directories)
}

#[test]
fn a_pod_whose_client_gives_up_its_start_leaves_nothing_behind() -> Result<()> {
    on_pericarp_alone(async |node| {
        let bystander = node.pod("bystander").run().await?;
        let idle = bystander.idle_container("idle").await?;
        for point in OF_START {
            give_up_at(point, node.pod(&point.to_lowercase()).try_run()).await?;
            // containerd may keep it as a pod of unknown state, which kubelet removes.
            for pod in node.pods().await?.iter().filter(|pod| pod.id != bystander.id) {
                clean_up(node, &pod.id).await.with_context(|| format!("after {point}"))?;
            }
            wait_until("the pod's directory to go", async || Ok(directories_except(&bystander)?.is_empty()))
                .await
                .with_context(|| format!("after {point}"))?;
            let machines = MachineProcess::all()?;
            assert_eq!(machines.len(), 1, "after {point}: {machines:?}");
            wait_until_ready(&bystander).await?;
            assert_eq!(idle.shell("echo alive").await?, "alive", "after {point}");
        }
        // Kubelet tries again with the same name.
        node.pod(OF_START[0]).run().await?;
        Ok(())
    })
}

#[test]
fn a_pod_whose_client_gives_up_its_end_is_ended_nonetheless() -> Result<()> {
    on_pericarp_alone(async |node| {
        for (point, removes) in
            OF_STOP.map(|point| (point, false)).into_iter().chain(OF_REMOVAL.map(|point| (point, true)))
        {
            let name: String = point.chars().filter(char::is_ascii_alphabetic).collect();
            let pod = node.pod(&name).run().await?;
            if removes {
                pod.stop().await?;
                give_up_at(point, pod.remove()).await?;
            } else {
                pod.idle_container("idle").await?;
                give_up_at(point, pod.stop()).await?;
            }
            wait_until("its machine to end", async || Ok(MachineProcess::of_pod(&pod.id)?.is_none()))
                .await
                .with_context(|| format!("after {point}"))?;
            clean_up(node, &pod.id).await.with_context(|| format!("after {point}"))?;
            assert_eq!(remains(&pod.id)?, Vec::<String>::new(), "after {point}");
            assert_eq!(pod.status().await?, None, "after {point}");
        }
        Ok(())
    })
}

#[test]
fn a_container_whose_client_gives_up_its_start_can_be_removed_and_its_pod_goes_on() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("goes-on").run().await?;
        for point in ["container-looked-up", "container-prepared"] {
            let container = pod.container(point).create().await?;
            give_up_at(point, container.try_start()).await?;
            wait_until("the container's removal", async || {
                // Until the guest has made it, containerd says that it is starting.
                Ok(container.stop(0).await.is_ok() && container.remove().await.is_ok())
            })
            .await
            .with_context(|| format!("after {point}"))?;
            let again = pod.idle_container(&format!("{point}-again")).await?;
            assert_eq!(again.shell("echo alive").await?, "alive", "after {point}");
            again.stop(0).await?;
        }
        Ok(())
    })
}
