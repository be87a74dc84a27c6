//! Containers that use up a resource of the guest: the guest and the other containers go on.

use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::select;
use pericarp_tests::{Container, HANG_LIMIT, PodBuilder, api, on_node, on_pericarp, wait_until};
use tokio::time::timeout;

/// Makes a pod whose machine is small, so that its resources are soon used up.
fn small(pod: PodBuilder) -> PodBuilder {
    pod.with(|config| {
        config.annotations.insert("io.pericarp.memory-mib".to_owned(), "128".to_owned());
    })
}

/// Checks that a command can be executed in a container.
async fn answers(container: &Container) -> Result<()> {
    let answer = timeout(HANG_LIMIT, container.shell("echo fine")).await.context("an exec meanwhile")??;
    assert_eq!(answer, "fine");
    Ok(())
}

#[test]
fn a_guest_whose_memory_is_used_up_loses_who_used_it_and_goes_on() -> Result<()> {
    on_pericarp(async |node| {
        let pod = small(node.pod("memory")).run().await?;
        let neighbour = pod.idle_container("neighbour").await?;
        // None has a limit, and each alone fits.
        let greedy =
            |name| pod.container(name).command(["dd", "if=/dev/zero", "of=/dev/null", "bs=80M"]).start();
        let (one, two) = futures::try_join!(greedy("one"), greedy("two"))?;
        let (killed, _other) =
            select(Box::pin(one.wait_for_exit()), Box::pin(two.wait_for_exit())).await.factor_first();
        let killed = killed?;
        assert_eq!((killed.exit_code, killed.reason.as_str()), (128 + 9, "OOMKilled"));
        answers(&neighbour).await?;
        assert!(pod.is_ready().await?);
        pod.container("next").command(["true"]).run().await?;
        Ok(())
    })
}

#[test]
fn a_fork_bomb_takes_only_its_own_container_with_or_without_a_limit() -> Result<()> {
    on_pericarp(async |node| {
        let pod = small(node.pod("bomb")).run().await?;
        let neighbour = pod.idle_container("neighbour").await?;
        let limits = [("limited", Some("20")), ("unlimited", None)];
        for (name, limit) in limits {
            let resources = api::LinuxContainerResources {
                unified: limit.map(|limit| ("pids.max".to_owned(), limit.to_owned())).into_iter().collect(),
                ..Default::default()
            };
            let container =
                pod.container(name).command(["peer", "bomb"]).resources(resources).start().await?;
            answers(&neighbour).await?;
            // Until it can go no further: at its limit, or out of memory.
            while !container.log()?.stdout().contains("full")
                && container.status().await?.state() == api::ContainerState::ContainerRunning
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            answers(&neighbour).await?;
            timeout(HANG_LIMIT, container.stop(0)).await.context("stop it")??;
            assert_eq!(container.status().await?.exit_code, 128 + 9);
            container.remove().await?;
        }
        answers(&neighbour).await?;
        pod.container("next").command(["true"]).run().await?;
        Ok(())
    })
}

#[test]
fn what_is_counted_for_a_user_and_not_for_a_container_is_not_used_up_by_one() -> Result<()> {
    on_pericarp(async |node| {
        let pod = small(node.pod("hoard")).run().await?;
        let neighbour = pod.idle_container("neighbour").await?;
        let hoarder = pod.container("hoarder").command(["peer", "hoard"]).with_security(|security| {
            security.seccomp = None;
        });
        let hoarder = hoarder.start().await?;
        let has = async || Ok(hoarder.log()?.stdout().ends_with(" namespaces\n"));
        wait_until("what the hoarder has", has).await?;
        // It takes all that it can get, so that nothing would be left of a limit that it shared with the agent.
        let all = "hoards 60000 of epoll, 20000 of inotify, 700 namespaces\n";
        assert_eq!(hoarder.log()?.stdout(), all);
        answers(&neighbour).await?;
        assert!(pod.is_ready().await?);
        let (status, _) = pod.container("next").command(["true"]).run().await?;
        assert_eq!(status.exit_code, 0);
        // A container whose memory is used up is still noticed, which takes a place of inotify's.
        let resources =
            api::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() };
        let (status, _) =
            pod.container("greedy").command(["tail", "/dev/zero"]).resources(resources).run().await?;
        assert_eq!(status.reason, "OOMKilled");
        Ok(())
    })
}

#[test]
fn a_command_that_uses_up_the_memory_is_killed_alone_if_the_container_says_so() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("command").run().await?;
        let resources = api::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            // kubelet's singleProcessOOMKill.
            unified: [("memory.oom.group".to_owned(), "0".to_owned())].into(),
            ..Default::default()
        };
        let container = pod.container("limited").resources(resources).start().await?;
        assert_eq!(container.exec(["tail", "/dev/zero"]).await?.exit_code, 128 + 9);
        answers(&container).await?;
        assert_eq!(container.status().await?.state(), api::ContainerState::ContainerRunning);

        // As critest has it: less than the machine's own smallest piece of work, all in one.
        let resources = api::LinuxContainerResources {
            memory_limit_in_bytes: 15 << 20,
            memory_swap_limit_in_bytes: 15 << 20,
            ..Default::default()
        };
        let script = "dd if=/dev/zero of=/dev/null bs=20M";
        let (status, _) = pod.container("critest").script(script).resources(resources).run().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (128 + 9, "OOMKilled"));
        Ok(())
    })
}
