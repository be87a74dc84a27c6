//! containerd's Task API (`containerd.task.v3.Task`).

mod create;
mod error;
mod events;
mod exit;
mod service;
mod spec;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_protos::{guest::CGROUP_PARENT, id::ContainerId};

use self::error::TaskError;
use crate::{
    container::{Container, PodStorage},
    controller::{ControllerClient, EventLog},
    launch::Reaper,
    pod::Pod,
    resources::{self, OomWatcher},
    stdio::Streams,
};

/// The containers of the pod, and what their tasks need.
pub struct TaskService {
    pod: Arc<Pod>,
    controller: Arc<ControllerClient>,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    events: Arc<EventLog>,
    oom: Option<Arc<OomWatcher>>,
    containers: Mutex<HashMap<ContainerId, ContainerEntry>>,
    storage: PodStorage,
}

/// A container that `Create` has been called for.
enum ContainerEntry {
    Creating,
    Created(Arc<Container>),
}

impl TaskService {
    /// A service without containers. Must be called within a tokio runtime.
    pub fn new(
        pod: Arc<Pod>,
        controller: Arc<ControllerClient>,
        reaper: Arc<Reaper>,
        streams: Arc<Streams>,
        events: Arc<EventLog>,
    ) -> Arc<Self> {
        let oom = match OomWatcher::new() {
            Ok(oom) => Some(Arc::new(oom)),
            Err(error) => {
                tracing::warn!(%error, "running out of memory will not be reported");
                None
            }
        };
        if let Some(oom) = oom.clone() {
            let events = Arc::clone(&events);
            tokio::spawn(
                async move { oom.run(|container_id| events::publish_oom(&events, container_id)).await },
            );
        }
        Arc::new(Self {
            pod,
            controller,
            reaper,
            streams,
            events,
            oom,
            containers: Mutex::default(),
            storage: PodStorage::default(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.containers().get(id) {
            Some(ContainerEntry::Created(container)) => Ok(Arc::clone(container)),
            _ => Err(TaskError::NotFound(format!("container {id}"))),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, ContainerEntry>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adapts the containers' common limits to the guest's memory, which may have changed since the last time.
async fn reserve_for_agent() {
    let reserved = tokio::task::spawn_blocking(|| resources::reserve_for_agent(CGROUP_PARENT)).await;
    if let Err(error) = reserved.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        tracing::warn!(%error, "the containers' common limits do not fit the guest's size");
    }
}
