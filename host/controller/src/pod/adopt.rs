//! Taking over the pods of an earlier controller, which may have been killed at any point.
//!
//! A pod whose machine runs goes on, whatever its files look like. One whose machine has ended meanwhile is kept as
//! ended until it is removed. What nobody was told of is undone.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use pericarp_protos::id::SandboxId;
use serde::Deserialize;
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Ended, Environment, Pod,
    files::PodFiles,
    life::{Life, Running},
    machine_exit::{ENDED_BY_FILTER, is_by_filter, last_words, own_last_words},
    owned::{Extent, Owned, Resource},
    progress::Progress,
    record::{self, End, Record, RecordError, Stage},
    spec::PodSpec,
    task::Command,
};
use crate::{
    blocking::BlockingWork,
    fault::FaultPoint,
    host::{
        cgroup,
        machine::{self, Exit, Machine, file},
        process::{self, Process},
        size::Size,
    },
    telemetry::{counters, error_chain::chain},
};

/// The namespace of kubelet's pods, where nothing tells of another.
const NAMESPACE: &str = "k8s.io";

/// Pods that are taken over at a time. Most of that is waiting for the kernel.
const AT_A_TIME: usize = 32;

/// How often a pod is tried to be taken over again, and how long after a failure: most are temporary.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(300);

/// Takes over every pod in the run directory.
pub async fn adopt_all(environment: &Arc<Environment>) -> io::Result<Vec<Arc<Pod>>> {
    let run_dir = environment.config.run_dir.clone();
    let directories = BlockingWork::new().run(move || pod_directories(&run_dir)).await?;
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let machines = Arc::new(Machines::default());
    let mut all = JoinSet::new();
    for (directory, id) in directories {
        let (environment, machines, places) =
            (Arc::clone(environment), Arc::clone(&machines), Arc::clone(&places));
        all.spawn(async move {
            let _place = places.acquire().await;
            FaultPoint::Adopting.reached();
            take_over_or_report(&environment, &directory, id, &machines).await
        });
    }
    Ok(all.join_all().await.into_iter().flatten().collect())
}

/// The machines of this host, by their configuration files. They are looked for once for all pods, and only if one
/// needs it: the host may have many processes.
#[derive(Default)]
struct Machines(Mutex<Option<HashMap<PathBuf, Process>>>);

impl Machines {
    /// The machine of the pod in that directory. Blocks.
    fn of(&self, directory: &Path) -> io::Result<Option<Process>> {
        // What is under the lock is found or not found, also after a panic.
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let machines = match &mut *found {
            Some(machines) => machines,
            none => {
                let mut machines = HashMap::new();
                for (config, process) in process::machines()? {
                    // Another process may have the same command line: the first is the older one.
                    machines.entry(config).or_insert(process);
                }
                none.insert(machines)
            }
        };
        Ok(machines.get(&directory.join(file::CONFIG)).copied())
    }
}

fn pod_directories(run_dir: &Path) -> io::Result<Vec<(PathBuf, SandboxId)>> {
    let mut directories = Vec::new();
    for entry in fs::read_dir(run_dir)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        if let Some(Ok(id)) = entry.file_name().to_str().map(str::parse) {
            directories.push((entry.path(), id));
        } else {
            let directory = entry.path().display().to_string();
            tracing::warn!(directory, "passed over: its name is not the id of a pod");
        }
    }
    Ok(directories)
}

async fn take_over_or_report(
    environment: &Arc<Environment>,
    directory: &Path,
    id: SandboxId,
    machines: &Arc<Machines>,
) -> Option<Arc<Pod>> {
    let shown = directory.display();
    let mut taken_over = take_over(environment, directory, &id, machines).await;
    for _ in 0..TRIES {
        let Err(error) = &taken_over else { break };
        tracing::warn!(directory = %shown, %error, "a pod cannot be taken over yet");
        tokio::time::sleep(PAUSE).await;
        taken_over = take_over(environment, directory, &id, machines).await;
    }
    match taken_over {
        Ok(Some(pod)) => {
            tracing::info!(pod = pod.id(), name = pod.title(), phase = ?pod.phase(), "pod taken over");
            Some(pod)
        }
        Ok(None) => {
            tracing::info!(directory = %shown, "removed what a pod had left");
            None
        }
        // The others are not to suffer from it.
        Err(error) => {
            tracing::error!(directory = %shown, %error, "cannot take a pod over");
            None
        }
    }
}

/// Returns the pod, unless it was only to be undone.
async fn take_over(
    environment: &Arc<Environment>,
    directory: &Path,
    id: &SandboxId,
    machines: &Arc<Machines>,
) -> io::Result<Option<Arc<Pod>>> {
    let (reader, pod_directory, pod_id) = (environment.read_older_record, directory.to_owned(), id.clone());
    let (default_size, machines) = (Size::default_of(&environment.config), Arc::clone(machines));
    let work = BlockingWork::new();
    let record =
        work.run(move || find_record(&pod_directory, &pod_id, &machines, default_size, reader)).await?;
    // Whoever asked for it has had an error instead of an answer.
    if record.stage == Stage::Starting {
        return Ok(undo(environment, record).await);
    }
    let machine = match record.owned.machine() {
        Some(process) => running(process),
        None => Ok(None),
    };
    take_over_machine(environment, record, machine).await.map(Some)
}

