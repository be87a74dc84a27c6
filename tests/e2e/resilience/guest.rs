//! A machine or its guest dies.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::{ControllerStatusRequest, ControllerWaitRequest};
use pericarp_tests::{
    Container, HANG_LIMIT, Node, Pod,
    controller::{Controller, NetworkNamespace, pod_config},
    machine::MachineProcess,
    on_pericarp, until,
};
use rustix::process::Signal;

use super::{clean_up, not_ready, remains};
use crate::controller::archive;

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

/// In the place of an initramfs's `/init`: the agent, and beside it one that freezes the agent once somebody has connected to
/// port 7777. The kernel goes on, and with it everything that does not need PID 1.
const INIT_TO_BE_FROZEN: &str = r"#!/bin/busybox sh
busybox=/bin/busybox
$busybox mv /init /script
$busybox mv /agent /init
{
    echo obeyed | $busybox nc -l -p 7777
    $busybox mkdir /cgroups
    $busybox mount -t cgroup2 cgroup2 /cgroups
    $busybox mkdir /cgroups/frozen
    echo 1 > /cgroups/frozen/cgroup.procs
    echo 1 > /cgroups/frozen/cgroup.freeze
    until $busybox grep -q 'frozen 1' /cgroups/frozen/cgroup.events; do $busybox sleep 1; done
    echo 'the agent is frozen'
    $busybox sleep infinity
} > /dev/console 2>&1 &
exec /init
";

/// Guests whose agent freezes when it is told to.
struct Freezing {
    controller: Controller,
}

/// One of them.
struct FreezingPod {
    id: String,
    netns: NetworkNamespace,
    machine: MachineProcess,
}

impl Freezing {
    async fn new(node: &Node) -> Result<Self> {
        let initramfs = node.file("freezing.cpio", "")?;
        let agent = std::env::var("PERICARP_AGENT").context("the agent to be packed")?;
        // The kernel unpacks one archive after the other.
        let mut content = fs::read("/usr/lib/pericarp/initramfs.cpio")?;
        content.resize(content.len().next_multiple_of(4), 0);
        content.extend(archive(&[
            ("bin", 0o040_755, b""),
            ("bin/busybox", 0o100_755, &fs::read("/usr/bin/busybox")?),
            ("init", 0o100_755, INIT_TO_BE_FROZEN.as_bytes()),
            ("agent", 0o100_755, &fs::read(agent)?),
        ]));
        fs::write(&initramfs, content)?;
        let config =
            format!("initramfs = '{initramfs}'\nready_timeout_seconds = 90\nguest_timeout_seconds = 20");
        Ok(Self { controller: Controller::serve(&config).await? })
    }

    async fn start(&mut self, name: &str) -> Result<FreezingPod> {
        let netns = NetworkNamespace::new(&format!("{name}-{}", std::process::id())).await?;
        let id = format!("{name:0<64}");
        let started = self.controller.start_pod(&id, &pod_config(name), &netns).await?;
        Ok(FreezingPod { id, netns, machine: MachineProcess { pid: started.pid.try_into()? } })
    }

    /// Freezes a pod's agent, and sees to it that nothing else of the pod has stopped.
    async fn freeze(&self, pod: &FreezingPod) -> Result<()> {
        until("the guest to listen", async || {
            Ok(pod.netns.run("busybox nc 127.0.0.1 7777 < /dev/null").await?.contains("obeyed"))
        })
        .await?;
        let console = self.controller.run_dir.join("r").join(&pod.id).join("console.log");
        until("the agent to be frozen", async || {
            Ok(fs::read_to_string(&console)?.contains("the agent is frozen"))
        })
        .await
    }

    /// Waits for a pod's end, which must be that of a guest that has given no answer since then.
    async fn ends_as_stuck(&self, pod: &FreezingPod, since: Instant) -> Result<()> {
        let mut client = self.controller.client.clone();
        let wait = ControllerWaitRequest { sandbox_id: pod.id.clone(), ..Default::default() };
        let ended = tokio::time::timeout(HANG_LIMIT, client.wait(wait)).await??;
        ensure!(ended.into_inner().exit_status == 137, "{}", pod.id);
        // The first question that it did not answer may have been asked at once.
        ensure!(since.elapsed() >= Duration::from_secs(13), "it took only {:?}", since.elapsed());
        let status =
            ControllerStatusRequest { sandbox_id: pod.id.clone(), verbose: true, ..Default::default() };
        let status = client.status(status).await?.into_inner();
        ensure!(status.state == "SANDBOX_NOTREADY", "{status:?}");
        let info: serde_json::Value = serde_json::from_str(&status.info["info"])?;
        let reason = info["pericarp"]["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("no answer for 20 s"), "{info:#}");
        Ok(())
    }

    async fn remove(&mut self, pod: FreezingPod) -> Result<()> {
        self.controller.shut_down_pod(&pod.id).await?;
        assert_eq!(remains(&pod.id)?, Vec::<String>::new());
        pod.netns.remove().await
    }
}

#[test]
fn a_stuck_guest_is_ended_when_its_time_is_over_and_no_other() -> Result<()> {
    on_pericarp(async |node| {
        let mut freezing = Freezing::new(node).await?;
        let well = freezing.start("well").await?;
        let frozen = freezing.start("frozen").await?;
        let stopped = freezing.start("stopped").await?;
        let begun = Instant::now();
        freezing.freeze(&frozen).await?;
        stopped.machine.signal(Signal::STOP)?;
        futures::try_join!(freezing.ends_as_stuck(&frozen, begun), freezing.ends_as_stuck(&stopped, begun))?;
        // It has been asked as often, and has answered.
        let status = ControllerStatusRequest { sandbox_id: well.id.clone(), ..Default::default() };
        let status = freezing.controller.client.status(status).await?.into_inner();
        assert_eq!(status.state, "SANDBOX_READY");
        for pod in [well, frozen, stopped] {
            freezing.remove(pod).await?;
        }
        freezing.controller.stop().await
    })
}
