//! A pod: its machine, its directory, its containers' file systems.
//!
//! Each pod has a task ([`task`]) that owns its state ([`life`]) and works off a mailbox. A [`Pod`] is what everybody
//! else holds: it sends requests to the task and waits for the answer, so that a caller that goes away changes nothing.
//! Three more tasks belong to a pod that runs: one watches its machine ([`machine_exit`]), one takes its guest's
//! requests ([`requests`]), one its guest's events ([`events`]).
//!
//! What a pod is made from is its [`spec`], whom it needs outside are its [`ports`], and what it has on the host is on
//! one list ([`owned`]), which is kept on disk ([`record`]) for the next controller ([`adopt`]).

mod adopt;
mod boot_queue;
mod configuration;
mod containers;
mod disks;
mod events;
mod files;
mod guest_errors;
mod health;
pub mod life;
mod machine_exit;
mod network;
pub mod owned;
pub mod ports;
mod progress;
pub mod record;
mod requests;
mod resize;
pub mod spec;
mod start;
mod start_budget;
pub mod status;
mod task;

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, OnceLock},
    time::SystemTime,
};

use pericarp_protos::{id::ContainerId, vmm::BootTimes};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

pub use self::{
    adopt::{adopt_all, owned_in},
    boot_queue::BootQueue,
    containers::ContainerError,
    record::end_on_record,
    resize::ResizeError,
    start::StartError,
};
use self::{
    files::PodFiles,
    life::{Life, Phase},
    ports::{ContainerSource, EventSink, SourceError},
    progress::ProgressFile,
    record::{Record, RecordFile},
    spec::PodSpec,
    status::PodStatus,
    task::{Command, PodTask, Reply},
};
use crate::{
    blocking::BlockingWork,
    config::{
        Config,
        rate_limits::{self, RateLimitError},
    },
    guest::service::{AgentFeatures, Prepared},
    host::{
        machine::{Exit, MachineControl},
        share::Share,
        size::{self, CpuAndMemory, HostCapacity, Size},
    },
    telemetry::log_limit::LogLimit,
};

/// Requests that wait for a pod's task at most. Who has another waits for room.
const MAILBOX: usize = 32;

/// What all pods share.
pub struct Environment {
    pub config: Config,
    pub containers: Arc<dyn ContainerSource>,
    pub events: Arc<dyn EventSink>,
    pub capacity: HostCapacity,
    pub boots: BootQueue,
    /// The user namespace of all machines. Without one, none can be started.
    pub machines_user_namespace: Option<OwnedFd>,
    /// Reads a record that an older controller has left in a pod's directory; `None` if it cannot be read either.
    pub read_older_record: fn(&[u8], &Path) -> Option<Record>,
}

/// The end of a pod's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    pub exit: Exit,
    pub at: SystemTime,
}

/// Why a request about a pod fails. Each names the pod.
#[derive(Debug, Error)]
pub enum PodError {
    #[error("{pod}")]
    Size {
        pod: String,
        #[source]
        source: size::Error,
    },
    #[error(
        "{pod} asks for virtual machines of its own, and this node does not allow them; remove that from \
         the pod, or set nested_virtualization = true in the controller's configuration"
    )]
    NestedVirtualization { pod: String },
    #[error("{pod}")]
    RateLimit {
        pod: String,
        #[source]
        source: RateLimitError,
    },
    #[error("{pod} cannot be started: it is {phase:?}")]
    Phase { pod: String, phase: Phase },
    #[error("{pod} cannot be started")]
    Start {
        pod: String,
        #[source]
        source: StartError,
    },
    #[error("{pod} cannot be taken down")]
    Teardown {
        pod: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{pod} cannot be resized: it is {phase:?}")]
    NotRunning { pod: String, phase: Phase },
    #[error("{pod} cannot be resized")]
    Resize {
        pod: String,
        #[source]
        source: ResizeError,
    },
    #[error("{pod} has been removed")]
    Removed { pod: String },
    #[error("{pod}: the controller has failed at this; its log says where")]
    Failed { pod: String },
}

/// A pod, as everybody but its task sees it.
pub struct Pod {
    spec: PodSpec,
    /// The machine's size at its start.
    size: Size,
    files: PodFiles,
    environment: Arc<Environment>,
    mailbox: mpsc::Sender<Command>,
    status: watch::Sender<PodStatus>,
    ended: watch::Sender<Option<Ended>>,
    /// Whether somebody outside waits, or has waited, for its end.
    claimed: watch::Sender<bool>,
    /// Whether the machine is to end. It is ended at once, before anything is removed that may take its time.
    stopping: watch::Sender<bool>,
    record: RecordFile,
    /// What has been taken of the guest's events.
    progress: ProgressFile,
    /// Of what the guest causes.
    log_limit: LogLimit,
    blocking: BlockingWork,
    control: MachineControl,
    boot_times: OnceLock<BootTimes>,
}

