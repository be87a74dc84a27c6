//! The pod's volumes in the guest.
//!
//! The share announces each volume as a file system of its own, which the kernel mounts where it is first looked at. Were
//! that in a container's mount namespace, every container would have a file system of its own for the same volume: no
//! locks between them, no sockets, no notifications, no mapped pages in common. So the agent looks first; what it has is
//! in every namespace that is made afterwards.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;
use pericarp_protos::guest::{SHARE_DIR, VOLUMES};
use rustix::fs::{Mode, OFlags};

/// How many containers have each volume.
#[derive(Debug, Default)]
pub struct Volumes(Mutex<HashMap<PathBuf, Users>>);

/// How many containers have a volume. Locked while it is mounted or unmounted, so that neither overtakes the other.
type Users = Arc<tokio::sync::Mutex<usize>>;

/// A container's part in its volumes. The last to let go of one unmounts it.
#[derive(Debug)]
pub struct Held {
    volumes: Arc<Volumes>,
    paths: Vec<PathBuf>,
}

impl Volumes {
    /// Has the volumes of a spec mounted, for as long as the answer lives.
    pub async fn hold(self: &Arc<Self>, spec: &Spec) -> Held {
        let mut held = Held { volumes: Arc::clone(self), paths: Vec::new() };
        for path in sources(spec) {
            let users = Arc::clone(self.all().entry(path.clone()).or_default());
            let mut count = users.lock().await;
            *count += 1;
            held.paths.push(path.clone());
            // Elsewhere, because the host's file system may take its time. What goes wrong shows when it is used.
            let _ = tokio::task::spawn_blocking(move || look_at(&path)).await;
        }
        held
    }

    async fn let_go(&self, path: PathBuf) {
        let Some(users) = self.all().get(&path).cloned() else { return };
        let mut count = users.lock().await;
        *count -= 1;
        if *count == 0 {
            let mount = path.clone();
            // Elsewhere too: the kernel tells the host of the end, and waits for its answer. A file is no mount of its
            // own; nor is what could not be looked at.
            let unmounting = move || umount2(&mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let _ = tokio::task::spawn_blocking(unmounting).await;
        }
        drop(count);
        let mut all = self.all();
        // The map's and this one: nobody waits for it, and nobody can begin to while the map is locked.
        if Arc::strong_count(&users) == 2 && users.try_lock().is_ok_and(|count| *count == 0) {
            all.remove(&path);
        }
    }

    fn all(&self) -> MutexGuard<'_, HashMap<PathBuf, Users>> {
        // Each change is whole after one statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Lets go of the volumes, and waits until those that nobody else has are unmounted.
    pub async fn release(mut self) {
        for path in std::mem::take(&mut self.paths) {
            self.volumes.let_go(path).await;
        }
    }
}

impl Drop for Held {
    /// For a container whose making was given up: nobody waits.
    fn drop(&mut self) {
        let paths = std::mem::take(&mut self.paths);
        if let (false, Ok(runtime)) = (paths.is_empty(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(Held { volumes: Arc::clone(&self.volumes), paths }.release());
        }
    }
}

/// The volumes that a container mounts, each once.
fn sources(spec: &Spec) -> Vec<PathBuf> {
    let directory = Path::new(SHARE_DIR).join(VOLUMES);
    let mounts = spec.mounts().iter().flatten();
    let mut paths: Vec<PathBuf> = mounts
        .filter_map(|mount| mount.source().clone())
        .filter(|source| source.parent() == Some(&directory))
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// Opening a directory as one mounts what is to be mounted there (kernel: `fs/namei.c`, `traverse_mounts`).
fn look_at(path: &Path) {
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
        let found = sources(&spec(&[&one, "/run/pericarp/etc/hosts", &one, SHARE_DIR, "proc"]));
        assert_eq!(found, [PathBuf::from(one)]);
    }

    fn volume() -> (PathBuf, Spec) {
        let path = format!("{SHARE_DIR}/{VOLUMES}/none");
        (PathBuf::from(&path), spec(&[&path]))
    }

    #[tokio::test]
    async fn a_volume_is_held_until_its_last_container_lets_go() {
        let volumes = Arc::new(Volumes::default());
        let (path, spec) = volume();
        let first = volumes.hold(&spec).await;
        let second = volumes.hold(&spec).await;
        first.release().await;
        assert_eq!(*volumes.all()[&path].try_lock().unwrap(), 1);
        second.release().await;
        assert!(volumes.all().is_empty());
    }

    #[tokio::test]
    async fn a_volume_that_nobody_waits_for_is_let_go_all_the_same() {
        let volumes = Arc::new(Volumes::default());
        let (_, spec) = volume();
        drop(volumes.hold(&spec).await);
        while !volumes.all().is_empty() {
            tokio::task::yield_now().await;
        }
    }

    /// The agent has one thread: a host that takes its time must not hold up everything else in the pod.
    #[tokio::test]
    async fn a_volume_that_is_being_unmounted_is_waited_for_by_whoever_wants_it_and_nobody_else() {
        let volumes = Arc::new(Volumes::default());
        let (path, spec) = volume();
        let first = volumes.hold(&spec).await;
        let users = Arc::clone(&volumes.all()[&path]);
        let unmounting = users.lock().await;
        let mut release = std::pin::pin!(first.release());
        let mut hold = std::pin::pin!(volumes.hold(&spec));
        assert!(futures::poll!(&mut release).is_pending());
        assert!(futures::poll!(&mut hold).is_pending());
        let other = self::spec(&[&format!("{SHARE_DIR}/{VOLUMES}/other")]);
        volumes.hold(&other).await.release().await;
        drop(unmounting);
        let (second, ()) = tokio::join!(hold, release);
        assert_eq!(*users.try_lock().unwrap(), 1, "it is mounted for the second");
        drop(users);
        second.release().await;
        assert!(volumes.all().is_empty());
    }
}
