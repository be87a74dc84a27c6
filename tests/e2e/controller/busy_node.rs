//! A node whose CPUs have other work to do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use pericarp_tests::{
    api,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
    },
    node::contention::Contention,
    on_pericarp, on_pericarp_alone,
};

/// As kubelet has it: a `BestEffort` pod's cgroup has the weight 1.
#[test]
fn a_pod_that_hardly_gets_a_cpu_starts_at_the_first_try() -> Result<()> {
    on_pericarp_alone(async |_| {
        // In seconds, as by default. The guest works for a part of it, and waits for several times that.
        let limit = 10;
        let mut controller = Controller::serve(&format!("ready_timeout_seconds = {limit}")).await?;
        let netns = NetworkNamespace::new("busy-node").await?;
        let contention = Contention::new(4)?;
        let linux =
            api::LinuxPodSandboxConfig { cgroup_parent: Contention::POOR.into(), ..Default::default() };
        let config = api::PodSandboxConfig { linux: Some(linux), ..pod_config("poor") };
        let (id, start) = ("b".repeat(64), Instant::now());
        let started = controller.start_pod(&id, &config, &netns).await;
        let took = start.elapsed();
        started.with_context(|| format!("it was given up after {took:?}"))?;
        ensure!(took > Duration::from_secs(limit), "it was not slow: {took:?}; the test shows nothing");
        controller.shut_down_pod(&id).await?;
        drop(contention);
        controller.stop().await?;
        netns.remove().await
    })
}

#[test]
fn pods_that_start_at_once_boot_in_their_order() -> Result<()> {
    on_pericarp(async |node| {
        let cpus = std::thread::available_parallelism()?.get();
        let names: Vec<_> = (0..cpus + 2).map(|number| format!("at-once-{number}")).collect();
        let pods = try_join_all(names.iter().map(|name| node.pod(name).run())).await?;
        let mut waited = Vec::new();
        for pod in &pods {
            let info = pod.info().await?;
            let queued = &info["pericarp"]["bootTimeline"]["queued"];
            waited.push(queued.as_f64().with_context(|| format!("no queued in {info}"))?);
        }
        // In milliseconds. The last has waited for a whole boot at least.
        let longest = waited.iter().copied().fold(0.0, f64::max);
        ensure!(longest > 100.0, "nobody has waited: {waited:?}");
        Ok(())
    })
}
