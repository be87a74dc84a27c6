//! The pod's volumes in the guest, and its containers' root file systems.
//!
//! The share announces each of them as a file system of its own, which the kernel mounts in the namespace that accesses
//! it first. If each container did that in its own mount namespace, containers that share a volume would have different
//! file systems for it, without common locks, sockets, notifications and mapped pages. So the agent accesses the
//! volumes first. Its mounts are in every mount namespace that is created afterwards.
//!
//! It does so with root file systems for another reason. A container's last process would otherwise unmount its root as
//! it ends. If it was killed while pages of a file were being read ahead, the kernel releases that file only when they
//! have arrived, and does not wait for the host's answer to that. An unmount before the answer is a bug that stops the
//! kernel (Linux 6.12, `fs/fuse/file.c`, `fuse_readpages_end`: "Busy inodes after unmount").

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use oci_spec::runtime::Spec;
use pericarp_protos::guest::{SHARE_DIR, VOLUMES};
use rustix::{
    fs::{Mode, OFlags},
    mount::{UnmountFlags, unmount},
};

/// How many containers use each volume.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashMap<PathBuf, UserCount>>);

/// How many containers use a volume. Locked while the volume is mounted or unmounted, so that one waits for the other.
type UserCount = Arc<tokio::sync::Mutex<usize>>;

/// A container's use of its volumes. The last container to release a volume unmounts it.
#[derive(Debug)]
pub struct MountedVolumes {
    volumes: Arc<Volumes>,
    paths: Vec<PathBuf>,
}

impl Volumes {
    /// Mounts the volumes and the root of a spec. They stay mounted until the result is released or dropped.
    pub async fn mount(self: &Arc<Self>, spec: &Spec) -> MountedVolumes {
        let mut mounted = MountedVolumes { volumes: Arc::clone(self), paths: Vec::new() };
        for path in file_systems_of(spec) {
            let users = Arc::clone(self.counts().entry(path.clone()).or_default());
            let mut count = users.lock().await;
            *count += 1;
            mounted.paths.push(path.clone());
            // On another thread, because the host's file system may be slow. An error shows when the container is
            // created.
            let _ = tokio::task::spawn_blocking(move || trigger_automount(&path)).await;
        }
        mounted
    }

