//! The events of containers that containerd's clients receive.

use anyhow::{Context as _, Result};
use pericarp_tests::{
    direct::events::{Events, TaskEvent},
    node::{controller::KilledController, machine::MachineProcess},
    on_node, on_pericarp_alone, wait_until,
};

fn topics(events: &[TaskEvent]) -> Vec<&str> {
    events.iter().map(|event| event.topic.trim_start_matches("/tasks/")).collect()
}

#[test]
fn the_events_of_a_container_come_in_order_however_short_its_life_is() -> Result<()> {
    on_node(async |node| {
        let events = Events::subscribe().await?;
        let pod = node.pooled_pod().await?;
        let quick = pod.container("quick").command(["true"]).start().await?;
        quick.wait_for_exit().await?;
        events.wait_for("/tasks/delete", &quick.id, "").await?;
        assert_eq!(topics(&events.of(&quick.id).await), ["create", "start", "exit", "delete"]);

        let container = pod.idle_container("idle").await?;
        for _ in 0..3 {
            container.exec(["true"]).await?;
        }
        container.stop(0).await?;
        events.wait_for("/tasks/delete", &container.id, "").await?;
        let seen = events.of(&container.id).await;
        let execs: Vec<_> = seen.iter().filter(|event| !event.exec.is_empty()).cloned().collect();
        for three in execs.chunks(3) {
            assert_eq!(topics(three), ["exec-added", "exec-started", "exit"]);
            assert!(three.iter().all(|event| event.exec == three[0].exec), "{three:?}");
        }
        assert_eq!(execs.len(), 9, "{execs:?}");
        let own: Vec<_> = seen.into_iter().filter(|event| event.exec.is_empty()).collect();
        assert_eq!(topics(&own), ["create", "start", "exit", "delete"]);
        Ok(())
    })
}

#[test]
fn every_event_is_told_once_though_the_controller_is_killed_meanwhile() -> Result<()> {
    on_pericarp_alone(async |node| {
        let events = Events::subscribe().await?;
        let pod = node.pod("killed").run().await?;
        let stays = pod.idle_container("stays").await?;
        let mut ending = Vec::new();
        for n in 0..3 {
            let script = "until [ -e /dev/shm/go ]; do sleep 0.1; done; exit 3";
            ending.push(pod.container(&format!("ends-{n}")).script(script).start().await?);
        }
        stays.shell("echo before").await?;
        events.wait_for("/tasks/exit", &stays.id, &events.of(&stays.id).await[2].exec).await?;

        let controller = KilledController::kill()?;
        for n in 0..5 {
            assert_eq!(stays.shell(&format!("echo {n}")).await?, n.to_string());
        }
        stays.shell("touch /dev/shm/go").await?;
        for container in &ending {
            assert_eq!(container.wait_for_exit().await?.exit_code, 3);
        }
        controller.restart().await?;

        for container in &ending {
            events.wait_for("/tasks/delete", &container.id, "").await?;
            assert_eq!(topics(&events.of(&container.id).await), ["create", "start", "exit", "delete"]);
        }
        stays.stop(0).await?;
        // After this nothing more can come, so nothing comes twice.
        events.wait_for("/tasks/delete", &stays.id, "").await?;
        let seen = events.of(&stays.id).await;
        let mut expected = vec!["create", "start"];
        expected.extend(["exec-added", "exec-started", "exit"].repeat(7));
        expected.extend(["exit", "delete"]);
        assert_eq!(topics(&seen), expected);
        // A container whose release the dead controller did not hear of is released nevertheless.
        let mounts = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?.mounts()?;
        assert!(!mounts.contains(&ending[0].id), "{mounts}");
        // containerd takes its time to dial the controller again.
        wait_until("the pod to be READY", async || pod.is_ready().await).await?;
        pod.container("new").command(["true"]).run().await?;
        Ok(())
    })
}
