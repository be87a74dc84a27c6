//! What a pod owns on the host: one list, used to undo a start, to end a pod, to take one over and to look into it.

use std::{io, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    fault::FaultPoint,
    host::{cgroup, mounts, network, process::Process, share::place::Place},
};

/// Something that has to be removed. What is on the list may not have been made yet, or may have gone: each is listed
/// before it is made, and removing what is not there is done at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Resource {
    /// The pod's directory with its logs.
    Directory {
        path: PathBuf,
    },
    /// Taps and redirections in the pod's network namespace.
    Network {
        netns: PathBuf,
    },
    /// What the guest sees of the host, of a machine that an older version has started: mounts in a directory. Others
    /// have it in their own mount namespaces.
    Share {
        path: PathBuf,
    },
    Cgroup {
        path: PathBuf,
    },
    Machine {
        #[serde(flatten)]
        process: Process,
    },
    /// Stands for any of them in tests.
    #[cfg(test)]
    #[serde(skip_deserializing)]
    Fake {
        #[serde(skip)]
        fake: tests::Fake,
    },
}

impl Resource {
    /// What removing it is, to complete "cannot …".
    fn action(&self) -> &'static str {
        match self {
            Self::Directory { .. } => "remove the pod's directory",
            Self::Network { .. } => "take the pod's network from its machine",
            Self::Share { .. } => "remove the pod's share",
            Self::Cgroup { .. } => "remove the pod's cgroup",
            Self::Machine { .. } => "end the pod's machine",
            #[cfg(test)]
            Self::Fake { .. } => "remove what is busy",
        }
    }

    fn fault_point(&self) -> FaultPoint {
        match self {
            Self::Directory { .. } | Self::Share { .. } => FaultPoint::UndoDirectory,
            Self::Network { .. } => FaultPoint::UndoNetwork,
            Self::Cgroup { .. } => FaultPoint::UndoCgroup,
            Self::Machine { .. } => FaultPoint::UndoMachine,
            #[cfg(test)]
            Self::Fake { .. } => FaultPoint::UndoDirectory,
        }
    }

    /// Removes it. Blocks: a machine takes milliseconds to end, and a mount may wait for a server.
    fn remove(&self) -> io::Result<()> {
        match self {
            Self::Directory { path } => Ok(mounts::remove_tree(path)?),
            Self::Network { netns } => network::remove(netns),
            Self::Share { path } => {
                mounts::detach(path)?;
                Ok(mounts::remove_tree(path)?)
            }
            Self::Cgroup { path } => cgroup::remove(path),
            Self::Machine { process } => process.kill(),
            #[cfg(test)]
            Self::Fake { fake } => fake.remove(),
        }
    }

    /// Whether it stays when the pod is stopped: its logs do, until the pod is removed.
    fn outlives_stop(&self) -> bool {
        matches!(self, Self::Directory { .. })
    }
}

/// How much of a pod is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// What runs. The directory with the logs stays.
    Running,
    Everything,
}

/// All that a pod owns, in the order in which it is made. It is removed in the reverse order, and only when it is asked
/// to: never because a value goes out of scope.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Owned {
    resources: Vec<Resource>,
}

impl Owned {
    /// Adds what is about to be made.
    pub fn add(&mut self, resource: Resource) {
        self.resources.push(resource);
    }

    /// Whether there is nothing left of that extent.
    #[cfg(test)]
    pub fn is_empty(&self, extent: Extent) -> bool {
        match extent {
            Extent::Running => self.resources.iter().all(Resource::outlives_stop),
            Extent::Everything => self.resources.is_empty(),
        }
    }

