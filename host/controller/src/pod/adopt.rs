//! Taking over the pods of an earlier controller, which may have been killed at any point.
//!
//! A pod whose machine runs goes on, whatever its files look like. One whose machine has ended meanwhile is kept as ended
//! until containerd removes it. What containerd was never told of is undone.

use std::{
    fs,
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use pericarp_protos::{cri, id::SandboxId};
use pericarp_vmm::MachineConfig;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open},
};

use super::{
    Ended, Node, Phase, Pod,
    boot::host_service_path,
    progress::Progress,
    record::{self, End, Identity, Process, Record, Stage},
};
use crate::{
    cgroup,
    errors::chain,
    fault,
    machine::{self, Exit, Machine, file},
    network,
    share::Share,
    size::Size,
    undo::Undo,
};

/// The namespace of kubelet's pods, where nothing tells of another.
const NAMESPACE: &str = "k8s.io";

/// Longest command line that is looked at.
const COMMAND_LINE_MAX: u64 = 8192;

/// Takes over every pod in the run directory.
pub async fn adopt_all(node: &Arc<Node>) -> io::Result<Vec<Arc<Pod>>> {
    let mut pods = Vec::new();
    for entry in fs::read_dir(&node.config.run_dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let directory = entry.path();
        let Some(Ok(id)) = entry.file_name().to_str().map(str::parse) else {
            tracing::warn!(directory = %directory.display(), "passed over: its name is not the id of a pod");
            continue;
        };
        fault::point("adopting");
        match take_over(node, &directory, &id).await {
            Ok(Some(pod)) => {
                tracing::info!(pod = pod.id, name = pod.name(), phase = ?pod.phase(), "pod taken over");
                pods.push(pod);
            }
            Ok(None) => tracing::info!(directory = %directory.display(), "removed what a pod had left"),
            // The others are not to suffer from it.
            Err(error) => {
                tracing::error!(directory = %directory.display(), %error, "cannot take a pod over");
            }
        }
    }
    Ok(pods)
}

/// Answers with the pod, unless it was only to be undone.
async fn take_over(node: &Arc<Node>, directory: &Path, id: &SandboxId) -> io::Result<Option<Arc<Pod>>> {
    let record = match Record::read(directory) {
        Ok(Some(record)) => Some(record),
        // A controller was killed before it had written one: see `Pod::spawn`.
        Ok(None) if !directory.join(file::PROGRESS).exists() => None,
        unusable => {
            if let Err(error) = unusable {
                let aside = record::set_aside(directory, file::STATE)?;
                let error = chain(&error);
                tracing::error!(aside = %aside.display(), error, "a pod's record is of no use");
            }
            seen(directory, id)?
        }
    };
    let Some(record) = record else {
        let machine = find_machine(directory)?;
        let cgroup = cgroup::find(id)?;
        return Ok(undo(node, identity_of(id), machine, cgroup).await);
    };
    // Whoever asked for it has had an error instead of an answer.
    if record.stage == Stage::Starting {
        return Ok(undo(node, record.pod, Some(record.machine), record.cgroup).await);
    }
    let machine = running(record.machine);
    take_over_machine(node, record, machine).map(Some)
}

/// Goes on with a pod whose machine runs (`Some`), has ended (`None`), or cannot be watched.
fn take_over_machine(
    node: &Arc<Node>,
    record: Record,
    machine: io::Result<Option<Machine>>,
) -> io::Result<Arc<Pod>> {
    match machine {
        Ok(Some(machine)) => resume(node, record, machine),
        Ok(None) => Ok(restore(node, record, None)),
        // Nobody would see its end, nor whether its guest is stuck.
        Err(error) => Ok(restore(node, record, Some(&error))),
    }
}

/// The process, if it still is that process.
fn running(process: Process) -> io::Result<Option<Machine>> {
    match open(process)? {
        Some((pid, pidfd)) => Machine::adopt(pid, pidfd).map(Some),
        None => Ok(None),
    }
}

/// A descriptor of a process, if it still is that process.
fn open(process: Process) -> io::Result<Option<(Pid, OwnedFd)>> {
    let Some(pid) = number(process) else { return Ok(None) };
    let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Err(Errno::SRCH) => return Ok(None),
        pidfd => pidfd?,
    };
    // Checked with the pidfd in hand: from here the process cannot be mistaken for another.
    Ok(process.runs()?.then_some((pid, pidfd)))
}

