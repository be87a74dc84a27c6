//! A list of what exists on a node, by which a run is checked to leave nothing behind.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Trees in which every directory and socket counts: the runtimes' and the tests' own.
const TREES: [&str; 5] = ["/run/pericarp", "/run/containerd", "/run/netns", "/run/cni/ipam", "/run/pods"];

/// The command lines of the node's services, which tests start again.
const SERVICES: [&str; 2] = ["pericarp serve", "containerd"];

/// Objects that the first pod makes and all later ones share.
const SHARED: [&str; 14] = [
    "link cni0",
    // The kernel's module makes these two when it is loaded for the first pod with limited bandwidth.
    "link ifb0",
    "link ifb1",
    "cgroup /kubepods",
    // runc's, for pods that name no cgroup.
    "cgroup /k8s.io",
    "path /run/pods",
    "path /run/cni/ipam",
    "path /run/containerd/io.containerd.grpc.v1.cri/containers",
    "path /run/containerd/io.containerd.grpc.v1.cri/image-volumes",
    "path /run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "path /run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "path /run/containerd/runc",
    "path /run/containerd/runc/k8s.io",
    "path /run/containerd/s",
];

/// Processes, mounts, network namespaces, links, cgroups, sockets and directories, each as one line.
pub fn snapshot() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    processes(&mut found)?;
    mounts(&mut found)?;
    for link in fs::read_dir("/sys/class/net")? {
        found.insert(format!("link {}", link?.file_name().display()));
    }
    let cgroups = Path::new("/sys/fs/cgroup");
    walk(cgroups, &mut |path, kind| {
        if kind.is_dir() {
            found.insert(format!("cgroup /{}", path.strip_prefix(cgroups).unwrap_or(path).display()));
        }
    })?;
    for tree in TREES {
        walk(Path::new(tree), &mut |path, _| {
            found.insert(format!("path {}", path.display()));
        })?;
    }
    unix_sockets(&mut found)?;
    Ok(found)
}

/// Lines of `after` that are not in `before`, except those of objects that all pods share.
pub fn new_since(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Vec<String> {
    after.difference(before).filter(|line| !is_shared(line)).cloned().collect()
}

/// The beginning of the line of an image layer that containerd's erofs snapshotter has mounted.
const EROFS_LAYERS: &str = "mount erofs on /var/lib/containerd/io.containerd.snapshotter.v1.erofs/snapshots/";

fn is_shared(line: &str) -> bool {
    // A network's bridge, and what IPAM remembers of a network; an address is a pod's.
    let of_ipam = |path: &str| match path.split('/').collect::<Vec<_>>()[..] {
        [_network] => true,
        [_network, file] => file == "lock" || file.starts_with("last_reserved_ip."),
        _ => false,
    };
    SHARED.contains(&line)
        || line.starts_with("link cni-")
        // containerd keeps an image's layers mounted for as long as it has the image.
        || line.starts_with(EROFS_LAYERS)
        || line.strip_prefix("path /run/cni/ipam/").is_some_and(of_ipam)
}

fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    let own = std::process::id();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process may end at any moment, and kernel threads have no command line.
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        if pid == own || command.is_empty() {
            continue;
        }
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        // A test may have started another process of the service.
        let pid = if SERVICES.contains(&command.trim_end()) { String::new() } else { pid.to_string() };
        found.insert(format!("process {pid} {}", command.trim_end()));
    }
    Ok(())
}

fn mounts(found: &mut BTreeSet<String>) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(point), Some(separator)) = (fields.get(4), fields.iter().position(|field| *field == "-"))
        else {
            continue;
        };
        found.insert(format!("mount {} on {point}", fields.get(separator + 1).unwrap_or(&"?")));
    }
    Ok(())
}

fn unix_sockets(found: &mut BTreeSet<String>) -> Result<()> {
    let table = fs::read_to_string("/proc/net/unix").context("read the unix sockets")?;
    for line in table.lines() {
        // Listening sockets only: connections to them have the same path and come and go.
        if let [_, _, _, flags, _, _, _, path] = line.split_whitespace().collect::<Vec<_>>()[..]
            && flags == "00010000"
        {
            found.insert(format!("socket {path}"));
        }
    }
    Ok(())
}

/// Calls `visit` for everything in a tree. What has disappeared, or was never there, is skipped.
fn walk(directory: &Path, visit: &mut impl FnMut(&Path, fs::FileType)) -> Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries.flatten() {
        let path: PathBuf = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        visit(&path, kind);
        if kind.is_dir() {
            walk(&path, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(lines: &[&str]) -> BTreeSet<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn only_what_is_new_and_not_shared_is_a_leak() {
        let before = lines(&["link lo", "process 7 containerd"]);
        let after = lines(&["link lo", "link cni0", "link veth1"]);
        assert_eq!(new_since(&before, &after), ["link veth1"]);
    }

    #[test]
    fn an_address_that_is_still_reserved_is_a_leak_but_not_its_network() {
        let ipam = "path /run/cni/ipam/dual10";
        let after = ["", "/lock", "/last_reserved_ip.1", "/fd00:89::2"].map(|file| format!("{ipam}{file}"));
        assert_eq!(new_since(&BTreeSet::new(), &after.into()), ["path /run/cni/ipam/dual10/fd00:89::2"]);
    }

    #[test]
    fn a_snapshot_holds_this_machines_own_links_and_mounts() {
        let found = snapshot().unwrap();
        assert!(found.contains("link lo"));
        assert!(found.iter().any(|line| line.starts_with("mount ")));
    }
}
