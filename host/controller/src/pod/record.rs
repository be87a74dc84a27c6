//! What is on disk about a pod (`state.json`): enough for another controller to go on with it ([`super::adopt`]).

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use pericarp_protos::{cri, id::SandboxId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Ended, Pod};
use crate::{
    fault,
    machine::{Exit, file},
    network::InterfaceStatus,
    size::Size,
};

/// Of the format. Fields that an older controller does not know may be added without another number, if it is safe for it
/// to pass over them.
const VERSION: u32 = 1;

/// How far a pod had come when its record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Its machine runs; containerd has not been told of it.
    Starting,
    /// containerd knows it.
    Running,
}

/// The process of a pod's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// When it started, in clock ticks since boot (`proc_pid_stat(5)`, field 22): together with the pid it names a process
    /// for good.
    pub start_time: u64,
}

impl Process {
    /// The process that has this pid now.
    pub fn of(pid: u32) -> io::Result<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The command in field 2 may hold anything; fields are counted from its closing bracket.
        let start_time = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat cannot be read"))
            })?;
        Ok(Process { pid, start_time })
    }

    /// Whether it is still there, alive or as an exit status that nobody has taken.
    pub fn runs(self) -> io::Result<bool> {
        match Process::of(self.pid) {
            Ok(found) => Ok(found == self),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // It ended while it was looked at.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }
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
    pub fn new(ended: Ended, reason: Option<String>) -> End {
        End { exit: ended.exit, at: ended.at, reason }
    }

    pub fn ended(&self) -> Ended {
        Ended { exit: self.exit, at: self.at }
    }
}

/// Which pod it is: what containerd has said of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    pub id: SandboxId,
    pub namespace: String,
    pub netns: String,
    pub config: cri::PodSandboxConfig,
    #[serde(default = "SystemTime::now")]
    pub created_at: SystemTime,
}

/// Enough to take a pod over again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    pub stage: Stage,
    #[serde(flatten)]
    pub pod: Identity,
    #[serde(flatten)]
    pub machine: Process,
    pub cgroup: Option<PathBuf>,
    /// What the guest has of the pod's network.
    #[serde(default)]
    pub interfaces: Vec<InterfaceStatus>,
    /// Whether port-forward works or why it does not.
    #[serde(default)]
    pub port_forward: Option<String>,
    /// What the machine was started with, where the configuration does not tell.
    #[serde(default)]
    pub size: Option<Size>,
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
    /// Of a pod that runs, as far as that can be seen from outside.
    pub fn new(pod: Identity, size: Option<Size>, machine: Process) -> io::Result<Record> {
        Ok(Record {
            version: VERSION,
            stage: Stage::Running,
            pod,
            machine,
            cgroup: cgroup_of(machine.pid)?,
            interfaces: Vec::new(),
            port_forward: None,
            size,
            end: None,
        })
    }

    /// Of a pod whose machine runs as a process.
    pub fn of(pod: &Pod, pid: u32, stage: Stage) -> io::Result<Record> {
        let (interfaces, port_forward) = pod.network_status();
        let record = Record::new(pod.identity(), Some(pod.size), Process::of(pid)?)?;
        Ok(Record { stage, interfaces, port_forward, ..record })
    }

    /// The same, of a machine that has ended.
    pub fn with_end(self, end: End) -> Record {
        Record { end: Some(end), ..self }
    }

    /// Reads what a controller has left in a pod's directory; `None` if there is none.
    pub fn read(directory: &Path) -> Result<Option<Record>, RecordError> {
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

    /// Writes it so that it is either there whole or not at all.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let path = directory.join(file::STATE);
        let temporary = path.with_extension("json.new");
        let mut new = File::create(&temporary)?;
        new.write_all(&serde_json::to_vec(self)?)?;
        new.sync_all()?;
        fault::point("record-written");
        fs::rename(&temporary, &path)
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

/// The cgroup of a process, if it is one of ours.
fn cgroup_of(pid: u32) -> io::Result<Option<PathBuf>> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path =
        groups.lines().find_map(|line| line.strip_prefix("0::/")).filter(|path| path.contains("pericarp-"));
    Ok(path.map(|path| Path::new("/sys/fs/cgroup").join(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(file::STATE), text).unwrap();
        directory
    }

    fn record() -> Record {
        Record {
            version: VERSION,
            stage: Stage::Running,
            pod: Identity {
                id: "x".parse().unwrap(),
                namespace: "k8s.io".into(),
                netns: "/run/netns/x".into(),
                config: cri::PodSandboxConfig::default(),
                created_at: SystemTime::UNIX_EPOCH,
            },
            machine: Process { pid: 7, start_time: 8 },
            cgroup: None,
            interfaces: Vec::new(),
            port_forward: None,
            size: Some(Size { vcpus: 2, memory_mib: 300 }),
            end: Some(End {
                exit: Exit::Signal(9),
                at: SystemTime::UNIX_EPOCH,
                reason: Some("killed".into()),
            }),
        }
    }

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let own = std::process::id();
        assert_eq!(Process::of(own).unwrap(), Process::of(own).unwrap());
        assert_ne!(Process::of(own).unwrap().start_time, Process::of(1).unwrap().start_time);
    }

    #[test]
    fn what_was_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Record::read(directory.path()).unwrap().is_none());
        record().write(directory.path()).unwrap();
        let read = Record::read(directory.path()).unwrap().unwrap();
        assert_eq!(serde_json::to_value(read).unwrap(), serde_json::to_value(record()).unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_record_of_the_first_controllers_is_read() {
        let directory = written(
            r#"{"version":1,"stage":"running","id":"x","namespace":"k8s.io","netns":"","config":{},
                "pid":7,"start_time":8,"cgroup":null}"#,
        );
        let read = Record::read(directory.path()).unwrap().unwrap();
        assert_eq!((read.machine, read.end), (Process { pid: 7, start_time: 8 }, None));
    }

    #[test]
    fn fields_that_are_not_known_are_passed_over() {
        let mut newer = serde_json::to_value(record()).unwrap();
        newer["invented"] = "later".into();
        let directory = written(&newer.to_string());
        assert_eq!(Record::read(directory.path()).unwrap().unwrap().pod.id.as_str(), "x");
    }

    #[test]
    fn a_record_of_another_version_is_told_from_a_damaged_one() {
        let newer = written(r#"{"version": 99, "stage": {"of": "another kind"}}"#);
        assert!(matches!(Record::read(newer.path()), Err(RecordError::Version { found: 99 })));
        let whole = serde_json::to_string(&record()).unwrap();
        for length in 0..whole.len() {
            let cut = written(&whole[..length]);
            assert!(matches!(Record::read(cut.path()), Err(RecordError::Damaged(_))), "{length}");
        }
        for damaged in ["[]", "null", "{}", r#"{"version":1}"#, "\0\0\0\0"] {
            let damaged = written(damaged);
            assert!(matches!(Record::read(damaged.path()), Err(RecordError::Damaged(_))));
        }
    }

    #[test]
    fn what_is_set_aside_is_kept() {
        let directory = written("nonsense");
        let aside = set_aside(directory.path(), file::STATE).unwrap();
        assert_eq!(fs::read_to_string(aside).unwrap(), "nonsense");
        assert!(Record::read(directory.path()).unwrap().is_none());
    }
}
