//! The controller is killed and started again.

use std::{
    fs,
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::{ControllerStatusRequest, ControllerWaitRequest};
use pericarp_tests::{
    Container, HANG_LIMIT,
    cri::streams::Terminal,
    direct::{
        controller::{self, Controller, pod_config},
        netns::NetworkNamespace,
    },
    node::{
        controller::{KilledController, NODE_CONTROLLER},
        machine::MachineProcess,
    },
    on_pericarp, on_pericarp_alone, wait_until,
};

use super::{CountingLog, clean_up, directory, remains, wait_until_not_ready, wait_until_ready};

/// The number of lines in the log of a container that counts; an error if one is missing or came twice.
fn counts_on(container: &Container) -> Result<usize> {
    let CountingLog { next, gaps } = CountingLog::of(container)?;
    ensure!(gaps.is_empty(), "lines are missing: {gaps:?}");
    Ok(next)
}

#[test]
fn what_runs_is_not_disturbed_by_the_death_of_the_controller() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("calm").run().await?;
        let counter = pod
            .container("counter")
            .script("i=0; while :; do echo $i; i=$((i + 1)); sleep 0.05; done")
            .start()
            .await?;
        let reader = pod
            .container("reader")
            .script("while read line; do echo read $line; done")
            .with(|config| config.stdin = true)
            .start()
            .await?;
        let mut attached = reader.attach(Terminal::No).await?;
        attached.write("one\n").await?;
        attached.read_until("read one").await?;
        let mut command = counter.exec_stream(["sh"], Terminal::No).await?;
        command.write("echo in-$((1 + 1))\n").await?;
        command.read_until("in-2").await?;
        let (of_pod, of_counter) = (pod.status().await?.context("the pod")?, counter.status().await?);

        let before = counts_on(&counter)?;
        let killed = KilledController::kill()?;
        attached.write("two\n").await?;
        attached.read_until("read two").await?;
        command.write("echo in-$((2 + 2))\n").await?;
        command.read_until("in-4").await?;
        assert_eq!(counter.shell("echo new").await?, "new");
        wait_until("ten more lines", async || Ok(counts_on(&counter)? >= before + 10)).await?;
        killed.restart().await?;
        wait_until_ready(&pod).await?;

        command.write("echo in-$((3 + 3)); exit 9\n").await?;
        assert_eq!(command.wait_for_end().await?.exit_code, 9);
        attached.write("three\n").await?;
        attached.read_until("read three").await?;
        assert_eq!(pod.status().await?.context("the pod")?.created_at, of_pod.created_at);
        assert_eq!(counter.status().await?, of_counter);
        counts_on(&counter)?;
        pod.container("later").command(["true"]).run().await?;
        Ok(())
    })
}

