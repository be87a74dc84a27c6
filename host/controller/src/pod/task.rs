//! A pod's task: it owns the pod's state and works off its mailbox, one request after the other.
//!
//! Nobody else changes that state, and nothing that the task does depends on who waits for it.

use std::{
    future::poll_fn,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use pericarp_protos::id::ContainerId;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::{Instant, sleep_until},
};

use super::{
    ContainerError, Ended, Pod, PodError,
    life::{Life, Phase},
    owned::{Extent, Owned},
    ports::ContainerRequest,
    status::PodStatus,
};
use crate::{
    fault::FaultPoint,
    guest::service::{AgentFeatures, Prepared},
    host::{
        machine::Exit,
        size::{CpuAndMemory, Limits},
    },
    telemetry::{error_chain::chain, timeline::ContainerTimeline},
};

/// How long a pod may be known without being started. containerd may pull an image between the two calls, and kubelet
/// gives the whole up after 4 minutes.
const START_LIMIT: Duration = Duration::from_secs(10 * 60);

/// How long after a failure a pod is tried to be removed again: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_SLOWEST: Duration = Duration::from_secs(60);

/// Where an answer goes. Whoever has asked may have gone away.
pub type Reply<T> = oneshot::Sender<T>;

/// What a pod's task is asked for.
pub enum Command {
    Start {
        /// Nanoseconds on the host's monotonic clock.
        called_at: u64,
        /// Gets the machine's process id.
        reply: Reply<Result<u32, PodError>>,
    },
    Stop(Reply<Result<(), PodError>>),
    Remove(Reply<Result<(), PodError>>),
    /// To be removed, now or when it can be.
    Abandon,
    /// The machine has ended: what else runs of the pod is of no use.
    MachineEnded,
    Prepare {
        id: ContainerId,
        request: ContainerRequest,
        agent: AgentFeatures,
        reply: Reply<Result<Prepared, ContainerError>>,
    },
    /// To be prepared although no guest has asked for it yet.
    PrepareAhead {
        id: ContainerId,
        request: ContainerRequest,
        /// Its place among those that are prepared at a time on this node.
        place: OwnedSemaphorePermit,
    },
    /// To be released, as its source has deleted it.
    ReleaseDeleted {
        id: ContainerId,
    },
    Fit {
        id: ContainerId,
        limits: Limits,
        reply: Reply<Result<(), ContainerError>>,
    },
    Release {
        id: ContainerId,
        reply: Reply<Result<(), ContainerError>>,
    },
    Resize {
        limits: CpuAndMemory,
        overhead: CpuAndMemory,
        reply: Reply<Result<(), PodError>>,
    },
    /// What an earlier controller may have left half done, as it was killed, is put right.
    TakenOver,
    /// Links of the pod's network were removed from under it.
    LinksRemoved(Vec<String>),
    /// One more thing is owned, as a test has it.
    #[cfg(test)]
    Own(super::owned::Resource),
    /// The guest tells how long a phase of a container's start took.
    ContainerTiming {
        id: ContainerId,
        timing: ContainerTimeline,
    },
}

/// When a removal that has failed is tried again.
struct Retry {
    pause: Duration,
    at: Instant,
}

/// Does some work to its end; returns whether it has not panicked.
async fn is_finished(work: impl Future<Output = ()>) -> bool {
    let mut work = pin!(work);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(state) => state.map(|()| true),
        Err(_) => Poll::Ready(false),
    })
    .await
}

/// A pod's state.
pub struct PodTask {
    pub(super) pod: Arc<Pod>,
    pub(super) life: Life,
    /// What is to be removed when the pod ends.
    pub(super) owned: Owned,
    /// Whether somebody waits for the machine's end and tells of it: see [`super::machine_exit`].
    pub(super) is_machine_watched: bool,
    /// Whether the machine may have a disk that is on record of no container.
    pub(super) has_unrecorded_disks: bool,
    commands: mpsc::Receiver<Command>,
    retry: Option<Retry>,
}