/// What is on record about a pod, or else what can be seen of it. Blocks.
fn find_record(
    directory: &Path,
    id: &SandboxId,
    machines: &Machines,
    default_size: Size,
    read_older: fn(&[u8], &Path) -> Option<Record>,
) -> io::Result<Record> {
    let unusable = match Record::read(directory) {
        Ok(Some(mut record)) => {
            // A controller may have been killed after it had spawned the machine, and before it had put that on record.
            if record.stage == Stage::Starting
                && record.owned.machine().is_none()
                && let Some(process) = machines.of(directory)?
            {
                record.owned.add(Resource::Machine { process });
            }
            return Ok(record);
        }
        // A controller was killed before it had written one. What it has made by then is undone.
        Ok(None) if !directory.join(file::PROGRESS).exists() => {
            return record_of_visible(directory, id, machines.of(directory)?, Stage::Starting, default_size);
        }
        Ok(None) => None,
        Err(error @ RecordError::Version { .. }) => {
            let older = fs::read(directory.join(file::STATE))?;
            if let Some(record) = read_older(&older, directory) {
                return Ok(record);
            }
            Some(error)
        }
        // It may be readable the next time: descriptors or memory may be short now.
        Err(RecordError::Read(error)) => return Err(error),
        Err(error @ RecordError::Damaged(_)) => Some(error),
    };
    if let Some(error) = unusable {
        let aside = record::set_aside(directory, file::STATE)?;
        let error = chain(&error);
        tracing::error!(aside = %aside.display(), error, "a pod's record is of no use");
    }
    let machine = machines.of(directory)?;
    // One whose machine has ended has nothing left to go on with.
    let stage = if machine.is_some() { Stage::Running } else { Stage::Starting };
    record_of_visible(directory, id, machine, stage, default_size)
}

/// A record of what can be seen of a pod without one. Blocks.
fn record_of_visible(
    directory: &Path,
    id: &SandboxId,
    machine: Option<Process>,
    stage: Stage,
    default_size: Size,
) -> io::Result<Record> {
    let size = machine_size(directory).unwrap_or(default_size);
    let mut record = Record::new(PodSpec::unknown(id.clone(), NAMESPACE), size);
    record.stage = stage;
    record.owned = owned_in(directory, None, cgroup::find(id)?, machine);
    Ok(record)
}

/// The size with which a pod's machine was started, by this version or another.
fn machine_size(directory: &Path) -> Option<Size> {
    #[derive(Deserialize)]
    struct OfAnyVersion {
        vcpus: u8,
        memory_mib: u32,
    }
    let OfAnyVersion { vcpus, memory_mib } =
        serde_json::from_slice(&fs::read(directory.join(file::CONFIG)).ok()?).ok()?;
    Some(Size { vcpus, memory_mib })
}

/// What a pod owns, put together from what is known of it.
pub fn owned_in(
    directory: &Path,
    netns: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    machine: Option<Process>,
) -> Owned {
    let mut owned = Owned::default();
    owned.add(Resource::Directory { path: directory.to_owned() });
    if let Some(netns) = netns {
        owned.add(Resource::Network { netns });
    }
    let share = directory.join(file::OLDER_SHARE);
    if share.exists() {
        owned.add(Resource::Share { path: share });
    }
    if let Some(path) = cgroup {
        owned.add(Resource::Cgroup { path });
    }
    if let Some(process) = machine {
        owned.add(Resource::Machine { process });
    }
    owned
}

/// The process, if it still is that process.
fn running(process: Process) -> io::Result<Option<Machine>> {
    match process.open()? {
        Some((pid, pidfd)) => Machine::adopt(pid, pidfd).map(Some),
        None => Ok(None),
    }
}

/// Goes on with a pod whose machine runs (`Some`), has ended (`None`), or cannot be watched.
async fn take_over_machine(
    environment: &Arc<Environment>,
    record: Record,
    machine: io::Result<Option<Machine>>,
) -> io::Result<Arc<Pod>> {
    match machine {
        Ok(Some(machine)) if record.end.is_none() => resume(environment, record, machine),
        Ok(_) => Ok(restore(environment, record, None).await),
        // Nobody would see its end, nor whether its guest is stuck.
        Err(error) => Ok(restore(environment, record, Some(error)).await),
    }
}

