//! What a pod needs of those outside, in memory, for tests.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use pericarp_protos::id::ContainerId;
use tokio::sync::watch;

use super::{
    ports::{ContainerRequest, ContainerSource, Delivery, EventSink, SourceError, TaskEvent},
    spec::PodSpec,
};
use crate::guest::translate;

/// Containers on record in memory: `odd`, for which something impossible was asked, and what a test adds.
#[derive(Default)]
pub struct MemoryContainers {
    pub containers: Mutex<HashMap<String, ContainerRequest>>,
    pub known_pods: Mutex<HashSet<String>>,
}

#[async_trait]
impl ContainerSource for MemoryContainers {
    async fn container(&self, _pod: &PodSpec, id: &ContainerId) -> Result<ContainerRequest, SourceError> {
        if id.as_str() == "odd" {
            return translate::unsupported("a hologram", "do without").map_err(SourceError::Refused);
        }
        let known = self.containers.lock().unwrap().get(id.as_str()).cloned();
        known.ok_or_else(|| SourceError::NotFound { id: id.to_string() })
    }

    async fn check_container(&self, pod: &PodSpec, id: &ContainerId) -> Result<(), SourceError> {
        if id.as_str() == "unavailable" {
            let cause = Box::new(std::io::Error::other("away"));
            let (source_name, what) = ("memory", "the record");
            return Err(SourceError::Unavailable { source_name, what, id: id.to_string(), cause });
        }
        self.container(pod, id).await.map(drop)
    }

    async fn check_pod(&self, pod: &PodSpec) -> Result<(), SourceError> {
        let is_known = self.known_pods.lock().unwrap().contains(pod.id.as_str());
        if is_known { Ok(()) } else { Err(SourceError::NotFound { id: pod.id.to_string() }) }
    }
}

/// Takes events, unless it is told to defer them.
#[derive(Default)]
pub struct MemoryEvents {
    pub is_closed: AtomicBool,
    pub taken: watch::Sender<Vec<String>>,
}

#[async_trait]
impl EventSink for MemoryEvents {
    async fn deliver(&self, _pod: &PodSpec, event: TaskEvent) -> Delivery {
        if self.is_closed.load(Ordering::SeqCst) {
            return Delivery::Deferred("not now".to_owned());
        }
        self.taken.send_modify(|taken| taken.push(event.topic));
        Delivery::Taken
    }
}