impl PodTask {
    pub fn new(pod: Arc<Pod>, commands: mpsc::Receiver<Command>) -> Self {
        let owned = pod.status.borrow().owned.clone();
        Self {
            pod,
            life: Life::Created,
            owned,
            is_machine_watched: false,
            has_unrecorded_disks: false,
            commands,
            retry: None,
        }
    }

    /// Begins to serve, with a pod in that state.
    pub fn spawn(mut self, life: Life) {
        self.life = life;
        self.publish(|_| ());
        tokio::spawn(self.serve());
    }

    async fn serve(mut self) {
        let give_up = Instant::now() + START_LIMIT;
        loop {
            let is_created = matches!(self.life, Life::Created);
            let retry = self.retry.as_ref().map(|retry| retry.at);
            tokio::select! {
                command = self.commands.recv() => match command {
                    Some(command) => {
                        if !is_finished(self.handle(command)).await {
                            self.give_up_after_panic();
                        }
                    }
                    // The mailbox was closed because everything has been removed.
                    None => return,
                },
                () = sleep_until(give_up), if is_created => {
                    let name = self.pod.title();
                    tracing::warn!(pod = self.pod.id(), name, "a pod that nobody has started is given up");
                    self.abandon().await;
                }
                () = sleep_until(retry.unwrap_or(give_up)), if retry.is_some() => self.abandon().await,
            }
        }
    }

    /// Ends the pod whose task has panicked: nobody knows what has been done of it. The other pods go on.
    fn give_up_after_panic(&mut self) {
        tracing::error!(
            pod = self.pod.id(),
            name = self.pod.title(),
            "a pod's task has panicked; the pod is ended"
        );
        self.pod.stopping.send_replace(true);
        self.retry = Some(Retry { pause: RETRY_FIRST, at: Instant::now() + RETRY_FIRST });
    }

    async fn handle(&mut self, command: Command) {
        // Whoever has asked may have gone away: then nobody takes the answer.
        match command {
            Command::Start { called_at, mut reply } => {
                let started = self.start(called_at, &mut reply).await;
                let _ = reply.send(started);
            }
            Command::Stop(reply) => {
                let _ = reply.send(self.stop().await.map_err(|source| self.teardown(source)));
            }
            Command::Remove(reply) => {
                let _ = reply.send(self.remove().await.map_err(|source| self.teardown(source)));
            }
            Command::Abandon => self.abandon().await,
            Command::MachineEnded => {
                if let Err(error) = self.stop().await {
                    tracing::error!(pod = self.pod.id(), %error, "cannot clean up after a machine");
                }
            }
            Command::Prepare { id, request, agent, reply } => {
                let _ = reply.send(self.prepare_for_guest(&id, request, agent).await);
            }
            Command::PrepareAhead { id, request, place } => {
                self.prepare_ahead(id, request).await;
                drop(place);
            }
            Command::ReleaseDeleted { id } => self.release_deleted(&id).await,
            Command::Fit { id, limits, reply } => {
                let _ = reply.send(self.fit_limits(&id, limits).await);
            }
            Command::Release { id, reply } => {
                let _ = reply.send(self.release(&id).await);
            }
            Command::Resize { limits, overhead, reply } => {
                let _ = reply.send(self.resize(limits, overhead).await);
            }
            Command::TakenOver => {
                self.has_unrecorded_disks = true;
                self.remove_unrecorded_disks().await;
            }
            Command::LinksRemoved(links) => self.publish(|status| {
                for interface in
                    status.interfaces.iter_mut().filter(|interface| links.contains(&interface.name))
                {
                    interface.removed = true;
                }
            }),
            Command::ContainerTiming { id, timing } => self.note_timing(&id, timing),
            #[cfg(test)]
            Command::Own(resource) => self.owned.add(resource),
        }
    }

    /// Shows the state to everybody, with what `change` changes of what is only shown.
    pub(super) fn publish(&self, change: impl FnOnce(&mut PodStatus)) {
        self.pod.status.send_modify(|status| {
            status.phase = self.life.phase();
            status.owned.clone_from(&self.owned);
            if let Some(size) = self.life.running().and_then(|running| running.size) {
                status.size = size;
            }
            change(status);
        });
    }

