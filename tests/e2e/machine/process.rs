//! The process of a machine: what it shows, and when it ends.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use pericarp_tests::{api, cri::timeline, node::machine::MachineProcess, on_pericarp};

#[test]
fn a_container_runs_on_the_guests_kernel_in_a_machine_of_the_asked_size() -> Result<()> {
    on_pericarp(async |node| {
        // More than the default, and more than the virtual node has: its configuration allows four (tests/node/job).
        let vcpus = "2".to_owned();
        let pod = node
            .pod("where")
            .with(|config| {
                config.annotations.insert("io.pericarp.vcpus".to_owned(), vcpus.clone());
                config.annotations.insert("io.pericarp.memory-mib".to_owned(), "300".to_owned());
            })
            .run()
            .await?;
        let container = pod.idle_container("idle").await?;
        let of_node = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let of_guest = container.shell("uname -r").await?;
        assert_ne!(of_guest, of_node.trim(), "the container runs on the node's kernel");
        // The guest image says which kernel it holds; its text lies in the ELF file as it does in the running kernel.
        let kernel = fs::read("/usr/lib/pericarp/vmlinux")?;
        let banner = format!("Linux version {of_guest} ");
        assert!(
            kernel.windows(banner.len()).any(|window| window == banner.as_bytes()),
            "{of_guest} is not the release of the guest image's kernel"
        );

        assert_eq!(container.shell("nproc").await?, vcpus);
        let total = container.shell("awk '/MemTotal/ { print $2 }' /proc/meminfo").await?;
        let total: u32 = total.parse().with_context(|| format!("MemTotal {total:?}"))?;
        assert!((240 << 10..=300 << 10).contains(&total), "300 MiB were asked for; MemTotal is {total} kB");

        // The machine is the only process of the pod on the node.
        let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
        let parent = pod.config.linux.as_ref().context("a Linux pod")?.cgroup_parent.clone();
        assert_eq!(
            processes_below(&Path::new("/sys/fs/cgroup").join(parent.trim_start_matches('/')))?,
            [machine.pid]
        );
        let info = pod.info().await?;
        assert_eq!(info["pid"], machine.pid, "{info:#}");
        assert_eq!(info["runtimeHandler"], "pericarp");
        Ok(())
    })
}

#[test]
fn a_guest_has_no_virtualization_unless_its_pod_asks_for_it() -> Result<()> {
    on_pericarp(async |node| {
        let flags = |text: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
            line.split_whitespace().map(str::to_owned).collect()
        };
        let virtualization = |text: &str| flags(text).iter().any(|flag| flag == "vmx" || flag == "svm");
        let pod = node.pod("plain").run().await?;
        let container = pod.idle_container("idle").await?;
        let plain = container.shell("cat /proc/cpuinfo").await?;
        assert!(!virtualization(&plain), "{plain}");
        // The list that keeps it out lets through what guests run with.
        for flag in ["hypervisor", "x2apic", "tsc_deadline_timer", "lm", "nx", "sse2"] {
            assert!(flags(&plain).iter().any(|has| has == flag), "{flag} is missing: {plain}");
        }
        let pod = node
            .pod("nested")
            .with(|config| {
                config.annotations.insert("io.pericarp.nested-virtualization".to_owned(), "true".to_owned());
            })
            .run()
            .await?;
        let nested = pod.idle_container("idle").await?.shell("cat /proc/cpuinfo").await?;
        let parameter = ["kvm_amd", "kvm_intel"]
            .iter()
            .find_map(|module| fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).ok());
        let offered = parameter.is_some_and(|value| matches!(value.trim(), "1" | "Y"));
        assert_eq!(virtualization(&nested), offered, "{nested}");
        Ok(())
    })
}

/// The processes of a cgroup and of all below it.
fn processes_below(cgroup: &Path) -> Result<Vec<i32>> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    let mut processes = text.lines().map(str::parse).collect::<Result<Vec<i32>, _>>()?;
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            processes.extend(processes_below(&entry.path())?);
        }
    }
    Ok(processes)
}

#[test]
fn killing_the_machine_ends_its_containers_and_the_pod() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("killed").run().await?;
        let container = pod.idle_container("idle").await?;
        let bystander = node.pod("bystander").run().await?;
        MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?.kill()?;

        let start = Instant::now();
        let status = container.wait_for_exit().await?;
        assert_ne!(status.exit_code, 0);
        while pod.is_ready().await? {
            assert!(start.elapsed() < Duration::from_secs(30), "the pod is READY without its machine");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "it took {:?}", start.elapsed());
        assert!(container.exec(["true"]).await.is_err());
        assert!(bystander.is_ready().await?);

        pod.stop().await?;
        pod.remove().await?;
        assert_eq!(pod.status().await?, None);
        Ok(())
    })
}

#[test]
fn verbose_status_shows_how_long_each_phase_took() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("timeline").run().await?;
        let container = pod.idle_container("idle").await?;
        let info = pod.info().await?;
        let phases = timeline::boot_timeline(&info)?;
        let (last, before) = phases.split_last().context("phases")?;
        let total = last.1;
        let sum: f64 = before.iter().map(|(_, milliseconds)| milliseconds).sum();
        assert!(phases.iter().all(|(_, milliseconds)| (0.0..60_000.0).contains(milliseconds)), "{phases:?}");
        assert!(sum > total * 0.8 && sum < total * 1.01, "the phases make up the total: {phases:?}");
        let of_container = timeline::container_timeline(&info, &container.id)?;
        assert!(
            of_container.iter().all(|(_, milliseconds)| (0.0..60_000.0).contains(milliseconds)),
            "{of_container:?}"
        );
        Ok(())
    })
}

#[test]
fn a_stopped_pods_machine_is_gone_at_once() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("gone").run().await?;
        pod.idle_container("idle").await?;
        pod.stop().await?;
        assert_eq!(MachineProcess::of_pod(&pod.id)?, None);
        assert_eq!(pod.status().await?.context("the pod")?.state(), api::PodSandboxState::SandboxNotready);
        let cgroup =
            format!("/sys/fs/cgroup{}/cgroup.events", pod.config.linux.context("a Linux pod")?.cgroup_parent);
        assert!(fs::read_to_string(cgroup)?.contains("populated 0"));
        Ok(())
    })
}
