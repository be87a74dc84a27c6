//! Shortages of the node: a pod that needs what is short is refused with the reason, and other pods are not affected.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::ControllerStatusRequest;
use pericarp_tests::{
    Node, api,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
    },
    on_pericarp,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A second controller with one pod, which was started before anything was short.
struct Short {
    controller: Controller,
    netns: NetworkNamespace,
    name: String,
}

impl Short {
    async fn new(node: &Node, controller: Controller) -> Result<Self> {
        let name = node.name().to_owned();
        let netns = NetworkNamespace::new(&name).await?;
        let mut short = Self { controller, netns, name };
        short.start("first", "").await?;
        Ok(short)
    }

    fn id(&self, pod: &str) -> String {
        format!("{}-{pod}-{:0<64}", pod, self.name).chars().take(64).collect()
    }

    /// Starts a pod in a cgroup below `cgroup`, unless that is empty.
    async fn start(&mut self, pod: &str, cgroup: &str) -> Result<()> {
        let mut config = pod_config(pod);
        let linux = api::LinuxPodSandboxConfig { cgroup_parent: cgroup.to_owned(), ..Default::default() };
        config.linux = Some(linux);
        self.controller.start_pod(&self.id(pod), &config, &self.netns).await?;
        Ok(())
    }

    /// Checks that a pod does not start, for this reason, that nothing of it is left, and that the first pod runs.
    async fn refuses(&mut self, pod: &str, cgroup: &str, reason: &str) -> Result<()> {
        let error = self.start(pod, cgroup).await.err().with_context(|| format!("{pod} should not start"))?;
        let error = format!("{error:#}");
        ensure!(error.contains(reason), "{reason:?} is not in {error:?}");
        ensure!(error.contains(pod), "{pod:?} is not in {error:?}");
        ensure!(self.controller.pod_directories()? == [self.id("first")], "something is left after {error}");
        self.first_runs().await
    }

    async fn first_runs(&mut self) -> Result<()> {
        let status = ControllerStatusRequest { sandbox_id: self.id("first"), ..Default::default() };
        let status = self.controller.client.status(status).await?.into_inner();
        ensure!(status.state == "SANDBOX_READY", "the first pod is {}", status.state);
        Ok(())
    }

    /// Checks that a pod starts when nothing is short any more.
    async fn recovers(mut self, pod: &str, cgroup: &str) -> Result<()> {
        self.start(pod, cgroup).await?;
        self.first_runs().await?;
        for pod in [pod, "first"] {
            self.controller.shut_down_pod(&self.id(pod)).await?;
        }
        ensure!(self.controller.pod_directories()?.is_empty(), "something is left");
        self.controller.stop().await?;
        self.netns.remove().await
    }
}

/// A cgroup with limits, as kubelet makes one for a pod.
struct Limited(PathBuf);

impl Limited {
    fn new(node: &Node, file: &str, limit: &str) -> Result<Self> {
        let path = PathBuf::from("/sys/fs/cgroup").join(node.name());
        fs::create_dir_all(&path)?;
        fs::write(path.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
        fs::write(path.join(file), limit)?;
        Ok(Self(path))
    }

    fn parent(&self) -> String {
        format!("/{}", self.0.file_name().unwrap_or_default().display())
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            println!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_is_told_and_harms_no_other_pod() -> Result<()> {
    on_pericarp(async |node| {
        let disk = PathBuf::from("/run").join(format!("disk-{}", std::process::id()));
        fs::create_dir(&disk)?;
        mount("small", &disk, "tmpfs", MountFlags::empty(), Some(c"size=2m"))?;
        let mut short = Short::new(node, Controller::serve_at(disk.clone(), "").await?).await?;
        let filler = disk.join("filler");
        let error = fs::write(&filler, vec![0; 4 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        short.refuses("second", "", "No space left on device").await?;
        // Nor does a controller that is started now.
        short.controller = short.controller.replace().await?;
        short.first_runs().await?;
        fs::remove_file(&filler)?;
        short.recovers("second", "").await?;
        unmount(&disk, UnmountFlags::empty())?;
        fs::remove_dir(&disk)?;
        Ok(())
    })
}

#[test]
fn a_pod_whose_machine_gets_no_memory_is_refused_with_the_reason() -> Result<()> {
    on_pericarp(async |node| {
        let limited = Limited::new(node, "memory.max", "24M")?;
        let mut short = Short::new(node, Controller::serve("").await?).await?;
        short.refuses("second", &limited.parent(), "out of memory").await?;
        fs::write(limited.0.join("memory.max"), "max")?;
        short.recovers("second", &limited.parent()).await
    })
}

#[test]
fn a_pod_whose_machine_gets_no_threads_is_refused_with_the_reason() -> Result<()> {
    on_pericarp(async |node| {
        let limited = Limited::new(node, "pids.max", "1")?;
        let mut short = Short::new(node, Controller::serve("").await?).await?;
        short.refuses("second", &limited.parent(), "Resource temporarily unavailable").await?;
        fs::write(limited.0.join("pids.max"), "max")?;
        short.recovers("second", &limited.parent()).await
    })
}

#[test]
fn a_controller_without_descriptors_refuses_new_pods_and_serves_on() -> Result<()> {
    on_pericarp(async |node| {
        let controller = Controller::serve("").await?;
        let pid = controller.pid()?;
        let mut short = Short::new(node, controller).await?;
        // The fewest that it has at any time: some are for a moment only, as when it asks its pod how it is.
        let mut open = usize::MAX;
        for _ in 0..20 {
            open = open.min(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let limit = |descriptors: Option<u64>| {
            use rustix::process::{Resource, Rlimit, prlimit};
            let pid = rustix::process::Pid::from_raw(pid);
            prlimit(pid, Resource::Nofile, Rlimit { current: descriptors, maximum: Some(4096) })
        };
        // Room for what containerd asks, not for another pod.
        limit(Some(u64::try_from(open)? + 4))?;
        short.refuses("second", "", "Too many open files").await?;
        limit(Some(4096))?;
        short.recovers("second", "").await
    })
}

#[test]
fn a_kernel_that_comes_later_is_used_without_a_restart() -> Result<()> {
    on_pericarp(async |node| {
        let kernel = node.directory_for("guest")? + "/vmlinux";
        fs::copy("/usr/lib/pericarp/vmlinux", &kernel)?;
        let settings = format!("kernel = '{kernel}'");
        let mut short = Short::new(node, Controller::serve(&settings).await?).await?;
        let away = format!("{kernel}.away");
        fs::rename(&kernel, &away)?;
        short.refuses("second", "", &kernel).await?;
        fs::rename(&away, &kernel)?;
        short.recovers("second", "").await
    })
}
