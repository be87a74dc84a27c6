//! Limits of CPU, memory and processes.

use anyhow::{Context, Result, ensure};
use pericarp_tests::{ContainerBuilder, api, on_node};

use super::{Case, case, compare};

type Resources = api::LinuxContainerResources;

fn limited(name: &'static str, script: &'static str, change: impl Fn(&mut Resources) + 'static) -> Case {
    case(name, script, move |container: ContainerBuilder, _| {
        let mut resources = Resources::default();
        change(&mut resources);
        container.resources(resources)
    })
}

#[test]
fn limits_are_those_of_runc() -> Result<()> {
    compare(
        |pod| pod,
        &[
            limited("memory-and-swap", "", |resources| {
                resources.memory_limit_in_bytes = 64 << 20;
                resources.memory_swap_limit_in_bytes = 64 << 20;
            }),
            limited("cpu", "", |resources| {
                resources.cpu_shares = 2048;
                resources.cpu_quota = 25_000;
                resources.cpu_period = 100_000;
                resources.oom_score_adj = 900;
            }),
            limited("cpuset", "cat /sys/fs/cgroup/cpuset.cpus.effective; nproc", |resources| {
                resources.cpuset_cpus = "0".to_owned();
                resources.cpu_shares = 2;
            }),
            limited("negative-oom-score", "", |resources| resources.oom_score_adj = -500),
            limited("unified", "cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/pids.max", |resources| {
                resources.unified = [("memory.high", "50331648"), ("pids.max", "77")]
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into();
            }),
            limited(
                "pids",
                "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1 & done; echo not reached",
                |resources| {
                    resources.unified = [("pids.max".to_owned(), "8".to_owned())].into();
                },
            ),
            limited("unknown-unified", "", |resources| {
                resources.unified = [("no.such".to_owned(), "1".to_owned())].into();
            })
            .refused(),
            limited("bad-unified", "", |resources| {
                resources.unified = [("memory.high".to_owned(), "plenty".to_owned())].into();
            })
            .refused(),
            limited("escaping-unified", "", |resources| {
                resources.unified = [("../memory.high".to_owned(), "1".to_owned())].into();
            })
            .refused(),
        ],
    )
}

/// kubelet's `podPidsLimit`: of a pod's containers together, whatever their own limits are.
#[test]
fn a_pod_has_so_many_tasks_as_kubelet_allows_it() -> Result<()> {
    const MAX: u32 = 80;
    on_node(async |node| {
        let pod = node.pod("few-tasks").tasks_max(MAX).run().await?;
        let other = pod.idle_container("other").await?;
        // Each number is written before the next process is started, until there can be none.
        let script = "for i in $(seq 1 200); do sleep 1000 & echo $i; done";
        let container = pod.container("many").script(script).start().await?;
        container.wait_for_exit().await.context("the container ends when it cannot fork")?;
        let log = container.log()?;
        let most: u32 = log.stdout().lines().last().context("it has started none")?.parse()?;
        // Those of the other container count, and so do what a runtime has in the pod's cgroup on the node.
        ensure!((MAX / 2..MAX).contains(&most), "{most} processes were started: {}", log.stdout());
        other.shell("true").await?;
        Ok(())
    })
}
