//! A machine follows what its containers may use.

use anyhow::Result;
use pericarp_tests::{Container, api, on_pericarp};

fn resources(cpus: i64, mib: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    }
}

/// Processors and MiB of memory that a container sees, and its cgroup's limits.
async fn seen(container: &Container) -> Result<(u32, u64, String)> {
    let script = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo
        cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max";
    let output = container.shell(script).await?;
    let mut lines = output.lines();
    let mut number = || lines.next().unwrap_or_default().parse::<u64>();
    let (processors, memory) = (number()?, number()?);
    Ok((u32::try_from(processors)?, memory, lines.collect::<Vec<_>>().join(" ")))
}

/// What the guest's kernel keeps for itself, at most, in MiB.
const KERNEL: u64 = 48;

#[track_caller]
fn assert_size(seen: &(u32, u64, String), processors: u32, mib: u64) {
    assert_eq!(seen.0, processors, "{seen:?}");
    assert!((mib - KERNEL..=mib).contains(&seen.1), "{mib} MiB are expected: {seen:?}");
}

#[test]
fn a_machine_grows_and_shrinks_with_the_limits_of_its_containers() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("fits").run().await?;
        let first = pod.container("first").resources(resources(1, 128)).start().await?;
        assert_size(&seen(&first).await?, 1, 512);
        // Together they may use more than the machine was started with.
        let second = pod.container("second").resources(resources(1, 640)).start().await?;
        let both = seen(&second).await?;
        assert_size(&both, 2, 768);
        assert_eq!(both.2, format!("100000 100000 {}", 640 << 20));

        second.update(resources(2, 1024)).await?;
        let grown = seen(&second).await?;
        assert_size(&grown, 3, 1152);
        assert_eq!(grown.2, format!("200000 100000 {}", 1024 << 20));
        let info = pod.info().await?;
        assert_eq!((&info["pericarp"]["vcpus"], &info["pericarp"]["memoryMib"]), (&3.into(), &1152.into()));

        second.update(resources(1, 64)).await?;
        let shrunk = seen(&second).await?;
        // What it was started with stays.
        assert_size(&shrunk, 2, 512);
        assert_eq!(shrunk.2, format!("100000 100000 {}", 64 << 20));

        // More than the node's configuration allows: an error with the figures, and nothing has changed.
        let error = format!("{:#}", second.update(resources(7, 64)).await.unwrap_err());
        assert!(error.contains("8 vCPUs") && error.contains("4 are the most"), "{error}");
        assert_eq!(seen(&second).await?, shrunk);
        first.shell("true").await?;
        Ok(())
    })
}