#[test]
fn the_end_of_a_machine_is_told_although_no_controller_saw_it() -> Result<()> {
    on_pericarp_alone(async |node| {
        let killed_pod = node.pod("killed").run().await?;
        let container = killed_pod.idle_container("idle").await?;
        let other = node.pod("other").run().await?;
        let ended_before = node.pod("before").run().await?;
        MachineProcess::of_pod(&ended_before.id)?.context("a machine")?.kill()?;
        wait_until_not_ready(&ended_before).await?;
        let mut client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
        let wait = |pod: &pericarp_tests::Pod| ControllerWaitRequest {
            sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let told = client.wait(wait(&ended_before)).await?.into_inner();
        assert_eq!(told.exit_status, 137);

        let controller = KilledController::kill()?;
        MachineProcess::of_pod(&killed_pod.id)?.context("a machine")?.kill()?;
        controller.restart().await?;
        wait_until_not_ready(&killed_pod).await?;
        wait_until_ready(&other).await?;
        let status = container.wait_for_exit().await?;
        assert_ne!(status.exit_code, 0, "{status:?}");
        let info = killed_pod.info().await?;
        let reason = info["pericarp"]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("while no controller ran"), "{info:#}");

        // The new controller reports the same end as the one before.
        let mut client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
        assert_eq!(client.wait(wait(&ended_before)).await?.into_inner(), told);
        let info = ended_before.info().await?;
        assert!(
            info["pericarp"]["reason"].as_str().is_some_and(|reason| reason.contains("Signal(9)")),
            "{info:#}"
        );
        for pod in [&killed_pod, &ended_before] {
            assert_eq!(MachineProcess::of_pod(&pod.id)?, None);
            clean_up(node, &pod.id).await?;
            assert_eq!(remains(&pod.id)?, Vec::<String>::new());
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_containerd_has_forgotten_is_removed() -> Result<()> {
    on_pericarp(async |node| {
        let netns = NetworkNamespace::new(node.name()).await?;
        let id = format!("{:0<64}", "forgotten");
        let mut client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
        // The calls are containerd's, but its store has no such sandbox.
        let create = pericarp_protos::sandbox::ControllerCreateRequest {
            sandbox_id: id.clone(),
            options: Some(controller::options(&pod_config("forgotten"))),
            netns_path: netns.path(),
            ..Default::default()
        };
        client.create(create).await?;
        let start =
            pericarp_protos::sandbox::ControllerStartRequest { sandbox_id: id.clone(), ..Default::default() };
        client.start(start).await?;
        let status = ControllerStatusRequest { sandbox_id: id.clone(), ..Default::default() };
        wait_until("the pod to be removed", async || Ok(client.status(status.clone()).await.is_err()))
            .await?;
        assert_eq!(remains(&id)?, Vec::<String>::new());
        netns.remove().await
    })
}

#[test]
fn the_service_is_ready_when_its_pods_are_taken_over_and_ends_at_once() -> Result<()> {
    on_pericarp(async |node| {
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut controller = Controller::serve("").await?;
        let id = format!("{:0<64}", "service");
        let started = controller.start_pod(&id, &pod_config("service"), &netns).await?;
        let begun = Instant::now();
        let stopped = controller.end().await?;
        println!("the controller ended after {:?}", begun.elapsed());
        // Much more than it takes, because this node does other things as well.
        assert!(begun.elapsed() < Duration::from_secs(30), "it took {:?}", begun.elapsed());
        assert!(
            Path::new(&format!("/proc/{}", started.pid)).exists(),
            "the machine has ended with the controller"
        );

        let notify = stopped.run_dir().join("notify");
        let systemd = UnixDatagram::bind(&notify)?;
        systemd.set_read_timeout(Some(HANG_LIMIT))?;
        let mut controller = stopped.start_with_env("NOTIFY_SOCKET", &notify).await?;
        let mut word = [0; 64];
        let length = systemd.recv(&mut word)?;
        assert_eq!(&word[..length], b"READY=1");
        let status = ControllerStatusRequest { sandbox_id: id.clone(), ..Default::default() };
        assert_eq!(controller.client.status(status).await?.into_inner().state, "SANDBOX_READY");
        controller.shut_down_pod(&id).await?;
        assert!(controller.pod_directories()?.is_empty());
        controller.stop().await?;
        netns.remove().await
    })
}

#[test]
fn each_state_change_of_a_pod_is_one_line_of_the_log() -> Result<()> {
    on_pericarp(async |node| {
        let netns = NetworkNamespace::new(node.name()).await?;
        let mut controller = Controller::serve("").await?;
        let id = format!("{:0<64}", "logged");
        controller.start_pod(&id, &pod_config("logged"), &netns).await?;
        controller.shut_down_pod(&id).await?;
        let log = fs::read_to_string(controller.run_dir.join("log"))?;
        let of_pod: Vec<_> = log.lines().filter(|line| line.contains(&id)).collect();
        for change in ["pod created", "pod started", "machine stopped", "pod removed"] {
            assert_eq!(of_pod.iter().filter(|line| line.contains(change)).count(), 1, "{change}: {log}");
        }
        assert!(of_pod.len() <= 6, "{log}");
        controller.stop().await?;
        assert!(!directory(&id).exists());
        netns.remove().await
    })
}