/// Goes on with a pod whose machine runs.
fn resume(environment: &Arc<Environment>, record: Record, machine: Machine) -> io::Result<Arc<Pod>> {
    let resources = record.resources.unwrap_or(record.spec.resources);
    let (pod, mut task) = Pod::new(record, Arc::clone(environment));
    // So that the next controller finds it: it may have been put together from what was seen.
    if let Err(error) = pod.record.change(|_| ()) {
        tracing::warn!(pod = pod.id(), %error, "a pod is not on record");
    }
    pod.progress.resume(read_progress(&pod)?);
    // One of an older version leaves it open to every process in the guest.
    match fs::remove_file(pod.files.older_host_service()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let pid = machine.pid();
    task.is_machine_watched = true;
    pod.watch_machine(machine);
    task.spawn(Life::running_with(Running::taken_over(pid, resources)));
    // Before anything that its guest asks for. There is room in a mailbox that hardly anybody knows yet.
    drop(pod.mailbox.try_send(Command::TakenOver));
    pod.watch_network();
    pod.serve_requests();
    pod.follow_events();
    Ok(pod)
}

/// Keeps a pod whose machine has ended, or is ended here because it cannot be watched, for somebody to ask about and to
/// remove.
async fn restore(environment: &Arc<Environment>, record: Record, unwatched: Option<io::Error>) -> Arc<Pod> {
    let on_record = record.end.clone();
    let files = PodFiles::new(&environment.config.run_dir, &record.spec.id);
    let (pod, mut task) = Pod::new(record, Arc::clone(environment));
    let mut owned = task.owned.clone();
    let (owned, removed) = pod
        .blocking
        .run(move || {
            let removed = owned.remove(Extent::Running);
            (owned, removed)
        })
        .await;
    task.owned = owned;
    if let Err(error) = removed {
        // Tried again when the pod is stopped.
        tracing::error!(pod = pod.id(), %error, "cannot clean up after a machine");
    }
    let end = match (on_record, unwatched) {
        (Some(end), _) => end,
        (None, Some(error)) => {
            let reason =
                format!("the machine could not be watched by a new controller and was ended: {error}");
            tracing::error!(pod = pod.id(), reason, "a machine is ended");
            End::new(Ended { exit: Exit::Unknown, at: SystemTime::now() }, Some(reason))
        }
        (None, None) => pod.blocking.run(move || observed_end(&files)).await,
    };
    pod.ended.send_replace(Some(end.ended()));
    pod.status.send_modify(|status| status.reason.clone_from(&end.reason));
    let (writer, owned) = (Arc::clone(&pod), task.owned.clone());
    let written = pod.blocking.run(move || {
        writer.record.change(|record| {
            record.end = Some(end);
            record.owned = owned;
        })
    });
    if let Err(error) = written.await {
        tracing::warn!(pod = pod.id(), %error, "the end of a machine is not on record");
    }
    task.spawn(Life::Ended);
    pod
}

/// What the files of a machine tell about its end, which nobody has watched. Blocks.
fn observed_end(files: &PodFiles) -> End {
    let (log, console) = (files.log(), files.console());
    let written = fs::metadata(&log).and_then(|log| log.modified());
    // The last thing that it does by itself is to say so.
    let own = match own_last_words(&log) {
        Some(words) if is_by_filter(Exit::Unknown, &words) => {
            Some(Exit::Code(pericarp_vmm::FILTER_EXIT_STATUS))
        }
        Some(_) => Some(Exit::Code(1)),
        None => machine::tail(&log, 256).contains(pericarp_vmm::LAST_WORDS).then_some(Exit::Code(0)),
    };
    let (exit, at) = match (own, written) {
        (Some(exit), Ok(written)) => (exit, written),
        (own, _) => (own.unwrap_or(Exit::Unknown), SystemTime::now()),
    };
    let words = last_words(&log, &console, None);
    if exit.is_by_filter() {
        let ended_by_filter = counters::MACHINES_ENDED_BY_FILTER.add_one();
        tracing::error!(log = %log.display(), words, ended_by_filter, "{ENDED_BY_FILTER}");
    }
    End::new(Ended { exit, at }, Some(format!("the machine ended while no controller ran: {words}")))
}

/// How far its events have been handed on. If that cannot be known, all that the guest remembers are told again.
fn read_progress(pod: &Pod) -> io::Result<Progress> {
    let mut progress = match Progress::read(pod.files.directory()) {
        Ok(progress) => progress,
        Err(error) => {
            let aside = record::set_aside(pod.files.directory(), file::PROGRESS)?;
            tracing::error!(pod = pod.id(), aside = %aside.display(), %error, "events may be told twice");
            Progress::default()
        }
    };
    // Those of a controller that did not keep such a record.
    for container in pod.share().containers() {
        progress.add(container.as_str());
    }
    Ok(progress)
}

/// Removes everything of a pod that nobody waits for. What cannot be removed yet is kept in the pod, and tried again.
async fn undo(environment: &Arc<Environment>, record: Record) -> Option<Arc<Pod>> {
    let (pod, task) = Pod::new(record, Arc::clone(environment));
    task.spawn(Life::Ended);
    match pod.remove().await {
        Ok(()) => None,
        Err(error) => {
            tracing::error!(pod = pod.id(), error = chain(&error), "cannot undo what a pod has left");
            pod.abandon().await;
            Some(pod)
        }
    }
}

#[cfg(test)]
#[path = "adopt_tests.rs"]
mod tests;
