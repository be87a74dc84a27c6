//! The cgroups of pods, which kubelet would make and remove.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// The parent of all pods' cgroups. Kubelet has one of the same name.
const PODS_CGROUP: &str = "/sys/fs/cgroup/kubepods";

/// Makes a pod's cgroup, as kubelet does before it calls `RunPodSandbox`; returns the `cgroup_parent` for that call.
pub(crate) fn make(name: &str) -> Result<String> {
    let parent = PathBuf::from(PODS_CGROUP);
    let cgroup = parent.join(name);
    fs::create_dir_all(&cgroup).with_context(|| format!("make {}", cgroup.display()))?;
    for directory in [&parent, &cgroup] {
        fs::write(directory.join("cgroup.subtree_control"), "+cpuset +cpu +io +memory +pids")
            .with_context(|| format!("delegate controllers in {}", directory.display()))?;
    }
    Ok(format!("/kubepods/{name}"))
}

/// Limits the tasks in a pod's cgroup, as kubelet does with `podPidsLimit`.
pub(crate) fn limit_tasks(name: &str, max: u32) -> Result<()> {
    let file = Path::new(PODS_CGROUP).join(name).join("pids.max");
    fs::write(&file, max.to_string()).with_context(|| format!("write {}", file.display()))
}

/// Removes the cgroups of all pods whose names begin with `prefix`.
pub(super) async fn remove_all(prefix: &str) -> Result<()> {
    let parent = Path::new(PODS_CGROUP);
    for name in children(parent)? {
        if name.starts_with(prefix) {
            remove(&parent.join(name)).await?;
        }
    }
    Ok(())
}

/// Removes a pod's cgroup. Processes in it belong to a pod that nobody has ended; the error names them.
async fn remove(cgroup: &Path) -> Result<()> {
    // The kernel lets go of a dead process's cgroup a moment after the parent has seen the process die.
    for _ in 0..300 {
        for child in children(cgroup)? {
            let _ = fs::remove_dir(cgroup.join(child));
        }
        if fs::remove_dir(cgroup).is_ok() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut processes = fs::read_to_string(cgroup.join("cgroup.procs"))?;
    for child in children(cgroup)? {
        processes += &fs::read_to_string(cgroup.join(&child).join("cgroup.procs"))?;
    }
    ensure!(processes.is_empty(), "processes {processes:?} are left in {}", cgroup.display());
    bail!("{} cannot be removed", cgroup.display())
}

/// Names of the directories in a directory; none if it does not exist.
fn children(directory: &Path) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}