fn number(process: Process) -> Option<Pid> {
    i32::try_from(process.pid).ok().and_then(Pid::from_raw)
}

/// Ends a machine and waits until it is gone. `open` is how a descriptor of it is had.
fn end(process: Process, open: impl FnOnce(Process) -> io::Result<Option<(Pid, OwnedFd)>>) -> io::Result<()> {
    match open(process) {
        Ok(Some((_, pidfd))) => machine::kill(&pidfd),
        Ok(None) => Ok(()),
        // By its number, then. In the moment between this look and the signal, the kernel would have to give the number of a
        // process that has just ended to another.
        Err(error) => {
            if let Some(pid) = number(process).filter(|_| process.runs().unwrap_or(false)) {
                kill_process(pid, Signal::KILL)?;
                // Whether it is gone is seen when this is tried again.
                return Err(error);
            }
            Ok(())
        }
    }
}

/// What can be seen of a pod without its record; `None` if its machine does not run.
fn seen(directory: &Path, id: &SandboxId) -> io::Result<Option<Record>> {
    let Some(machine) = find_machine(directory)? else { return Ok(None) };
    let size = fs::read(directory.join(file::CONFIG))
        .ok()
        .and_then(|text| serde_json::from_slice::<MachineConfig>(&text).ok())
        .map(|config| Size { vcpus: config.vcpus, memory_mib: config.memory_mib });
    let record = Record::new(identity_of(id), size, machine)?;
    if let Err(error) = record.write(directory) {
        // It can be seen again by the next controller.
        tracing::warn!(directory = %directory.display(), %error, "a pod is not on record");
    }
    Ok(Some(record))
}

/// What a pod's directory tells of which pod it is.
fn identity_of(id: &SandboxId) -> Identity {
    Identity {
        id: id.clone(),
        namespace: NAMESPACE.to_owned(),
        // Its taps go with it when containerd removes it.
        netns: String::new(),
        config: cri::PodSandboxConfig::default(),
        created_at: SystemTime::now(),
    }
}