impl Pod {
    /// Checks what is asked for and takes note of it. Nothing is made yet.
    pub fn create(spec: PodSpec, environment: Arc<Environment>) -> Result<Arc<Self>, PodError> {
        let pod = spec.title();
        if spec.nested_virtualization && !environment.config.nested_virtualization {
            return Err(PodError::NestedVirtualization { pod });
        }
        if let Err(source) = rate_limits::check(&environment.config.rate_limits, &spec.rate_limits) {
            return Err(PodError::RateLimit { pod, source });
        }
        let size = Size::at_start(&spec.resources, &environment.config, environment.capacity)
            .map_err(|source| PodError::Size { pod, source })?;
        let (pod, task) = Self::new(Record::new(spec, size), environment);
        task.spawn(Life::Created);
        Ok(pod)
    }

    /// Makes a pod of a record, and its task, which does not run yet.
    fn new(record: Record, environment: Arc<Environment>) -> (Arc<Self>, PodTask) {
        let (mailbox, commands) = mpsc::channel(MAILBOX);
        let (spec, size) = (record.spec.clone(), record.size);
        let files = PodFiles::new(&environment.config.run_dir, &spec.id);
        let status = PodStatus {
            interfaces: record.interfaces.clone(),
            port_forward: record.port_forward.clone(),
            owned: record.owned.clone(),
            ..PodStatus::new(size)
        };
        let pod = Arc::new(Self {
            spec,
            size,
            environment,
            mailbox,
            status: watch::Sender::new(status),
            ended: watch::Sender::new(None),
            claimed: watch::Sender::new(false),
            stopping: watch::Sender::new(false),
            record: RecordFile::new(files.directory().to_owned(), record),
            progress: ProgressFile::new(files.directory()),
            log_limit: LogLimit::new(),
            blocking: BlockingWork::new(),
            control: MachineControl::new(files.control()),
            boot_times: OnceLock::new(),
            files,
        });
        let task = PodTask::new(Arc::clone(&pod), commands);
        (pod, task)
    }

    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    pub fn id(&self) -> &str {
        self.spec.id.as_str()
    }

    /// "pod namespace/name (id)", for messages.
    pub fn title(&self) -> String {
        self.spec.title()
    }

    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    pub fn directory(&self) -> &Path {
        self.files.directory()
    }

    /// Reads something for which one may have to wait, on a thread where that does no harm.
    pub async fn read_blocking<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> T {
        self.blocking.run(read).await
    }

    /// The address on which containerd reaches the tasks.
    pub fn task_address(&self) -> String {
        self.files.task_address()
    }

    /// Starts the machine and makes its guest into the pod; returns the machine's process id. On an error nothing is
    /// left of the pod, or what cannot be removed yet is tried to be removed until it is.
    pub async fn start(&self) -> Result<u32, PodError> {
        let called_at = pericarp_vmm::monotonic_ns();
        self.ask(|reply| Command::Start { called_at, reply }).await?
    }

    /// Ends the machine and unmounts everything; the directory with the logs stays. A pod may be stopped again.
    pub async fn stop(&self) -> Result<(), PodError> {
        // At once: what is removed afterwards may wait for what is under way.
        self.stopping.send_replace(true);
        match self.ask(Command::Stop).await {
            Err(PodError::Removed { .. }) => Ok(()),
            stopped => stopped?,
        }
    }

    /// Removes everything of the pod. A pod that has been removed may be removed again.
    pub async fn remove(&self) -> Result<(), PodError> {
        self.stopping.send_replace(true);
        match self.ask(Command::Remove).await {
            Err(PodError::Removed { .. }) => Ok(()),
            removed => removed?,
        }
    }

    /// Has the pod removed, now or as soon as it can be. Nobody waits for that.
    pub async fn abandon(&self) {
        self.stopping.send_replace(true);
        // Who has been removed need not be told.
        let _ = self.mailbox.send(Command::Abandon).await;
    }

    /// Makes the machine fit what the pod may use now.
    pub async fn resize(&self, limits: CpuAndMemory, overhead: CpuAndMemory) -> Result<(), PodError> {
        self.ask(|reply| Command::Resize { limits, overhead, reply }).await?
    }

    /// Looks a container up, makes its files and disks appear in the guest, and returns its spec.
    async fn prepare_container(
        &self,
        id: &ContainerId,
        agent: AgentFeatures,
    ) -> Result<Prepared, ContainerError> {
        let request = self.look_up(id).await?;
        let id = id.clone();
        self.ask_for_container(|reply| Command::Prepare { id, request, agent, reply }).await
    }

    /// Prepares a container that no guest has asked for yet. Nobody is told of an error: the guest is, if it asks. A
    /// pod that has enough to do does not prepare it.
    pub async fn prepare_ahead(&self, id: &ContainerId, place: OwnedSemaphorePermit) {
        match self.look_up(id).await {
            Ok(request) => {
                let command = Command::PrepareAhead { id: id.clone(), request, place };
                drop(self.mailbox.try_send(command));
            }
            Err(error) => {
                tracing::debug!(pod = self.id(), container = %id, %error, "a new container is not prepared yet");
            }
        }
    }

