//! Records of controllers that are damaged, newer or lost.

use std::fs;

use anyhow::{Context, Result};
use pericarp_tests::{
    node::{controller::KilledController, machine::MachineProcess},
    on_pericarp_alone,
};

use super::{clean_up, directory, remains, wait_until_not_ready, wait_until_ready};

#[test]
fn a_damaged_or_newer_record_neither_kills_nor_hides_a_pod() -> Result<()> {
    on_pericarp_alone(async |node| {
        let damages: [(&str, &str, &str); 4] = [
            ("damaged", "state.json", "{\"version\": 1, \"stage\": \"runn"),
            ("newer", "state.json", "{\"version\": 99}"),
            ("empty", "state.json", ""),
            ("progress", "progress.json", "\0\0\0"),
        ];
        let mut pods = Vec::new();
        for (name, ..) in damages {
            let pod = node.pod(name).run().await?;
            let container = pod.idle_container("idle").await?;
            pods.push((pod, container));
        }
        let controller = KilledController::kill()?;
        for ((pod, _), (_, file, content)) in pods.iter().zip(damages) {
            fs::write(directory(&pod.id).join(file), content)?;
        }
        controller.restart().await?;
        for ((pod, container), (name, file, content)) in pods.iter().zip(damages) {
            wait_until_ready(pod).await.context(name)?;
            assert_eq!(container.shell("echo alive").await?, "alive");
            let aside = directory(&pod.id).join(format!("{file}.unusable"));
            assert_eq!(fs::read_to_string(aside)?, content, "{name}");
            assert_eq!(pod.container("new").command(["true"]).run().await?.0.exit_code, 0);
            let machine = MachineProcess::of_pod(&pod.id)?.context("a machine")?;
            assert_eq!(pod.info().await?["pid"], machine.pid);
        }
        // Once more, from what the second controller has written.
        KilledController::kill()?.restart().await?;
        for (pod, container) in &pods {
            wait_until_ready(pod).await?;
            container.stop(0).await?;
            clean_up(node, &pod.id).await?;
            assert_eq!(remains(&pod.id)?, Vec::<String>::new());
        }
        Ok(())
    })
}

#[test]
fn a_pod_whose_machine_and_record_are_both_lost_is_cleaned_up() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("lost").run().await?;
        pod.idle_container("idle").await?;
        let controller = KilledController::kill()?;
        fs::write(directory(&pod.id).join("state.json"), "nonsense")?;
        MachineProcess::of_pod(&pod.id)?.context("a machine")?.kill()?;
        controller.restart().await?;
        wait_until_not_ready(&pod).await?;
        clean_up(node, &pod.id).await?;
        assert_eq!(remains(&pod.id)?, Vec::<String>::new());
        Ok(())
    })
}
