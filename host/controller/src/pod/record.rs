//! What is on disk about a pod (`state.json`): enough for another controller to go on with it ([`super::adopt`]).

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Ended, owned::Owned, spec::PodSpec};
use crate::{
    fault::FaultPoint,
    host::{
        machine::{Exit, file},
        network::InterfaceStatus,
        replace::{Durability, replace},
        size::{PodResources, Size},
    },
};

/// The format's version. Fields that an older controller does not know may be added without another number, if it is
/// safe for it to pass over them.
const VERSION: u32 = 2;

/// How far a pod had come when its record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Its machine is being made, or runs; whoever asked for it has had no answer.
    Starting,
    /// Whoever asked for it knows that it runs.
    Running,
}

/// How a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    exit: Exit,
    at: SystemTime,
    /// Why, where it was not asked to.
    pub reason: Option<String>,
}

impl End {
    pub fn new(ended: Ended, reason: Option<String>) -> Self {
        Self { exit: ended.exit, at: ended.at, reason }
    }

    pub fn ended(&self) -> Ended {
        Ended { exit: self.exit, at: self.at }
    }
}

/// Enough to take a pod over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    pub stage: Stage,
    pub spec: PodSpec,
    /// What the machine is started with.
    pub size: Size,
    pub owned: Owned,
    /// What the pod may use now, if that has changed since it was asked for.
    #[serde(default)]
    pub resources: Option<PodResources>,
    /// What the guest has of the pod's network.
    #[serde(default)]
    pub interfaces: Vec<InterfaceStatus>,
    /// Whether port-forward works or why it does not.
    #[serde(default)]
    pub port_forward: Option<String>,
    #[serde(default)]
    pub end: Option<End>,
}

/// A record is of no use.
#[derive(Debug, Error)]
pub enum RecordError {
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    #[error("it is damaged")]
    Damaged(#[source] serde_json::Error),
    #[error("it is of version {found}; this controller knows version {VERSION}")]
    Version { found: u64 },
}

impl Record {
    /// The record of a pod that begins to start and owns nothing yet.
    pub fn new(spec: PodSpec, size: Size) -> Self {
        Self {
            version: VERSION,
            stage: Stage::Starting,
            spec,
            size,
            owned: Owned::default(),
            resources: None,
            interfaces: Vec::new(),
            port_forward: None,
            end: None,
        }
    }

    /// Reads what a controller has left in a pod's directory; `None` if there is none.
    pub fn read(directory: &Path) -> Result<Option<Self>, RecordError> {
        /// What records of every version have.
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let text = match fs::read(directory.join(file::STATE)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RecordError::Read(error)),
        };
        let Versioned { version } = serde_json::from_slice(&text).map_err(RecordError::Damaged)?;
        if version != u64::from(VERSION) {
            return Err(RecordError::Version { found: version });
        }
        serde_json::from_slice(&text).map(Some).map_err(RecordError::Damaged)
    }

    fn write(&self, directory: &Path) -> io::Result<()> {
        replace(&directory.join(file::STATE), &serde_json::to_vec(self)?, Durability::Host)?;
        FaultPoint::RecordWritten.reached();
        Ok(())
    }
}

/// A pod's record and its file. Its task and whoever watches its machine change it, one at a time.
#[derive(Debug)]
pub struct RecordFile {
    directory: PathBuf,
    record: Mutex<Record>,
}

impl RecordFile {
    pub fn new(directory: PathBuf, record: Record) -> Self {
        Self { directory, record: Mutex::new(record) }
    }

    /// Changes the record and replaces the file. Blocks.
    pub fn change(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        // A change is a few assignments: what a panic leaves is sound.
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut record);
        record.write(&self.directory)
    }
}

/// How and when a pod's machine ended, if that is on record.
pub fn end_on_record(directory: &Path) -> Option<Ended> {
    Record::read(directory).ok().flatten()?.end.map(|end| end.ended())
}

/// Moves a file that is of no use out of the way, for somebody to look at.
pub fn set_aside(directory: &Path, name: &str) -> io::Result<PathBuf> {
    let aside = directory.join(format!("{name}.unusable"));
    fs::rename(directory.join(name), &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{host::process::Process, pod::owned::Resource};

    fn written(text: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(file::STATE), text).unwrap();
        directory
    }

    fn record() -> Record {
        let spec = PodSpec {
            netns: Some("/run/netns/x".into()),
            created_at: SystemTime::UNIX_EPOCH,
            ..PodSpec::unknown("x".parse().unwrap(), "k8s.io")
        };
        let mut record = Record::new(spec, Size { vcpus: 2, memory_mib: 300 });
        record.owned.add(Resource::Directory { path: "/run/pericarp/x".into() });
        record.owned.add(Resource::Machine { process: Process { pid: 7, start_time: 8 } });
        record.end =
            Some(End { exit: Exit::Signal(9), at: SystemTime::UNIX_EPOCH, reason: Some("killed".into()) });
        record
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(directory.path()).unwrap(), None);
        record().write(directory.path()).unwrap();
        assert_eq!(Record::read(directory.path()).unwrap(), Some(record()));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn fields_that_are_not_known_are_passed_over() {
        let mut newer = serde_json::to_value(record()).unwrap();
        newer["invented"] = "later".into();
        let directory = written(&newer.to_string());
        assert_eq!(Record::read(directory.path()).unwrap().unwrap().spec.id.as_str(), "x");
    }

    #[test]
    fn a_record_of_another_version_is_told_from_a_damaged_one() {
        for (number, rest) in [(1, r#""stage":"running""#), (99, r#""stage": {"of": "another kind"}"#)] {
            let other = written(&format!(r#"{{"version": {number}, {rest}}}"#));
            assert!(
                matches!(Record::read(other.path()), Err(RecordError::Version { found }) if found == number)
            );
        }
        let whole = serde_json::to_string(&record()).unwrap();
        for length in 0..whole.len() {
            let cut = written(&whole[..length]);
            assert!(matches!(Record::read(cut.path()), Err(RecordError::Damaged(_))), "{length}");
        }
        for damaged in ["[]", "null", "{}", r#"{"version":2}"#, "\0\0\0\0"] {
            let damaged = written(damaged);
            assert!(matches!(Record::read(damaged.path()), Err(RecordError::Damaged(_))));
        }
    }

    #[test]
    fn what_is_set_aside_is_kept() {
        let directory = written("nonsense");
        let aside = set_aside(directory.path(), file::STATE).unwrap();
        assert_eq!(fs::read_to_string(aside).unwrap(), "nonsense");
        assert_eq!(Record::read(directory.path()).unwrap(), None);
    }
}
