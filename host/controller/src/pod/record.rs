//! What is on disk about a pod (`state.json`), and how a controller that starts takes pods over by it.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use pericarp_protos::cri;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::{
    Node, Phase, Pod,
    boot::{GuestRequests, host_service_path},
    progress::Progress,
};
use crate::{
    cgroup,
    errors::chain,
    guest,
    machine::{self, Machine, file},
    mounts,
    network::{self, InterfaceStatus},
    share::Share,
    undo::Undo,
};

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

/// Enough to take a pod over again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    stage: Stage,
    id: String,
    namespace: String,
    netns: String,
    config: cri::PodSandboxConfig,
    pid: u32,
    /// When the process started, in clock ticks since boot (`proc_pid_stat(5)`, field 22): together with
    /// the pid it names a process for good.
    start_time: u64,
    cgroup: Option<PathBuf>,
    /// What the guest has of the pod's network.
    #[serde(default)]
    interfaces: Vec<InterfaceStatus>,
    /// Whether port-forward works or why it does not.
    #[serde(default)]
    port_forward: Option<String>,
}

/// Writes the record so that it is either there whole or not at all.
pub fn write(pod: &Pod, pid: u32, stage: Stage) -> io::Result<()> {
    let (interfaces, port_forward) = pod.network_status();
    let record = Record {
        version: VERSION,
        stage,
        id: pod.id.clone(),
        namespace: pod.namespace.clone(),
        netns: pod.netns.clone(),
        config: pod.config.clone(),
        pid,
        start_time: start_time(pid)?,
        cgroup: cgroup_of(pid)?,
        interfaces,
        port_forward,
    };
    let path = pod.directory.join(file::STATE);
    let temporary = path.with_extension("json.new");
    let mut new = File::create(&temporary)?;
    new.write_all(&serde_json::to_vec(&record)?)?;
    new.sync_all()?;
    fs::rename(&temporary, &path)
}

fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command in field 2 may hold anything; fields are counted from its closing bracket.
    stat.rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat cannot be read")))
}

fn cgroup_of(pid: u32) -> io::Result<Option<PathBuf>> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path =
        groups.lines().find_map(|line| line.strip_prefix("0::/")).filter(|path| path.contains("pericarp-"));
    Ok(path.map(|path| Path::new("/sys/fs/cgroup").join(path)))
}

/// Takes over every pod whose machine runs and removes what is left of all others.
pub async fn adopt_all(node: &Arc<Node>) -> io::Result<Vec<Arc<Pod>>> {
    let mut pods = Vec::new();
    for entry in fs::read_dir(&node.config.run_dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let directory = entry.path();
        let record = read(&directory);
        let machine = record.as_ref().ok().and_then(running_machine);
        match (record, machine) {
            (Ok(record), Some(machine)) if record.stage == Stage::Starting => {
                // Whoever asked for it has had an error instead of an answer.
                if let Err(error) = machine.pidfd().and_then(|pidfd| machine::kill(&pidfd)) {
                    tracing::error!(directory = %directory.display(), %error, "cannot end a half-started pod");
                }
                clean_up(&directory, Some(&record));
            }
            (Ok(record), Some(machine)) => match adopt(node, record, machine).await {
                Ok(pod) => {
                    tracing::info!(pod = pod.id, name = pod.name(), "pod taken over");
                    pods.push(pod);
                }
                Err(error) => {
                    tracing::error!(directory = %directory.display(), %error, "cannot take a pod over");
                }
            },
            (record, None) => clean_up(&directory, record.ok().as_ref()),
            (Err(_), Some(_)) => {}
        }
    }
    Ok(pods)
}

fn read(directory: &Path) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(directory.join(file::STATE))?)?;
    if record.version == VERSION {
        Ok(record)
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, format!("state file of version {}", record.version)))
    }
}

/// The record's process, if it still is that process.
fn running_machine(record: &Record) -> Option<Machine> {
    let pid = Pid::from_raw(i32::try_from(record.pid).ok()?)?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).ok()?;
    // Checked with the pidfd in hand: from here the process cannot be mistaken for another.
    (start_time(record.pid).ok()? == record.start_time).then_some(())?;
    Machine::adopt(pid, pidfd).ok()
}

async fn adopt(node: &Arc<Node>, record: Record, machine: Machine) -> io::Result<Arc<Pod>> {
    let pod = Pod::new(record.id, record.namespace, record.config, record.netns, node.clone())
        .map_err(io::Error::other)?;
    let pod = Arc::new(pod);
    let mut running = Undo::default();
    network::push_removal(Path::new(&pod.netns), &mut running);
    let share = Share::at(pod.directory.join(file::SHARE));
    let mut progress = Progress::read(&pod.directory)?;
    // Those of a controller that did not keep such a record.
    for container in share.containers() {
        progress.add(&container);
    }
    running.push("remove the pod's share", move || {
        share.remove().map_err(|error| io::Error::other(chain(&error)))
    });
    let cgroup = record.cgroup.clone();
    if let Some(path) = record.cgroup {
        running.push("remove the pod's cgroup", move || cgroup::remove(&path));
    }
    let pidfd = machine.pidfd()?;
    running.push("end the pod's machine", move || machine::kill(&pidfd));
    let socket = host_service_path(&pod.directory);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let service = guest::serve(machine::bind(&socket)?, Arc::new(GuestRequests(pod.clone())))
        .await
        .map_err(io::Error::other)?;
    {
        let mut state = pod.state();
        state.phase = Phase::Running { pid: machine.pid() };
        state.running = running;
        // It may have been resized.
        state.size_now = None;
        state.pinned = None;
        state.progress = progress;
        state.cgroup = cgroup;
        state.interfaces = record.interfaces;
        state.port_forward = record.port_forward;
        state.directory = pod.undo_directory();
        state.host_service = Some(service);
    }
    pod.watch(machine);
    pod.watch_network();
    pod.follow_events();
    Ok(pod)
}

/// Removes what a pod without a machine has left.
fn clean_up(directory: &Path, record: Option<&Record>) {
    let cleaned = mounts::detach(&directory.join(file::SHARE))
        .map_err(io::Error::from)
        .and_then(|()| record.and_then(|record| record.cgroup.as_deref()).map_or(Ok(()), cgroup::remove))
        .and_then(|()| record.map_or(Ok(()), |record| network::remove(Path::new(&record.netns))))
        .and_then(|()| Ok(mounts::remove_tree(directory)?));
    match cleaned {
        Ok(()) => tracing::info!(directory = %directory.display(), "removed what a pod had left"),
        Err(error) => {
            tracing::error!(directory = %directory.display(), %error, "cannot remove what a pod has left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let own = std::process::id();
        assert_eq!(start_time(own).unwrap(), start_time(own).unwrap());
        assert_ne!(start_time(own).unwrap(), start_time(1).unwrap());
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_not_the_machine() {
        let mut record = Record {
            version: VERSION,
            stage: Stage::Running,
            id: "x".into(),
            namespace: "k8s.io".into(),
            netns: String::new(),
            config: cri::PodSandboxConfig::default(),
            pid: std::process::id(),
            start_time: 1,
            cgroup: None,
            interfaces: Vec::new(),
            port_forward: None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _guard = runtime.enter();
        assert!(running_machine(&record).is_none());
        record.start_time = start_time(record.pid).unwrap();
        assert!(running_machine(&record).is_some());
    }

    #[test]
    fn a_record_of_another_version_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(file::STATE), r#"{"version": 99}"#).unwrap();
        assert!(read(directory.path()).is_err());
    }
}