    /// Ends the machine and removes all that runs; the directory with the logs stays.
    pub(super) async fn stop(&mut self) -> io::Result<()> {
        self.end(Extent::Running).await
    }

    /// Removes everything, and with it the pod.
    pub(super) async fn remove(&mut self) -> io::Result<()> {
        self.end(Extent::Running).await?;
        self.end(Extent::Everything).await?;
        FaultPoint::PodRemoved.reached();
        // From here the pod does not exist for anybody; what has been asked for until now is answered so.
        self.commands.close();
        tracing::info!(pod = self.pod.id(), name = self.pod.title(), "pod removed");
        Ok(())
    }

    async fn end(&mut self, extent: Extent) -> io::Result<()> {
        self.pod.stopping.send_replace(true);
        self.life.advance(Life::Ended);
        self.publish(|status| status.containers.clear());
        let mut owned = self.owned.clone();
        let (owned, result) = self
            .pod
            .blocking
            .run(move || {
                let result = owned.remove(extent);
                (owned, result)
            })
            .await;
        self.owned = owned;
        self.publish(|_| ());
        result?;
        if self.is_machine_watched {
            // Whoever watches it tells of its end when it has been reaped.
            self.pod.wait().await;
        } else if self.pod.end().is_none() {
            // There was no machine, so nobody else tells those who wait.
            let ended = Ended { exit: Exit::Code(0), at: std::time::SystemTime::now() };
            self.pod.ended.send_replace(Some(ended));
        }
        Ok(())
    }

    /// Removes everything, or tries again later.
    pub(super) async fn abandon(&mut self) {
        let pause = self.retry.take().map_or(RETRY_FIRST, |retry| RETRY_SLOWEST.min(2 * retry.pause));
        if let Err(error) = self.remove().await {
            tracing::error!(pod = self.pod.id(), %error, ?pause, "cannot remove a pod yet");
            self.retry = Some(Retry { pause, at: Instant::now() + pause });
        }
    }

    fn teardown(&self, source: io::Error) -> PodError {
        PodError::Teardown { pod: self.pod.title(), source }
    }

    async fn start(
        &mut self,
        called_at: u64,
        caller: &mut Reply<Result<u32, PodError>>,
    ) -> Result<u32, PodError> {
        let phase = self.life.phase();
        if phase != Phase::Created {
            return Err(PodError::Phase { pod: self.pod.title(), phase });
        }
        self.life.advance(Life::Starting);
        self.publish(|status| status.marks.start = called_at);
        match self.boot(caller).await {
            Ok(running) => {
                let pid = running.pid;
                self.life.advance(Life::running_with(running));
                self.publish(|status| status.marks.end = pericarp_vmm::monotonic_ns());
                self.pod.log_timeline();
                Ok(pid)
            }
            Err(source) => {
                let error = PodError::Start { pod: self.pod.title(), source };
                tracing::warn!(pod = self.pod.id(), error = chain(&error), "a pod does not start");
                self.abandon().await;
                Err(error)
            }
        }
    }

    fn note_timing(&self, id: &ContainerId, timing: ContainerTimeline) {
        let mut noted = None;
        self.pod.status.send_if_modified(|status| {
            // A guest may speak of a container that is not prepared.
            if let Some(known) = status.containers.get_mut(id) {
                known.create = timing.create.or(known.create);
                known.start = timing.start.or(known.start);
                noted = Some(*known);
            }
            noted.is_some()
        });
        if let Some(ContainerTimeline { prepare, create, start }) = noted {
            self.pod.caused_by_guest(|| {
                let container = id.as_str();
                tracing::info!(
                    pod = self.pod.id(),
                    container,
                    prepare_ms = prepare,
                    create_ms = create,
                    start_ms = start,
                    "container timing"
                );
            });
        }
    }
}
