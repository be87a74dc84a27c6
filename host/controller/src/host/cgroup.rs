//! The cgroup that a pod's machine is accounted in.
//!
//! kubelet makes a cgroup for each pod and names it in `cgroup_parent`; the machine goes into a child of
//! it, so that the pod's limits hold for the machine and `PodSandboxStats` counts it.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use pericarp_cgroup_stats::Counters;
use pericarp_protos::id::SandboxId;

const ROOT: &str = "/sys/fs/cgroup";

/// A pod's cgroup (version 2).
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup of sandbox `id`. `None` on a host without cgroup v2: machines are not accounted
    /// there.
    pub fn make(parent: &str, id: &SandboxId) -> io::Result<Option<Cgroup>> {
        let Some(path) = path_of(parent, id) else { return Ok(None) };
        let below = relative(parent, id);
        fs::create_dir_all(&path)?;
        enable_controllers(Path::new(ROOT), &below);
        Ok(Some(Cgroup { path }))
    }

    /// The cgroup's directory, in which a process can be started.
    pub fn directory(&self) -> io::Result<File> {
        File::open(&self.path)
    }
}

/// Where the cgroup of sandbox `id` is, or is to be made; `None` on a host without cgroup v2.
pub fn path_of(parent: &str, id: &SandboxId) -> Option<PathBuf> {
    let has_cgroups = Path::new(ROOT).join("cgroup.controllers").exists();
    has_cgroups.then(|| Path::new(ROOT).join(relative(parent, id)))
}

/// A cgroup's path as it is from the root of the hierarchy on; `None` for a path that is not in the hierarchy.
pub fn path_in_hierarchy(path: &Path) -> Option<PathBuf> {
    Some(Path::new("/").join(path.strip_prefix(ROOT).ok()?))
}

/// How many tasks whoever made the pod allows it (`pids.max` of the cgroup that a machine's is in); `None` if that is
/// not limited. kubelet sets it (`podPidsLimit`), and its kernel would count the machine's threads instead of the
/// pod's.
pub fn tasks_max(path: &Path) -> Option<u64> {
    fs::read_to_string(path.parent()?.join("pids.max")).ok()?.trim().parse().ok()
}

/// Keeps the processes of a cgroup on these of the host's CPUs and memory nodes; an empty list is no constraint.
pub fn pin(path: &Path, cpus: &str, mems: &str) -> io::Result<()> {
    for (file, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
        let file = path.join(file);
        if !list.is_empty() {
            fs::write(&file, list)?;
        } else if !fs::read_to_string(&file).unwrap_or_default().trim().is_empty() {
            // The kernel takes no empty list for a cgroup that has processes, so it is all that there is.
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let all = fs::read_to_string(path.with_file_name(format!("{name}.effective")))?;
            fs::write(&file, all)?;
        }
    }
    Ok(())
}

/// Lets every cgroup above `below` hand these on to those below it, as runc does (`fs2.CreateCgroupPath`): the kernel
/// gives a new cgroup none by itself.
fn enable_controllers(root: &Path, below: &Path) {
    let mut directory = root.to_owned();
    for component in below.components() {
        let list = |file: &str| fs::read_to_string(directory.join(file)).unwrap_or_default();
        let (has, hands_on) = (list("cgroup.controllers"), list("cgroup.subtree_control"));
        let is_in = |list: &str, name: &str| list.split_whitespace().any(|other| other == name);
        let missing = CONTROLLERS.into_iter().filter(|name| is_in(&has, name) && !is_in(&hands_on, name));
        let missing: Vec<_> = missing.map(|name| format!("+{name}")).collect();
        if !missing.is_empty() {
            // A cgroup that has processes of its own cannot: what the machine uses is then counted there only.
            if let Err(error) = fs::write(directory.join("cgroup.subtree_control"), missing.join(" ")) {
                tracing::debug!(?directory, %error, "a cgroup does not hand on its controllers");
            }
        }
        directory.push(component);
    }
}

