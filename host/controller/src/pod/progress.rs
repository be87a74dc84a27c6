//! How far a pod's events have been handed on, and of which containers its guest may tell: on disk, so that a
//! controller that takes the pod over goes on where the last one stopped.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::machine::file;

/// Containers of one pod, at the same time or waiting for the news of their end to be handed on. The oldest is
/// forgotten when there are more.
const CONTAINERS_MAX: usize = 4096;

/// What is on record. It is written before anything that depends on it happens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The last event that containerd has taken, or that was none of its business.
    pub last_event: u64,
    /// Every container that was prepared and of which the deletion has not been told: the only ones of which
    /// the guest may tell events.
    containers: Vec<String>,
}

impl Progress {
    /// What a controller has left in the pod's directory. Without it, the guest's events are all taken again.
    pub fn read(directory: &Path) -> io::Result<Progress> {
        match fs::read(directory.join(file::PROGRESS)) {
            Ok(record) => Ok(serde_json::from_slice(&record)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Progress::default()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the record. It need not survive the host: the machine does not, either.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let path = directory.join(file::PROGRESS);
        let new = path.with_extension("json.new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, &path)
    }

    /// Adds a container.
    pub fn add(&mut self, container: &str) {
        if self.knows(container) {
            return;
        }
        if self.containers.len() == CONTAINERS_MAX {
            self.containers.remove(0);
        }
        self.containers.push(container.to_owned());
    }

    /// Whether the guest may tell of it.
    pub fn knows(&self, container: &str) -> bool {
        self.containers.iter().any(|known| known == container)
    }

    /// Forgets a container of which the guest has told everything.
    pub fn forget(&mut self, container: &str) {
        self.containers.retain(|known| known != container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Progress::read(directory.path()).unwrap(), Progress::default());
        let mut progress = Progress { last_event: 42, ..Progress::default() };
        for container in ["a", "b", "a"] {
            progress.add(container);
        }
        assert_eq!(progress.containers, ["a", "b"]);
        progress.write(directory.path()).unwrap();
        progress.forget("a");
        progress.write(directory.path()).unwrap();
        let read = Progress::read(directory.path()).unwrap();
        assert_eq!(read, progress);
        assert!(read.knows("b") && !read.knows("a") && read.last_event == 42);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_record_does_not_grow_for_ever() {
        let mut progress = Progress::default();
        for n in 0..2 * CONTAINERS_MAX {
            progress.add(&n.to_string());
        }
        assert_eq!(progress.containers.len(), CONTAINERS_MAX);
        assert!(progress.knows(&(2 * CONTAINERS_MAX - 1).to_string()) && !progress.knows("0"));
    }
}
