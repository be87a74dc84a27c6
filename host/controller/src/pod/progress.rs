//! How far a pod's events have been handed on, and of which containers its guest may tell: on disk, so that a
//! controller that takes the pod over goes on where the last one stopped.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pericarp_protos::id::ContainerId;
use serde::{Deserialize, Serialize};

use crate::host::{
    machine::file,
    replace::{Durability, replace},
};

/// Containers of one pod, at the same time or waiting for the news of their end to be handed on. The oldest is
/// forgotten when there are more.
const CONTAINERS_MAX: usize = 4096;

/// What is on record. It is written before anything that depends on it happens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The last event that was taken, or that was nobody's business.
    pub last_event: u64,
    /// Every container that was prepared and of which the deletion has not been told: the only ones of which
    /// the guest may tell events.
    containers: Vec<String>,
}

impl Progress {
    /// Reads what a controller has left in the pod's directory. Without it, the guest's events are all taken again.
    pub fn read(directory: &Path) -> io::Result<Self> {
        match fs::read(directory.join(file::PROGRESS)) {
            Ok(record) => Ok(serde_json::from_slice(&record)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
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

/// A pod's progress and its file.
#[derive(Debug)]
pub struct ProgressFile {
    path: PathBuf,
    progress: Mutex<Progress>,
}

impl ProgressFile {
    /// For a pod of which nothing has been handed on.
    pub fn new(directory: &Path) -> Self {
        Self { path: directory.join(file::PROGRESS), progress: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        // Each change is one call: what a panic leaves is sound.
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on from here, without writing it.
    pub fn resume(&self, progress: Progress) {
        *self.lock() = progress;
    }

    /// Changes it and replaces the file, which need not survive the host: the machine does not, either. It is in memory
    /// (`/run`), so that this does not wait.
    pub fn change(&self, change: impl FnOnce(&mut Progress)) -> io::Result<()> {
        // Written under the lock, so that an older record never replaces a newer one.
        let mut progress = self.lock();
        change(&mut progress);
        replace(&self.path, &serde_json::to_vec(&*progress)?, Durability::Process)
    }

    /// The last event that was taken.
    pub fn last_event(&self) -> u64 {
        self.lock().last_event
    }

    /// The containers of which the guest may tell.
    pub fn containers(&self) -> Vec<ContainerId> {
        self.lock().containers.iter().filter_map(|id| id.parse().ok()).collect()
    }

    /// Whether a container is, or was, this pod's.
    pub fn knows(&self, container: &str) -> bool {
        self.lock().knows(container)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Progress::read(directory.path()).unwrap(), Progress::default());
        let file = ProgressFile::new(directory.path());
        file.change(|progress| {
            progress.last_event = 42;
            for container in ["a", "b", "a"] {
                progress.add(container);
            }
        })
        .unwrap();
        assert_eq!(Progress::read(directory.path()).unwrap().containers, ["a", "b"]);
        file.change(|progress| progress.forget("a")).unwrap();
        let read = Progress::read(directory.path()).unwrap();
        assert!(read.knows("b") && !read.knows("a") && read.last_event == 42);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        let next = ProgressFile::new(directory.path());
        next.resume(read);
        assert!(next.knows("b") && !next.knows("a") && next.last_event() == 42);
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
