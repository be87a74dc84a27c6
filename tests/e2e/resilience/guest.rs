//! A machine or its guest dies.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::{ControllerStatusRequest, ControllerWaitRequest};
use pericarp_tests::{
    Container, HANG_LIMIT, Node, Pod,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
    },
    node::machine::MachineProcess,
    on_pericarp, wait_until,
};
use rustix::process::Signal;

use super::{clean_up, remains, wait_until_not_ready};
use crate::controller::bad_input::archive;

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

/// Checks a pod whose guest has died: the status has the reason, its containers have exited, calls fail at once, and
/// clean-up works.
async fn check_dead(node: &Node, pod: &Pod, container: &Container, reason: &str) -> Result<()> {
    wait_until_not_ready(pod).await?;
    let status = container.wait_for_exit().await?;
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
        wait_until_not_ready(&pod).await?;
        println!("NotReady after {:?}", begun.elapsed());
        // Much more than it takes, because this node does other things as well.
        assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
        check_dead(node, &pod, &container, "Signal(9)").await
    })
}

#[test]
fn a_kernel_that_panics_for_want_of_memory_is_told_so() -> Result<()> {
    on_pericarp(async |node| {
        let (pod, container) = privileged(node, "panic").await?;
        let bystander = node.pod("bystander").run().await?;
        container.shell("echo 2 > /proc/sys/vm/panic_on_oom").await?;
        let _ = container.try_exec(["tail", "/dev/zero"], Duration::from_secs(120)).await;
        check_dead(node, &pod, &container, "ut of memory").await?;
        assert!(bystander.is_ready().await?);
        Ok(())
    })
}

/// A script in the place of an initramfs's `/init`. It starts the agent, and two listeners beside it. A connection to
/// port 7777 freezes the agent: the kernel goes on, and everything else that does not need PID 1. A connection to port
/// 7778 overwrites the agent's code, because no signal kills a guest's first process. No container has a way to do
/// either. The script mounts what it needs, because the agent has moved to another root by then, with its file systems.
const INIT_THAT_OBEYS: &str = r#"#!/bin/busybox sh
busybox=/bin/busybox
$busybox mv /init /script
$busybox mv /agent /init
# A background job reads from it.
: > /dev/null
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
{
    echo obeyed | $busybox nc -l -p 7778
    $busybox mkdir /processes
    $busybox mount -t proc proc /processes
    start=$($busybox sed -n "s/-.* r-xp .*//p" /processes/1/maps | $busybox head -n 1)
    $busybox dd if=/init of=/processes/1/mem conv=notrunc bs=4096 count=1800 seek=$((0x$start / 4096))
} > /dev/console 2>&1 &
exec /init
"#;

/// Guests whose agent freezes or dies when it is told to.
struct ScriptedGuests {
    controller: Controller,
}

/// A pod with such a guest.
struct ScriptedPod {
    id: String,
    netns: NetworkNamespace,
    machine: MachineProcess,
}

impl ScriptedGuests {
    async fn new(node: &Node) -> Result<Self> {
        let initramfs = node.file("obeying.cpio", "")?;
        let agent = std::env::var("PERICARP_AGENT").context("the agent to be packed")?;
        // The kernel unpacks one archive after the other.
        let mut content = fs::read("/usr/lib/pericarp/initramfs.cpio")?;
        content.resize(content.len().next_multiple_of(4), 0);
        content.extend(archive(&[
            ("bin", 0o040_755, b""),
            ("bin/busybox", 0o100_755, &fs::read("/usr/bin/busybox")?),
            ("init", 0o100_755, INIT_THAT_OBEYS.as_bytes()),
            ("agent", 0o100_755, &fs::read(agent)?),
        ]));
        fs::write(&initramfs, content)?;
        let config =
            format!("initramfs = '{initramfs}'\nready_timeout_seconds = 90\nguest_timeout_seconds = 20");
        Ok(Self { controller: Controller::serve(&config).await? })
    }

    async fn start(&mut self, name: &str) -> Result<ScriptedPod> {
        let netns = NetworkNamespace::new(&format!("{name}-{}", std::process::id())).await?;
        let id = format!("{name:0<64}");
        let started = self.controller.start_pod(&id, &pod_config(name), &netns).await?;
        Ok(ScriptedPod { id, netns, machine: MachineProcess { pid: started.pid.try_into()? } })
    }

    /// Connects to a port of the pod at which the script listens.
    async fn order(pod: &ScriptedPod, port: u16) -> Result<()> {
        wait_until("the guest to listen", async || {
            let answer = pod.netns.run(&format!("busybox nc 127.0.0.1 {port} < /dev/null")).await?;
            Ok(answer.contains("obeyed"))
        })
        .await
    }

