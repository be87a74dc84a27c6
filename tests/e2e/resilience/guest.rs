//! A machine or its guest dies.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::{ControllerStatusRequest, ControllerWaitRequest};
use pericarp_tests::{
    Container, HANG_LIMIT, Node, Pod,
    controller::{Controller, NetworkNamespace, pod_config},
    machine::MachineProcess,
    on_pericarp,
};
use rustix::process::Signal;

use super::{clean_up, not_ready, remains};

/// A pod in which a container may do anything, and that container.
async fn privileged(node: &Node, name: &str) -> Result<(Pod, Container)> {
    let pod = node
        .pod(name)
        .with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true)
        .run()
        .await?;
    let container = pod.container("privileged").with_security(|security| {
        security.privileged = true;
        security.masked_paths.clear();
        security.readonly_paths.clear();
    });
    let container = container.start().await?;
    Ok((pod, container))
}

/// What must hold once a pod's guest has died: it is told at once with the reason, its containers have exited, a second
/// pod has noticed nothing, and clean-up works.
async fn has_died(node: &Node, pod: &Pod, container: &Container, reason: &str) -> Result<()> {
    not_ready(pod).await?;
    let status = container.exited().await?;
    ensure!(status.exit_code != 0, "{status:?}");
    let info = pod.info().await?;
    let told = info["pericarp"]["reason"].as_str().unwrap_or_default();
    ensure!(told.contains(reason), "{reason:?} is not in {told:?}");
    let begun = Instant::now();
    ensure!(container.exec(["true"]).await.is_err(), "a command runs in a dead guest");
    ensure!(begun.elapsed() < Duration::from_secs(60), "a call hung for {:?}", begun.elapsed());
    clean_up(node, &pod.id).await?;
    let remains = remains(&pod.id)?;
    ensure!(remains.is_empty(), "{remains:?}");
    Ok(())
}

#[test]
fn a_killed_machine_is_told_at_once() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("killed").run().await?;
        let container = pod.idle_container("idle").await?;
        let machine = MachineProcess::of_pod(&pod.id)?.context("a machine")?;
        let begun = Instant::now();
        machine.kill()?;
        not_ready(&pod).await?;
        println!("NotReady after {:?}", begun.elapsed());
        // Much more than it takes, because this node does other things as well.
        assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
        has_died(node, &pod, &container, "Signal(9)").await
    })
}

#[test]
fn the_death_of_the_agent_is_the_guests_and_is_told_with_the_kernels_last_words() -> Result<()> {
    on_pericarp(async |node| {
        let (pod, container) = privileged(node, "agent").await?;
        // The kernel runs what core_pattern names in the guest itself, outside of any container: there, the agent's code
        // is overwritten. (No signal kills the first process of a guest.)
        container
            .shell(
                r#"cat > /overwrite << "end"
busybox=${0%/overwrite}/bin/busybox
start=$($busybox sed -n "s/-.* r-xp .*//p" /proc/1/maps | $busybox head -n 1)
$busybox dd if=/dev/zero of=/proc/1/mem conv=notrunc bs=4096 count=256 seek=$((0x$start / 4096))
end
echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/overwrite' > /proc/sys/kernel/core_pattern"#,
            )
            .await?;
        // It takes the command with it.
        let _ = container.try_exec(["sh", "-c", "kill -SEGV $$"], Duration::from_secs(30)).await;
        has_died(node, &pod, &container, "Attempted to kill init").await
    })
}

#[test]
fn a_kernel_that_panics_for_want_of_memory_is_told_so() -> Result<()> {
    on_pericarp(async |node| {
        let (pod, container) = privileged(node, "panic").await?;
        let bystander = node.pod("bystander").run().await?;
        container.shell("echo 2 > /proc/sys/vm/panic_on_oom").await?;
        let _ = container.try_exec(["tail", "/dev/zero"], Duration::from_secs(120)).await;
        has_died(node, &pod, &container, "ut of memory").await?;
        assert!(bystander.is_ready().await?);
        Ok(())
    })
}

#[test]
fn a_stuck_guest_is_ended_when_its_time_is_over() -> Result<()> {
    on_pericarp(async |node| {
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut controller =
            Controller::serve("ready_timeout_seconds = 90\nguest_timeout_seconds = 20").await?;
        let id = format!("{:0<64}", "stuck");
        let started = controller.start_pod(&id, &pod_config("stuck"), &netns).await?;
        // One that answers is left alone for longer than that.
        tokio::time::sleep(Duration::from_secs(25)).await;
        let status = ControllerStatusRequest { sandbox_id: id.clone(), verbose: true, ..Default::default() };
        assert_eq!(controller.client.status(status.clone()).await?.into_inner().state, "SANDBOX_READY");

        let machine = MachineProcess { pid: started.pid.try_into()? };
        let begun = Instant::now();
        machine.signal(Signal::STOP)?;
        let wait = ControllerWaitRequest { sandbox_id: id.clone(), ..Default::default() };
        let ended = tokio::time::timeout(HANG_LIMIT, controller.client.wait(wait)).await??;
        assert_eq!(ended.into_inner().exit_status, 137);
        assert!(begun.elapsed() >= Duration::from_secs(13), "it took only {:?}", begun.elapsed());
        let status = controller.client.status(status).await?.into_inner();
        assert_eq!(status.state, "SANDBOX_NOTREADY");
        let info: serde_json::Value = serde_json::from_str(&status.info["info"])?;
        let reason = info["pericarp"]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("no answer for 20 s"), "{info:#}");
        controller.shut_down_pod(&id).await?;
        assert_eq!(remains(&id)?, Vec::<String>::new());
        controller.stop().await?;
        netns.remove().await
    })
}
