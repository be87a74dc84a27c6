//! The size of a machine follows the limits of its containers.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use pericarp_tests::{Container, Pod, api, on_pericarp};

use pericarp_tests::node::mount::TestMount;

fn resources(cpus: i64, mib: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: cpus * 100_000,
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    }
}

/// The processors and the MiB of memory that a container sees, and the limits of its cgroup.
async fn size_seen_by(container: &Container) -> Result<(u32, u64, String)> {
    let script = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo
        cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max";
    let output = container.shell(script).await?;
    let mut lines = output.lines();
    let mut number = || lines.next().unwrap_or_default().parse::<u64>();
    let (processors, memory) = (number()?, number()?);
    Ok((u32::try_from(processors)?, memory, lines.collect::<Vec<_>>().join(" ")))
}

/// The most memory that the guest's kernel keeps for itself, in MiB.
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
        assert_size(&size_seen_by(&first).await?, 1, 512);
        // Together they may use more than the machine was started with.
        let second = pod.container("second").resources(resources(1, 640)).start().await?;
        let both = size_seen_by(&second).await?;
        assert_size(&both, 2, 768);
        assert_eq!(both.2, format!("100000 100000 {}", 640 << 20));

        second.update(resources(2, 1024)).await?;
        let grown = size_seen_by(&second).await?;
        assert_size(&grown, 3, 1152);
        assert_eq!(grown.2, format!("200000 100000 {}", 1024 << 20));
        let info = pod.info().await?;
        assert_eq!((&info["pericarp"]["vcpus"], &info["pericarp"]["memoryMib"]), (&3.into(), &1152.into()));

        second.update(resources(1, 64)).await?;
        let shrunk = size_seen_by(&second).await?;
        // What it was started with stays.
        assert_size(&shrunk, 2, 512);
        assert_eq!(shrunk.2, format!("100000 100000 {}", 64 << 20));

        // More than the node's configuration allows: an error with the figures, and nothing has changed.
        let error = format!("{:#}", second.update(resources(7, 64)).await.unwrap_err());
        assert!(error.contains("8 vCPUs") && error.contains("4 are the most"), "{error}");
        assert_eq!(size_seen_by(&second).await?, shrunk);
        first.shell("true").await?;
        Ok(())
    })
}

/// The cgroup of a pod's machine on the node.
pub async fn cgroup(pod: &Pod) -> Result<PathBuf> {
    let pid = pod.info().await?["pid"].clone();
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = groups.trim().strip_prefix("0::/").unwrap_or_default();
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

#[test]
fn a_machine_stays_on_the_cpus_of_its_containers() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("pinned").run().await?;
        let pinned = async || -> Result<_> {
            let cgroup = cgroup(&pod).await?;
            let read = |file| fs::read_to_string(cgroup.join(file));
            Ok((read("cpuset.cpus")?.trim().to_owned(), read("cpuset.mems")?.trim().to_owned()))
        };
        let on_cpu = |cpus: &str| api::LinuxContainerResources {
            cpuset_cpus: cpus.to_owned(),
            cpuset_mems: "0".to_owned(),
            ..Default::default()
        };
        // The virtual node has one CPU, which is all that there is: only a machine that nobody has kept anywhere yet
        // can be told from one that is kept on it. (`a_machine_is_let_go_when_one_of_its_containers_may_run_anywhere`
        // has more.)
        let anywhere = pod.idle_container("anywhere").await?;
        assert_eq!(pinned().await?, (String::new(), String::new()));
        // With a container that may run anywhere, the machine may.
        let first = pod.container("first").resources(on_cpu("0")).start().await?;
        assert_eq!(pinned().await?, (String::new(), String::new()));
        anywhere.update(on_cpu("0")).await?;
        assert_eq!(pinned().await?, ("0".into(), "0".into()));
        assert_eq!(first.shell("nproc").await?.trim(), "1");
        Ok(())
    })
}

#[test]
fn the_host_kills_a_machine_when_it_would_kill_its_containers() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("score").run().await?;
        let requested = |oom_score_adj| api::LinuxContainerResources { oom_score_adj, ..Default::default() };
        pod.container("first").resources(requested(800)).start().await?;
        let second = pod.container("second").resources(requested(900)).start().await?;
        let pid = pod.info().await?["pid"].clone();
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim(), "700");
        assert_eq!(second.shell("cat /proc/self/oom_score_adj").await?, "900");
        Ok(())
    })
}

#[test]
fn huge_pages_are_the_guests_own_and_shared_by_its_containers() -> Result<()> {
    on_pericarp(async |node| {
        let directory = node.directory_for("huge")?;
        let _mounted = TestMount::huge_pages(&directory, "mode=0750,gid=1000")?;
        let huge = |size: &str, mib: u64| api::LinuxContainerResources {
            hugepage_limits: vec![
                api::HugepageLimit { page_size: size.to_owned(), limit: mib << 20 },
                api::HugepageLimit { page_size: "1GB".to_owned(), limit: 0 },
            ],
            ..Default::default()
        };
        let pod = node.pod("huge").run().await?;
        let plain = pod.idle_container("plain").await?;
        let pages = "awk '/HugePages_Total/ { print $2 }' /proc/meminfo";
        assert_eq!(plain.shell(pages).await?.trim(), "0");
        let memory = size_seen_by(&plain).await?.1;

        let volume = |name: &str| pod.container(name).mount(&directory, "/huge", false);
        let first = volume("first").resources(huge("2MB", 4)).start().await?;
        let second = volume("second").resources(huge("2MB", 2)).start().await?;
        assert_eq!(plain.shell(pages).await?.trim(), "3");
        // They cost nobody's memory.
        let with_pages = size_seen_by(&plain).await?.1;
        assert!(with_pages >= memory + 6, "{memory} MiB before, {with_pages} MiB now");
        assert_eq!(first.shell("cat /sys/fs/cgroup/hugetlb.2MB.max").await?.trim(), (4 << 20).to_string());
        assert_eq!(first.shell("stat -c '%a %u %g' /huge").await?.trim(), "750 0 1000");
        assert_eq!(first.shell("peer map /huge/page text").await?.trim(), "");
        assert_eq!(second.shell("peer map /huge/page other").await?.trim(), "text");
        // More than its own limit it cannot have.
        let error = second.exec(["sh", "-c", "peer map /huge/one a && peer map /huge/two b"]).await?;
        assert_ne!(error.exit_code, 0, "{error:?}");

        for container in [&first, &second] {
            container.stop(0).await?;
            container.remove().await?;
        }
        // The volume's pages stay as long as the pod does.
        let left: u32 = plain.shell(pages).await?.trim().parse()?;
        assert!(left <= 2, "{left} pages");

        let refused = pod.container("refused").resources(huge("1GB", 1024)).create().await?;
        let error = format!("{:#}", refused.try_start().await.unwrap_err());
        assert!(error.contains("1GB") && error.contains("2Mi"), "{error}");
        Ok(())
    })
}