    /// Freezes a pod's agent, and waits until it is frozen.
    async fn freeze(&self, pod: &ScriptedPod) -> Result<()> {
        Self::order(pod, 7777).await?;
        let console = self.controller.run_dir.join("r").join(&pod.id).join("console.log");
        wait_until("the agent to be frozen", async || {
            Ok(fs::read_to_string(&console)?.contains("the agent is frozen"))
        })
        .await
    }

    /// Waits for a pod's end; returns its exit code, and the reason in its status.
    async fn end(&self, pod: &ScriptedPod) -> Result<(u32, String)> {
        let mut client = self.controller.client.clone();
        let wait = ControllerWaitRequest { sandbox_id: pod.id.clone(), ..Default::default() };
        let ended = tokio::time::timeout(HANG_LIMIT, client.wait(wait)).await??.into_inner();
        let status =
            ControllerStatusRequest { sandbox_id: pod.id.clone(), verbose: true, ..Default::default() };
        let status = client.status(status).await?.into_inner();
        ensure!(status.state == "SANDBOX_NOTREADY", "{status:?}");
        let info: serde_json::Value = serde_json::from_str(&status.info["pericarp"])?;
        Ok((ended.exit_status, info["reason"].as_str().unwrap_or_default().to_owned()))
    }

    /// Waits for the end of a guest that has not responded since `since`, and checks its reason.
    async fn ends_as_stuck(&self, pod: &ScriptedPod, since: Instant) -> Result<()> {
        let (code, reason) = self.end(pod).await?;
        ensure!(code == 137, "{code}: {reason}");
        // The first question that it did not answer may have been asked at once.
        ensure!(since.elapsed() >= Duration::from_secs(13), "it took only {:?}", since.elapsed());
        ensure!(reason.contains("no answer for 20 s"), "{reason}");
        Ok(())
    }

    async fn remove(&mut self, pod: ScriptedPod) -> Result<()> {
        self.controller.shut_down_pod(&pod.id).await?;
        assert_eq!(remains(&pod.id)?, Vec::<String>::new());
        pod.netns.remove().await
    }
}

#[test]
fn a_container_that_is_killed_while_it_reads_a_file_ends_and_its_guest_goes_on() -> Result<()> {
    on_pericarp(async |node| {
        let (pod, other) = privileged(node, "killed-reading").await?;
        // Nothing stays in memory for long, so that there is always something that is read ahead.
        other
            .shell("(while sleep 0.02; do echo 1 > /proc/sys/vm/drop_caches; done) > /dev/null 2>&1 &")
            .await?;
        for round in 0..8 {
            let script = "echo reading; while :; do cat /bin/busybox > /dev/null; done";
            let container = pod.container(&format!("reader-{round}")).script(script).start().await?;
            container.wait_for_output("reading\n").await?;
            // Its last process is the last one with its root file system.
            container.stop(0).await?;
            container.remove().await?;
        }
        assert_eq!(other.shell("echo alive").await?, "alive");
        Ok(())
    })
}

#[test]
fn a_stuck_guest_is_ended_when_its_time_is_over_and_no_other() -> Result<()> {
    on_pericarp(async |node| {
        let mut guests = ScriptedGuests::new(node).await?;
        let well = guests.start("well").await?;
        let frozen = guests.start("frozen").await?;
        let stopped = guests.start("stopped").await?;
        let begun = Instant::now();
        guests.freeze(&frozen).await?;
        stopped.machine.signal(Signal::STOP)?;
        futures::try_join!(guests.ends_as_stuck(&frozen, begun), guests.ends_as_stuck(&stopped, begun))?;
        // The third guest was asked as often, and has responded.
        let status = ControllerStatusRequest { sandbox_id: well.id.clone(), ..Default::default() };
        let status = guests.controller.client.status(status).await?.into_inner();
        assert_eq!(status.state, "SANDBOX_READY");
        for pod in [well, frozen, stopped] {
            guests.remove(pod).await?;
        }
        guests.controller.stop().await
    })
}

#[test]
fn the_death_of_the_agent_is_the_guests_and_is_told_with_the_kernels_last_words() -> Result<()> {
    on_pericarp(async |node| {
        let mut guests = ScriptedGuests::new(node).await?;
        let pod = guests.start("dying").await?;
        ScriptedGuests::order(&pod, 7778).await?;
        let (_, reason) = guests.end(&pod).await?;
        ensure!(reason.contains("Attempted to kill init"), "{reason}");
        guests.remove(pod).await?;
        guests.controller.stop().await
    })
}
