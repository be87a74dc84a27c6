//! The volumes in a share: each source once, however many of the pod's containers have it.
//!
//! A mount of its own for each container would be a file system of its own to the guest. Containers that share a volume
//! would then share its bytes and nothing else: no locks, no sockets, no notifications of changes, no mapped pages.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::host::replace::{Durability, replace};

/// Who uses which volume, kept beside the share for the next controller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeUsers {
    /// By the volume's name in the share.
    volumes: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    /// On the host. Two sources that happened to have the same name would be noticed by it.
    source: PathBuf,
    /// Containers.
    users: BTreeSet<String>,
    /// Whether any of them has ever been allowed to write.
    writable: bool,
}

/// What is to be done for one more user of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountAction {
    /// It is there.
    Nothing,
    /// It is there, and has to become writable.
    Writable,
    /// It is not there, and has to be mounted.
    Mount,
}

impl VolumeUsers {
    /// Reads the file; nobody uses anything if there is none.
    pub fn load(file: &Path) -> io::Result<VolumeUsers> {
        match fs::read(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(VolumeUsers::default()),
            bytes => Ok(serde_json::from_slice(&bytes?)?),
        }
    }

    /// Replaces the file in one step.
    pub fn store(&self, file: &Path) -> io::Result<()> {
        replace(file, &serde_json::to_vec(self)?, Durability::Process)
    }

    /// Adds a user.
    pub fn add(
        &mut self,
        name: &str,
        source: &Path,
        container: &str,
        writable: bool,
    ) -> io::Result<MountAction> {
        let needed = match self.volumes.get(name) {
            None => MountAction::Mount,
            Some(entry) if entry.source != source => {
                return Err(io::Error::other(format!("it has the name of {}", entry.source.display())));
            }
            Some(entry) if writable && !entry.writable => MountAction::Writable,
            Some(_) => MountAction::Nothing,
        };
        let entry = self.volumes.entry(name.to_owned()).or_default();
        source.clone_into(&mut entry.source);
        entry.users.insert(container.to_owned());
        entry.writable |= writable;
        Ok(needed)
    }

    /// Whether a container uses any.
    pub fn has(&self, container: &str) -> bool {
        self.volumes.values().any(|entry| entry.users.contains(container))
    }

    /// Removes a user from every volume; returns the names of those that nobody uses any more.
    pub fn remove(&mut self, container: &str) -> Vec<String> {
        for entry in self.volumes.values_mut() {
            entry.users.remove(container);
        }
        let unused: Vec<String> = self
            .volumes
            .iter()
            .filter(|(_, entry)| entry.users.is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        self.volumes.retain(|_, entry| !entry.users.is_empty());
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_mounted_for_its_first_user_and_unmounted_after_its_last() {
        let mut users = VolumeUsers::default();
        let source = Path::new("/data");
        assert_eq!(users.add("v", source, "a", true).unwrap(), MountAction::Mount);
        assert_eq!(users.add("v", source, "b", false).unwrap(), MountAction::Nothing);
        assert_eq!(users.remove("a"), Vec::<String>::new());
        assert_eq!(users.remove("b"), ["v"]);
        assert_eq!(users.remove("b"), Vec::<String>::new());
        assert_eq!(users, VolumeUsers::default());
    }

    #[test]
    fn a_volume_becomes_writable_with_the_first_user_who_may_write() {
        let mut users = VolumeUsers::default();
        let source = Path::new("/data");
        assert_eq!(users.add("v", source, "a", false).unwrap(), MountAction::Mount);
        assert_eq!(users.add("v", source, "b", true).unwrap(), MountAction::Writable);
        assert_eq!(users.add("v", source, "c", true).unwrap(), MountAction::Nothing);
    }

    #[test]
    fn two_sources_never_share_a_name() {
        let mut users = VolumeUsers::default();
        users.add("v", Path::new("/one"), "a", false).unwrap();
        assert!(users.add("v", Path::new("/two"), "b", false).is_err());
    }

    #[test]
    fn the_next_controller_reads_what_was_stored() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("volumes.json");
        assert_eq!(VolumeUsers::load(&file).unwrap(), VolumeUsers::default());
        let mut users = VolumeUsers::default();
        users.add("v", Path::new("/data"), "a", true).unwrap();
        users.store(&file).unwrap();
        assert_eq!(VolumeUsers::load(&file).unwrap(), users);
        fs::write(&file, "{").unwrap();
        assert!(VolumeUsers::load(&file).is_err());
    }
}
