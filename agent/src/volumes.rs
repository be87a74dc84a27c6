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
pub struct Volumes(Mutex<HashMap<PathBuf, usize>>);

/// A container's part in its volumes. The last to drop one unmounts it.
#[derive(Debug)]
pub struct Held {
    volumes: Arc<Volumes>,
    paths: Vec<PathBuf>,
}

impl Volumes {
    /// Has the volumes of a spec mounted, for as long as the answer lives.
    pub async fn hold(self: &Arc<Self>, spec: &Spec) -> Held {
        let paths = sources(spec);
        for path in &paths {
            *self.users().entry(path.clone()).or_default() += 1;
        }
        let held = Held { volumes: Arc::clone(self), paths: paths.clone() };
        // Elsewhere, because the host's file system may take its time. What goes wrong shows when it is used.
        let looking = tokio::task::spawn_blocking(move || paths.iter().for_each(|path| look_at(path)));
        let _ = looking.await;
        held
    }

    fn users(&self) -> MutexGuard<'_, HashMap<PathBuf, usize>> {
        // Each change is whole after one statement.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut users = self.volumes.users();
        for path in &self.paths {
            let left = users.get_mut(path).map_or(0, |count| {
                *count -= 1;
                *count
            });
            if left == 0 {
                users.remove(path);
                // A file is no mount of its own; nor is what could not be looked at.
                let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            }
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

    #[tokio::test]
    async fn a_volume_is_held_until_its_last_container_lets_go() {
        let volumes = Arc::new(Volumes::default());
        let path = format!("{SHARE_DIR}/{VOLUMES}/none");
        let first = volumes.hold(&spec(&[&path])).await;
        let second = volumes.hold(&spec(&[&path])).await;
        drop(first);
        assert_eq!(volumes.users().get(Path::new(&path)), Some(&1));
        drop(second);
        assert!(volumes.users().is_empty());
    }
}