    async fn release(&self, path: PathBuf) {
        let Some(users) = self.counts().get(&path).cloned() else { return };
        let mut count = users.lock().await;
        *count -= 1;
        if *count == 0 {
            let mount = path.clone();
            // On another thread, because the kernel waits for the host's answer.
            let _ = tokio::task::spawn_blocking(move || unmount_when_settled(&mount)).await;
        }
        drop(count);
        let mut counts = self.counts();
        // Only the map and this function have the count: nobody waits for its lock, and nobody can begin to while the
        // map is locked.
        if Arc::strong_count(&users) == 2 && users.try_lock().is_ok_and(|count| *count == 0) {
            counts.remove(&path);
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<PathBuf, UserCount>> {
        // Each change is a single statement, so the map is consistent after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MountedVolumes {
    /// Releases the volumes, and waits until those that no other container uses are unmounted.
    pub async fn release(mut self) {
        for path in std::mem::take(&mut self.paths) {
            self.volumes.release(path).await;
        }
    }
}

impl Drop for MountedVolumes {
    /// Releases the volumes of a container that could not be created, without waiting.
    fn drop(&mut self) {
        let paths = std::mem::take(&mut self.paths);
        if let (false, Ok(runtime)) = (paths.is_empty(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(MountedVolumes { volumes: Arc::clone(&self.volumes), paths }.release());
        }
    }
}

/// The paths of the share's file systems that a container uses, each once: the volumes that it mounts, and its root
/// unless that is made of disks.
fn file_systems_of(spec: &Spec) -> Vec<PathBuf> {
    let share = Path::new(SHARE_DIR);
    let volumes = share.join(VOLUMES);
    let mounts = spec.mounts().iter().flatten();
    let mut paths: Vec<PathBuf> = mounts
        .filter_map(|mount| mount.source().clone())
        .filter(|source| source.parent() == Some(&volumes))
        .collect();
    let root = spec.root().as_ref().map(|root| root.path().clone());
    paths.extend(root.filter(|root| root != share && root.starts_with(share)));
    paths.sort();
    paths.dedup();
    paths
}

/// Unmounts a file system of the share that no process uses any more, when the host has answered all that they have
/// asked for. This fails for a volume that is a single file, and for one that could not be mounted.
fn unmount_when_settled(path: &Path) {
    // The host answers in order, and the kernel waits for both of these answers. Before the first one, the pages have
    // arrived that were being read for processes that are dead now; before the second one, their files are released.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    drop(rustix::fs::open(path, flags, Mode::empty()));
    let _ = unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
}

/// Opens `path` as a directory, at which the kernel mounts the volume (kernel: `fs/namei.c`, `traverse_mounts`).
fn trigger_automount(path: &Path) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let _ = rustix::fs::open(path, flags, Mode::empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(sources: &[&str]) -> Spec {
        let mounts: Vec<_> = sources
            .iter()
            .map(|source| serde_json::json!({ "destination": "/x", "type": "bind", "source": source }))
            .collect();
        serde_json::from_value(serde_json::json!({ "ociVersion": "1.2.0", "mounts": mounts })).unwrap()
    }

    #[test]
    fn only_volumes_of_the_share_are_looked_at_and_each_once() {
        let one = format!("{SHARE_DIR}/{VOLUMES}/1");
        let found = file_systems_of(&spec(&[&one, "/run/pericarp/etc/hosts", &one, SHARE_DIR, "proc"]));
        assert_eq!(found, [PathBuf::from(one)]);
    }

    #[test]
    fn a_root_in_the_share_is_the_agents_mount_and_no_other_root_is() {
        let of_root = |path: &str| {
            let spec = serde_json::json!({ "ociVersion": "1.2.0", "root": { "path": path } });
            file_systems_of(&serde_json::from_value(spec).unwrap())
        };
        let root = format!("{SHARE_DIR}/c1/rootfs");
        assert_eq!(of_root(&root), [PathBuf::from(&root)]);
        assert_eq!(of_root("/run/pericarp/layers/c1"), Vec::<PathBuf>::new());
        assert_eq!(of_root(SHARE_DIR), Vec::<PathBuf>::new());
    }

    fn volume() -> (PathBuf, Spec) {
        let path = format!("{SHARE_DIR}/{VOLUMES}/none");
        (PathBuf::from(&path), spec(&[&path]))
    }

    #[tokio::test]
    async fn a_volume_is_held_until_its_last_container_lets_go() {
        let volumes = Arc::new(Volumes::default());
        let (path, spec) = volume();
        let first = volumes.mount(&spec).await;
        let second = volumes.mount(&spec).await;
        first.release().await;
        assert_eq!(*volumes.counts()[&path].try_lock().unwrap(), 1);
        second.release().await;
        assert!(volumes.counts().is_empty());
    }

    #[tokio::test]
    async fn a_volume_that_nobody_waits_for_is_let_go_all_the_same() {
        let volumes = Arc::new(Volumes::default());
        let (_, spec) = volume();
        drop(volumes.mount(&spec).await);
        while !volumes.counts().is_empty() {
            tokio::task::yield_now().await;
        }
    }

    /// The agent has one thread: a host that takes its time must not hold up everything else in the pod.
    #[tokio::test]
    async fn a_volume_that_is_being_unmounted_is_waited_for_by_whoever_wants_it_and_nobody_else() {
        let volumes = Arc::new(Volumes::default());
        let (path, spec) = volume();
        let first = volumes.mount(&spec).await;
        let users = Arc::clone(&volumes.counts()[&path]);
        let unmounting = users.lock().await;
        let mut release = std::pin::pin!(first.release());
        let mut mount = std::pin::pin!(volumes.mount(&spec));
        assert!(futures::poll!(&mut release).is_pending());
        assert!(futures::poll!(&mut mount).is_pending());
        let other = self::spec(&[&format!("{SHARE_DIR}/{VOLUMES}/other")]);
        volumes.mount(&other).await.release().await;
        drop(unmounting);
        let (second, ()) = tokio::join!(mount, release);
        assert_eq!(*users.try_lock().unwrap(), 1, "it is mounted for the second");
        drop(users);
        second.release().await;
        assert!(volumes.counts().is_empty());
    }
}