/// What limits, counts or pins a machine.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Whether the kernel has killed a process of a cgroup because there was no memory for it (`memory.events`).
pub fn was_out_of_memory(path: &Path) -> bool {
    Counters::read(&path.join("memory.events")).get("oom_kill") > 0
}

/// Looks for a sandbox's cgroup in the whole hierarchy.
pub fn find(id: &SandboxId) -> io::Result<Option<PathBuf>> {
    find_below(Path::new(ROOT), &name(id), DEPTH_MAX)
}

fn find_below(directory: &Path, name: &str, depth: u32) -> io::Result<Option<PathBuf>> {
    if depth == 0 {
        return Ok(None);
    }
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
        // One that is removed meanwhile has nothing in it.
        match find_below(&entry.path(), name, depth - 1) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(None) => {}
            found => return found,
        }
    }
    Ok(None)
}

/// Removes the cgroup, and the parent if it is our own and empty.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(parent) = path.parent().filter(|parent| *parent == Path::new(ROOT).join(OWN_PARENT)) {
        // Other pods may still be in it.
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

/// Parent for pods that name none.
const OWN_PARENT: &str = "pericarp";

/// kubelet's pods are in the fourth level at most.
const DEPTH_MAX: u32 = 8;

fn name(id: &SandboxId) -> String {
    format!("pericarp-{id}")
}

/// The cgroup's path below the root. A systemd slice stands for the path of all its prefixes
/// (systemd.slice(5)): `a-b.slice` lies in `a.slice`.
fn relative(parent: &str, id: &SandboxId) -> PathBuf {
    let mut path = PathBuf::new();
    let components = Path::new(parent).components().filter_map(|component| match component {
        std::path::Component::Normal(name) => name.to_str(),
        _ => None,
    });
    for component in components {
        match component.strip_suffix(".slice") {
            Some(slice) if path.as_os_str().is_empty() && !slice.is_empty() => {
                let ends = slice.match_indices('-').map(|(index, _)| index).chain([slice.len()]);
                path.extend(ends.map(|end| format!("{}.slice", &slice[..end])));
            }
            _ => path.push(component),
        }
    }
    if path.as_os_str().is_empty() {
        path.push(OWN_PARENT);
    }
    path.push(name(id));
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> SandboxId {
        text.parse().unwrap()
    }

    #[test]
    fn a_plain_parent_is_used_as_it_is() {
        assert_eq!(relative("/kubepods/pod1", &id("x")), Path::new("kubepods/pod1/pericarp-x"));
    }

    #[test]
    fn a_systemd_slice_is_unfolded() {
        assert_eq!(
            relative("kubepods-burstable-pod1.slice", &id("x")),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/pericarp-x")
        );
    }

    #[test]
    fn a_constraint_is_lifted_by_all_that_the_parent_has() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("pod");
        fs::create_dir(&path).unwrap();
        for (file, all) in [("cpuset.cpus.effective", "0-7\n"), ("cpuset.mems.effective", "0-1\n")] {
            fs::write(parent.path().join(file), all).unwrap();
        }
        let pinned = |cpus, mems| {
            pin(&path, cpus, mems).unwrap();
            ["cpuset.cpus", "cpuset.mems"].map(|file| fs::read_to_string(path.join(file)).unwrap_or_default())
        };
        assert_eq!(pinned("", ""), ["", ""], "without cpusets there is nothing to lift");
        assert_eq!(pinned("2,3", ""), ["2,3", ""]);
        assert_eq!(pinned("", "1"), ["0-7\n", "1"]);
    }

    #[test]
    fn a_path_in_the_hierarchy_begins_at_its_root() {
        let path = path_in_hierarchy(Path::new("/sys/fs/cgroup/pericarp/pericarp-x"));
        assert_eq!(path, Some("/pericarp/pericarp-x".into()));
        assert_eq!(path_in_hierarchy(Path::new("/etc/x")), None);
    }

    #[test]
    fn a_parent_cannot_lead_out_of_the_hierarchy() {
        assert_eq!(relative("/../../etc", &id("x")), Path::new("etc/pericarp-x"));
        assert_eq!(relative("", &id("x")), Path::new("pericarp/pericarp-x"));
    }
}