/// Looks for the process that runs a pod's machine, by its command line.
fn find_machine(directory: &Path) -> io::Result<Option<Process>> {
    let config = directory.join(file::CONFIG);
    let config = config.as_os_str().as_encoded_bytes();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // A process that ends meanwhile is none.
        let Ok(process) = Process::of(pid) else { continue };
        let ours = entry.metadata().is_ok_and(|metadata| metadata.uid() == geteuid().as_raw());
        if ours && is_machine(&entry.path(), config) && Process::of(pid).is_ok_and(|again| again == process) {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

fn is_machine(process: &Path, config: &[u8]) -> bool {
    let mut line = Vec::new();
    let read = fs::File::open(process.join("cmdline"))
        .and_then(|file| file.take(COMMAND_LINE_MAX).read_to_end(&mut line));
    let mut words = line.split(|byte| *byte == 0);
    read.is_ok() && words.nth(1) == Some(b"vmm") && words.any(|word| word == config)
}

/// Goes on with a pod whose machine runs.
fn resume(node: &Arc<Node>, record: Record, machine: Machine) -> io::Result<Arc<Pod>> {
    let pod = Arc::new(pod(node, &record));
    let progress = read_progress(&pod)?;
    let running = undo_running(&pod.directory, Some(record.machine), &pod.netns, record.cgroup.clone());
    // One of an older version leaves it open to every process in the guest.
    if let Err(error) = fs::remove_file(host_service_path(&pod.directory))
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    {
        let mut state = pod.state();
        state.phase = Phase::Running { pid: machine.pid() };
        state.running = running;
        // It may have been resized, and moved.
        state.size_now = None;
        state.pinned = None;
        state.progress = progress;
        state.cgroup = record.cgroup;
        state.interfaces = record.interfaces;
        state.port_forward = record.port_forward;
        state.directory = pod.undo_directory();
    }
    pod.watch(machine);
    pod.watch_network();
    pod.serve_requests();
    pod.follow_events();
    Ok(pod)
}

/// Keeps a pod whose machine has ended, or is ended here because it cannot be watched, for containerd to ask about and to
/// remove.
fn restore(node: &Arc<Node>, record: Record, unwatched: Option<&io::Error>) -> Arc<Pod> {
    let pod = Arc::new(pod(node, &record));
    let machine = unwatched.map(|_| record.machine);
    let mut running = undo_running(&pod.directory, machine, &pod.netns, record.cgroup.clone());
    if let Err(error) = running.run() {
        // Tried again when containerd has it stopped.
        tracing::error!(pod = pod.id, %error, "cannot clean up after a machine");
    }
    let end = match (&record.end, unwatched) {
        (Some(end), _) => end.clone(),
        (None, Some(error)) => {
            let reason =
                format!("the machine could not be watched by a new controller and was ended: {error}");
            tracing::error!(pod = pod.id, reason, "a machine is ended");
            End::new(Ended { exit: Exit::Unknown, at: SystemTime::now() }, Some(reason))
        }
        (None, None) => observed_end(&pod),
    };
    {
        let mut state = pod.state();
        state.phase = Phase::Ended;
        state.running = running;
        state.directory = pod.undo_directory();
        state.reason.clone_from(&end.reason);
    }
    pod.ended.send_replace(Some(end.ended()));
    if let Err(error) = record.with_end(end).write(&pod.directory) {
        tracing::warn!(pod = pod.id, %error, "the end of a machine is not on record");
    }
    pod
}

/// What the files of a machine tell about its end, which nobody has watched.
fn observed_end(pod: &Pod) -> End {
    let log = pod.directory.join(file::LOG);
    let written = fs::metadata(&log).and_then(|log| log.modified());
    // The last thing that it does by itself is to say so.
    let own = if pod.own_last_words().is_some() {
        Some(Exit::Code(1))
    } else {
        machine::tail(&log, 256).contains(pericarp_vmm::LAST_WORDS).then_some(Exit::Code(0))
    };
    let (exit, at) = match (own, written) {
        (Some(exit), Ok(written)) => (exit, written),
        (own, _) => (own.unwrap_or(Exit::Unknown), SystemTime::now()),
    };
    let reason = format!("the machine ended while no controller ran: {}", pod.last_words(None));
    End::new(Ended { exit, at }, Some(reason))
}

fn pod(node: &Arc<Node>, record: &Record) -> Pod {
    // Not checked again: it runs, whatever this controller would have said to it.
    let size = record.size.or_else(|| Size::of(&record.pod.config, &node.config, node.host).ok());
    let size = size.unwrap_or_else(|| Size::default_of(&node.config));
    Pod::make(record.pod.clone(), size, node.clone())
}

/// How far its events have been handed on. If that cannot be known, all that the guest remembers are told again.
fn read_progress(pod: &Pod) -> io::Result<Progress> {
    let mut progress = match Progress::read(&pod.directory) {
        Ok(progress) => progress,
        Err(error) => {
            let aside = record::set_aside(&pod.directory, file::PROGRESS)?;
            tracing::error!(pod = pod.id, aside = %aside.display(), %error, "events may be told twice");
            Progress::default()
        }
    };
    // Those of a controller that did not keep such a record.
    for container in Share::at(pod.directory.join(file::SHARE)).containers() {
        progress.add(container.as_str());
    }
    Ok(progress)
}

/// The steps that take down what a pod has on the host beside its directory.
fn undo_running(directory: &Path, machine: Option<Process>, netns: &str, cgroup: Option<PathBuf>) -> Undo {
    let mut running = Undo::default();
    network::push_removal(Path::new(netns), &mut running);
    let share = Share::at(directory.join(file::SHARE));
    running.push("remove the pod's share", move || {
        share.remove().map_err(|error| io::Error::other(chain(&error)))
    });
    if let Some(path) = cgroup {
        running.push("remove the pod's cgroup", move || cgroup::remove(&path));
    }
    if let Some(process) = machine {
        running.push("end the pod's machine", move || end(process, open));
    }
    running
}

/// Removes everything of a pod that nobody waits for. What cannot be undone yet is kept in the pod.
async fn undo(
    node: &Arc<Node>,
    identity: Identity,
    machine: Option<Process>,
    cgroup: Option<PathBuf>,
) -> Option<Arc<Pod>> {
    let pod = Arc::new(Pod::make(identity, Size::default_of(&node.config), node.clone()));
    {
        let mut state = pod.state();
        state.running = undo_running(&pod.directory, machine, &pod.netns, cgroup);
        state.directory = pod.undo_directory();
    }
    match pod.shutdown().await {
        Ok(()) => None,
        Err(error) => {
            tracing::error!(pod = pod.id, error = chain(&error), "cannot undo what a pod has left");
            Some(pod)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt as _,
        process::{Child, Command},
    };

    use super::*;
    use crate::pod::tests::node;

    fn id() -> SandboxId {
        "abc".parse().unwrap()
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_not_the_machine() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let _guard = runtime.enter();
        let own = Process::of(std::process::id()).unwrap();
        assert!(running(own).unwrap().is_some());
        assert!(running(Process { start_time: 1, ..own }).unwrap().is_none());
    }

    fn no_descriptor(_: Process) -> io::Result<Option<(Pid, OwnedFd)>> {
        Err(Errno::MFILE.into())
    }

    fn sleeping() -> (Child, Process) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        (child, process)
    }

    #[test]
    fn a_machine_is_ended_with_and_without_a_descriptor_and_no_other_process_is() {
        let (mut child, process) = sleeping();
        let another = Process { start_time: 1, ..process };
        end(another, open).unwrap();
        end(another, no_descriptor).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        // It is not known to be gone, so this is tried again.
        end(process, no_descriptor).unwrap_err();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        end(process, no_descriptor).unwrap();
        let (mut child, process) = sleeping();
        end(process, open).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    fn record(node: &Node, machine: Process, cgroup: Option<PathBuf>, stage: Stage) -> Record {
        let directory = node.config.run_dir.join("abc");
        fs::create_dir(&directory).unwrap();
        let mut record = Record::new(identity_of(&id()), None, machine).unwrap();
        (record.cgroup, record.stage) = (cgroup, stage);
        record.write(&directory).unwrap();
        record
    }

    #[tokio::test]
    async fn a_machine_that_cannot_be_watched_is_ended_and_its_pod_kept_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let node = node(directory.path());
        let (mut child, process) = sleeping();
        let record = record(&node, process, None, Stage::Running);
        let pod = take_over_machine(&node, record, Err(Errno::MFILE.into())).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert_eq!(pod.phase(), Phase::Ended);
        let info = pod.verbose_info().await;
        assert!(info["pericarp"]["reason"].as_str().unwrap().contains("could not be watched"), "{info}");
    }

    #[tokio::test]
    async fn what_cannot_be_undone_is_kept_with_its_record_until_it_can_be() {
        let directory = tempfile::tempdir().unwrap();
        let node = node(directory.path());
        let (mut child, process) = sleeping();
        // A cgroup with something in it cannot be removed.
        let cgroup = directory.path().join("abc.cgroup");
        fs::create_dir_all(cgroup.join("busy")).unwrap();
        record(&node, process, Some(cgroup.clone()), Stage::Starting);
        let pod = take_over(&node, &directory.path().join("abc"), &id()).await.unwrap().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert_eq!(pod.phase(), Phase::Ended);
        let error = chain(&pod.shutdown().await.unwrap_err());
        assert!(error.contains("cannot remove the pod's cgroup"), "{error}");
        assert!(Record::read(&directory.path().join("abc")).unwrap().is_some());
        fs::remove_dir(cgroup.join("busy")).unwrap();
        pod.shutdown().await.unwrap();
        assert!(!cgroup.exists() && !directory.path().join("abc").exists());
    }

    #[test]
    fn a_machine_is_found_by_its_command_line() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(find_machine(directory.path()).unwrap(), None);
        let config = directory.path().join(file::CONFIG);
        // A process with that command line that waits for its input.
        fs::write(directory.path().join("vmm"), "echo started\nread line\n").unwrap();
        let mut child = Command::new("sh")
            .current_dir(directory.path())
            .args(["vmm", "--config"])
            .arg(&config)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The kernel ends `vfork` a moment before the new program's command line can be read.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        let found = find_machine(directory.path()).unwrap();
        assert_eq!(found.map(|process| process.pid), Some(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
