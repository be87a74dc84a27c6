//! The guest's cgroup hierarchy: the parent of all containers' cgroups, and its limits.

use std::{
    fs, io,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Tasks that the containers together leave to the agent and its helpers, so that a fork bomb does not keep the agent
/// from ending it.
const RESERVED_TASKS: u64 = 256;

/// Bytes of memory that the containers together leave to the agent and its helpers, for the same reason.
const RESERVED_MEMORY: u64 = 16 << 20;

/// Makes the cgroup `name` (a path below the root of the hierarchy) able to hold containers' cgroups, with every
/// controller that the kernel has, and limits it as [`reserve_for_agent`] does.
pub fn delegate(name: &str) -> io::Result<()> {
    let root = Path::new(ROOT);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: Vec<_> = controllers.split_whitespace().map(|controller| format!("+{controller}")).collect();
    let enable = enable.join(" ");
    let parent = root.join(name.trim_start_matches('/'));
    fs::create_dir_all(&parent)?;
    for cgroup in [root, &parent] {
        fs::write(cgroup.join("cgroup.subtree_control"), &enable)?;
    }
    reserve_for_agent(name)
}

/// Limits what all containers may use together, according to what the guest has now: its memory may have changed.
///
/// This may take long, because the kernel reclaims memory before it accepts a lower limit.
pub fn reserve_for_agent(parent: &str) -> io::Result<()> {
    let parent = Path::new(ROOT).join(parent.trim_start_matches('/'));
    // A kernel without one of these controllers has no such file, and there is nothing to limit then.
    let limits = [("pids.max", tasks_of_pod()), ("memory.max", memory_for_containers())];
    for (file, limit) in limits {
        if let Some(limit) = limit.filter(|_| parent.join(file).exists()) {
            fs::write(parent.join(file), limit.to_string())?;
        }
    }
    Ok(())
}

/// How many tasks the pod may have by the word of whoever made it.
static POD_TASKS_MAX: AtomicU64 = AtomicU64::new(u64::MAX);

/// Limits how many tasks the containers below `parent` may have together, as kubelet does with a pod's processes on the
/// host (`podPidsLimit`); 0 is no limit.
pub fn limit_pod_tasks(parent: &str, max: u64) -> io::Result<()> {
    if max == 0 {
        return Ok(());
    }
    POD_TASKS_MAX.store(max, Ordering::Relaxed);
    let file = Path::new(ROOT).join(parent.trim_start_matches('/')).join("pids.max");
    match tasks_of_pod().filter(|_| file.exists()) {
        Some(limit) => fs::write(file, limit.to_string()),
        None => Ok(()),
    }
}

/// How many tasks all containers may have together, for their parent's `pids.max`.
fn tasks_of_pod() -> Option<u64> {
    Some(tasks_for_containers()?.min(POD_TASKS_MAX.load(Ordering::Relaxed)))
}

/// How many tasks the guest has for all containers together.
pub(super) fn tasks_for_containers() -> Option<u64> {
    let limit = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?.trim().parse().ok();
    let threads: u64 = limit("threads-max")?;
    let pids: u64 = limit("pid_max")?;
    Some(threads.min(pids).saturating_sub(RESERVED_TASKS).max(RESERVED_TASKS))
}

/// How many bytes of memory all containers may have together. Huge pages that are reserved do not count as memory.
fn memory_for_containers() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name: &str| {
        let kilobytes =
            meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix(" kB")?;
        Some(kilobytes.parse::<u64>().ok()? << 10)
    };
    let total = bytes("MemTotal:")?.saturating_sub(bytes("Hugetlb:").unwrap_or(0));
    // In a very small guest the agent gets an eighth instead, so that most is left to the containers.
    Some(total - RESERVED_MEMORY.min(total / 8))
}