    /// Releases a container that its source has deleted.
    pub async fn release_deleted(&self, id: &ContainerId) {
        // A pod that has been removed has nothing left of it.
        drop(self.mailbox.send(Command::ReleaseDeleted { id: id.clone() }).await);
    }

    /// The containers that its source no longer has: they may have been deleted while nobody listened.
    pub async fn deleted_containers(&self) -> Result<Vec<ContainerId>, SourceError> {
        // Whose pod is not known may know this one's containers by another name.
        match self.environment.containers.check_pod(&self.spec).await {
            Err(SourceError::NotFound { .. }) => return Ok(Vec::new()),
            known => known?,
        }
        let share = self.share();
        let in_share = self.blocking.run(move || share.containers()).await;
        let known: BTreeSet<ContainerId> = in_share.into_iter().chain(self.progress.containers()).collect();
        let mut deleted = Vec::new();
        for id in known {
            match self.environment.containers.check_container(&self.spec, &id).await {
                Err(SourceError::NotFound { .. }) => deleted.push(id),
                checked => checked?,
            }
        }
        Ok(deleted)
    }

    /// What the guest sees of the host.
    fn share(&self) -> Share {
        Share::new(self.status.borrow().owned.share(), self.files.volume_users())
    }

    /// Whether something may be prepared for this container.
    pub fn knows_container(&self, id: &ContainerId) -> bool {
        self.progress.knows(id.as_str())
    }

    /// Makes the machine fit what a container may use now.
    async fn fit_container(&self, id: &ContainerId) -> Result<(), ContainerError> {
        // As for any other request: the id is looked up, and the limits are those on record, not the guest's.
        let limits = self.look_up(id).await?.limits();
        let id = id.clone();
        self.ask_for_container(|reply| Command::Fit { id, limits, reply }).await
    }

    /// Undoes what was prepared, if it was.
    async fn release_container(&self, id: &ContainerId) -> Result<(), ContainerError> {
        let id = id.clone();
        self.ask_for_container(|reply| Command::Release { id, reply }).await
    }

    /// Resolves when the machine has ended; at once if it has.
    pub async fn wait(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        loop {
            if let Some(ended) = *ended.borrow_and_update() {
                return ended;
            }
            // The sender is part of this pod, which is borrowed here.
            let _ = ended.changed().await;
        }
    }

    /// When and how the machine ended, if it has.
    pub fn end(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    pub fn phase(&self) -> Phase {
        if self.end().is_some() { Phase::Ended } else { self.status.borrow().phase }
    }

    pub fn status(&self) -> PodStatus {
        PodStatus { phase: self.phase(), ..self.status.borrow().clone() }
    }

    /// Notes that somebody outside waits for its end, and so knows this pod.
    pub fn claim(&self) {
        self.claimed.send_replace(true);
    }

    /// Resolves when somebody has shown that they know this pod; at once if they have.
    pub async fn claimed(&self) {
        // The sender is part of this pod, which is borrowed here.
        let _ = self.claimed.subscribe().wait_for(|claimed| *claimed).await;
    }

    /// Resolves when it is neither about to start nor starting.
    pub async fn started(&self) {
        // The sender is part of this pod, which is borrowed here.
        let mut status = self.status.subscribe();
        let _ = status.wait_for(|status| !matches!(status.phase, Phase::Created | Phase::Starting)).await;
    }

    /// Whether everything of it has been removed.
    pub fn is_removed(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Resolves when everything of it has been removed.
    pub async fn removed(&self) {
        self.mailbox.closed().await;
    }

    /// Resolves when the machine is to end.
    async fn stop_requested(&self) {
        // The sender is part of this pod, which is borrowed here.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    fn is_stop_requested(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Whether its machine has ended or is to end: then nobody wonders that its guest does not answer.
    fn is_ending(&self) -> bool {
        self.end().is_some() || self.is_stop_requested()
    }

    /// Writes a line of the log that the guest can cause, unless it has caused too many.
    fn caused_by_guest(&self, write: impl FnOnce()) {
        let Some(suppressed) = self.log_limit.permit() else { return };
        if suppressed > 0 {
            tracing::warn!(pod = self.id(), suppressed, "the guest has caused more lines than are written");
        }
        write();
    }

    /// Sends a request to the pod's task and waits for the answer. It is carried through whether or not this is polled
    /// on.
    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Command) -> Result<T, PodError> {
        let removed = || PodError::Removed { pod: self.title() };
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(request(reply)).await.map_err(|_| removed())?;
        answer
            .await
            .map_err(|_| if self.is_removed() { removed() } else { PodError::Failed { pod: self.title() } })
    }

    async fn ask_for_container<T>(
        &self,
        request: impl FnOnce(Reply<Result<T, ContainerError>>) -> Command,
    ) -> Result<T, ContainerError> {
        self.ask(request).await.unwrap_or(Err(ContainerError::Ended))
    }
}

#[cfg(test)]
pub mod in_memory;
#[cfg(test)]
pub mod tests;