    /// The process of the machine, if there is one.
    pub fn machine(&self) -> Option<Process> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Machine { process } => Some(*process),
            _ => None,
        })
    }

    /// Where the share is that the guest sees.
    pub fn share(&self) -> Place {
        let of_older_version = self.resources.iter().find_map(|resource| match resource {
            Resource::Share { path } => Some(Place::Host(path.clone())),
            _ => None,
        });
        of_older_version.or_else(|| self.machine().map(Place::Machine)).unwrap_or(Place::Nowhere)
    }

    /// The cgroup of the machine, if there is one.
    pub fn cgroup(&self) -> Option<PathBuf> {
        self.resources.iter().find_map(|resource| match resource {
            Resource::Cgroup { path } => Some(path.clone()),
            _ => None,
        })
    }

    /// Removes all of that extent. What cannot be removed stays on the list, with all that was added before it, and so
    /// can be tried again; what it was is in the error. Blocks.
    pub fn remove(&mut self, extent: Extent) -> io::Result<()> {
        while let Some(resource) = self.resources.last() {
            if extent == Extent::Running && resource.outlives_stop() {
                break;
            }
            resource.fault_point().reached();
            if let Err(error) = resource.remove() {
                return Err(io::Error::new(error.kind(), format!("cannot {}: {error}", resource.action())));
            }
            self.resources.pop();
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    type Removal = Arc<Mutex<dyn FnMut() -> io::Result<()> + Send>>;

    /// A resource of which a test says what its removal does.
    #[derive(Clone)]
    pub struct Fake(Removal);

    impl Fake {
        pub fn resource(remove: impl FnMut() -> io::Result<()> + Send + 'static) -> Resource {
            Resource::Fake { fake: Self(Arc::new(Mutex::new(remove))) }
        }

        pub fn remove(&self) -> io::Result<()> {
            (self.0.lock().unwrap())()
        }
    }

    impl std::fmt::Debug for Fake {
        fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("Fake")
        }
    }

    impl PartialEq for Fake {
        fn eq(&self, other: &Self) -> bool {
            Arc::ptr_eq(&self.0, &other.0)
        }
    }

    impl Eq for Fake {}

    impl Default for Fake {
        fn default() -> Self {
            Self(Arc::new(Mutex::new(|| Ok(()))))
        }
    }

    fn recorder(log: &Arc<Mutex<Vec<u8>>>, number: u8) -> Resource {
        let log = Arc::clone(log);
        Fake::resource(move || {
            log.lock().unwrap().push(number);
            Ok(())
        })
    }

    #[test]
    fn what_is_owned_is_removed_in_reverse_order() {
        let log = Arc::default();
        let mut owned = Owned::default();
        owned.add(recorder(&log, 1));
        owned.add(recorder(&log, 2));
        owned.remove(Extent::Everything).unwrap();
        assert_eq!(*log.lock().unwrap(), [2, 1]);
    }

    #[test]
    fn nothing_is_removed_because_the_list_goes_out_of_scope() {
        let log = Arc::default();
        let mut owned = Owned::default();
        owned.add(recorder(&log, 1));
        drop(owned);
        assert!(log.lock().unwrap().is_empty());
    }

    #[test]
    fn what_cannot_be_removed_stays_with_what_was_made_before_it_and_is_tried_again() {
        let log = Arc::default();
        let mut owned = Owned::default();
        owned.add(recorder(&log, 1));
        let mut failures = 1;
        owned.add(Fake::resource(move || {
            failures -= 1;
            if failures == 0 { Err(io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
        }));
        let error = owned.remove(Extent::Everything).unwrap_err();
        assert!(error.to_string().contains("cannot remove what is busy"), "{error}");
        assert!(log.lock().unwrap().is_empty());
        owned.remove(Extent::Everything).unwrap();
        assert_eq!(*log.lock().unwrap(), [1]);
    }

    #[test]
    fn a_stopped_pod_keeps_its_directory_until_it_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("abc");
        std::fs::create_dir(&path).unwrap();
        let mut owned = Owned::default();
        owned.add(Resource::Directory { path: path.clone() });
        owned.add(Fake::resource(|| Ok(())));
        owned.remove(Extent::Running).unwrap();
        assert!(path.exists() && owned.is_empty(Extent::Running) && !owned.is_empty(Extent::Everything));
        owned.remove(Extent::Everything).unwrap();
        assert!(!path.exists() && owned.is_empty(Extent::Everything));
    }

    #[test]
    fn what_was_never_made_is_removed_at_once() {
        let path = PathBuf::from("/no/such/pod");
        let mut owned = Owned::default();
        for resource in [
            Resource::Directory { path: path.clone() },
            Resource::Network { netns: path.clone() },
            Resource::Share { path: path.join("share") },
            Resource::Cgroup { path },
            Resource::Machine { process: Process { pid: 1, start_time: u64::MAX } },
        ] {
            owned.add(resource);
        }
        let written = serde_json::to_string(&owned).unwrap();
        assert_eq!(serde_json::from_str::<Owned>(&written).unwrap(), owned);
        owned.remove(Extent::Everything).unwrap();
    }
}
