//! containerd tells of containers when they are created, some time before anybody starts them. What they need is
//! prepared meanwhile, so that their start need not wait for it.
//!
//! Nothing depends on that: a container of which nobody has told is prepared when its guest asks for it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use pericarp_protos::{
    containerd::{
        events::{SubscribeRequest, events_client::EventsClient},
        types::Envelope,
    },
    id::ContainerId,
};
use prost::Message as _;
use tokio::{
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tonic::transport::Channel;

use super::containers::ContainerdContainers;
use crate::{
    pod::{Pod, ports::SourceError},
    pods::Pods,
};

/// The runtime of our containers, as containerd's configuration names it.
const RUNTIME: &str = "io.containerd.pericarp.v1";

const CREATED: &str = "/containers/create";
const DELETED: &str = "/containers/delete";

/// Containers that are prepared at a time, of all pods. Others are prepared when their guests ask.
const AT_A_TIME: usize = 8;
/// Containers of which it is known that their pods have been asked to prepare them. Others are prepared when their
/// guests ask.
const KNOWN_MAX: usize = 4096;

/// How long after containerd was asked to tell of containers it is taken to do so.
const SETTLE: Duration = Duration::from_secs(5);
/// How often containerd is asked which of a pod's containers it has.
const TRIES: u32 = 10;

/// How long after a failure containerd is asked to tell again.
const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// `containerd.events.ContainerCreate` and `ContainerDelete` (`api/events/container.proto`), as far as they matter
/// here.
#[derive(Clone, PartialEq, prost::Message)]
struct ContainerEvent {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "3")]
    runtime: Option<Runtime>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Runtime {
    #[prost(string, tag = "1")]
    name: String,
}

/// What an event tells.
#[derive(Debug, PartialEq, Eq)]
enum Announcement {
    Created { namespace: String, id: ContainerId },
    Deleted { id: ContainerId },
}

fn announcement(envelope: Envelope) -> Option<Announcement> {
    let event = ContainerEvent::decode(envelope.event?.value.as_slice()).ok()?;
    let id = event.id.parse().ok()?;
    match envelope.topic.as_str() {
        CREATED if event.runtime.is_some_and(|runtime| runtime.name == RUNTIME) => {
            Some(Announcement::Created { namespace: envelope.namespace, id })
        }
        DELETED => Some(Announcement::Deleted { id }),
        _ => None,
    }
}

/// Ends when a pod has been asked to prepare a container; returns the pod.
type Preparation = JoinHandle<Option<Weak<Pod>>>;

/// Listens to containerd and has pods prepare their containers, for as long as the controller runs.
pub struct Announcements {
    channel: Channel,
    containers: Arc<ContainerdContainers>,
    pods: Pods,
    places: Arc<Semaphore>,
    /// Containers whose pods were asked to prepare them, and that have not been deleted.
    in_progress: HashMap<ContainerId, Preparation>,
    /// Ends when pods know what was deleted while nobody listened.
    release: Option<JoinHandle<()>>,
}

impl Announcements {
    pub fn new(channel: Channel, containers: Arc<ContainerdContainers>, pods: Pods) -> Self {
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        Self { channel, containers, pods, places, in_progress: HashMap::new(), release: None }
    }

    /// Listens. Does not end.
    pub async fn follow(mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            match self.listen().await {
                Ok(()) => pause = PAUSE_MIN,
                Err(status) => {
                    tracing::debug!(%status, "containerd does not tell of new containers");
                    pause = PAUSE_MAX.min(2 * pause);
                }
            }
            sleep(pause).await;
        }
    }

    /// Takes events until containerd ends, or refuses to tell any.
    async fn listen(&mut self) -> Result<(), tonic::Status> {
        self.release_what_was_deleted();
        let filters = [CREATED, DELETED].map(|topic| format!("topic==\"{topic}\"")).to_vec();
        let request = SubscribeRequest { filters };
        let mut events = EventsClient::new(self.channel.clone()).subscribe(request).await?.into_inner();
        // What ends a stream that has been begun is the end of containerd.
        while let Ok(Some(envelope)) = events.message().await {
            match announcement(envelope) {
                Some(Announcement::Created { namespace, id }) => self.prepare(namespace, id),
                Some(Announcement::Deleted { id }) => self.release(id),
                None => {}
            }
        }
        Ok(())
    }

    fn prepare(&mut self, namespace: String, id: ContainerId) {
        // If there is no place, the node has enough to do.
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else { return };
        if self.in_progress.len() >= KNOWN_MAX {
            // The deletion of some was told while nobody listened.
            self.in_progress.clear();
        }
        let (containers, pods, of) = (Arc::clone(&self.containers), self.pods.clone(), id.clone());
        let preparation = tokio::spawn(async move {
            match containers.sandbox_of(&namespace, &of).await {
                Ok(sandbox) => {
                    let pod = pods.get(&sandbox)?;
                    pod.prepare_ahead(&of, place).await;
                    Some(Arc::downgrade(&pod))
                }
                Err(SourceError::NotFound { .. }) => None,
                Err(error) => {
                    tracing::debug!(container = %of, %error, "a new container is not prepared yet");
                    None
                }
            }
        });
        self.in_progress.insert(id, preparation);
    }

    /// Has what was deleted while nobody listened released, unless that is under way.
    fn release_what_was_deleted(&mut self) {
        if self.release.as_ref().is_none_or(JoinHandle::is_finished) {
            self.release = Some(tokio::spawn(release_deleted(self.pods.all())));
        }
    }

    /// Has a container released, after what was asked of its pod before.
    fn release(&mut self, id: ContainerId) {
        let Some(preparation) = self.in_progress.remove(&id) else {
            // It may have been prepared for an earlier controller, or when its guest asked.
            for pod in self.pods.all().into_iter().filter(|pod| pod.knows_container(&id)) {
                let id = id.clone();
                tokio::spawn(async move { pod.release_deleted(&id).await });
            }
            return;
        };
        tokio::spawn(async move {
            if let Ok(Some(pod)) = preparation.await
                && let Some(pod) = pod.upgrade()
            {
                pod.release_deleted(&id).await;
            }
        });
    }
}

/// Has pods release the containers that were deleted while nobody listened.
async fn release_deleted(pods: Vec<Arc<Pod>>) {
    // By then containerd tells what is deleted from now on. Nothing says when it begins to.
    sleep(SETTLE).await;
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut all = JoinSet::new();
    for pod in pods {
        let places = Arc::clone(&places);
        all.spawn(async move {
            let deleted = deleted_containers(&pod, &places).await;
            // Nobody waits for a pod that hangs in a volume.
            tokio::spawn(async move {
                for id in deleted {
                    pod.release_deleted(&id).await;
                }
            });
        });
    }
    all.join_all().await;
}

async fn deleted_containers(pod: &Pod, places: &Semaphore) -> Vec<ContainerId> {
    let mut pause = PAUSE_MIN;
    for _ in 0..TRIES {
        let place = places.acquire().await;
        let deleted = pod.deleted_containers().await;
        drop(place);
        match deleted {
            Ok(deleted) => return deleted,
            Err(error) => {
                let pod = pod.id();
                tracing::debug!(pod, %error, "it is not known yet which of a pod's containers were deleted");
            }
        }
        sleep(pause).await;
        pause = PAUSE_MAX.min(2 * pause);
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(topic: &str, runtime: Option<&str>) -> Envelope {
        let runtime = runtime.map(|name| Runtime { name: name.to_owned() });
        let event = ContainerEvent { id: "c1".into(), runtime };
        Envelope {
            topic: topic.to_owned(),
            namespace: "k8s.io".into(),
            event: Some(prost_types::Any { type_url: String::new(), value: event.encode_to_vec() }),
            ..Envelope::default()
        }
    }

    #[test]
    fn containers_of_our_runtime_are_announced_and_others_are_not() {
        let id = || "c1".parse().unwrap();
        let created = Announcement::Created { namespace: "k8s.io".into(), id: id() };
        assert_eq!(announcement(envelope(CREATED, Some(RUNTIME))), Some(created));
        assert_eq!(announcement(envelope(CREATED, Some("io.containerd.runc.v2"))), None);
        assert_eq!(announcement(envelope(CREATED, None)), None);
        assert_eq!(announcement(envelope(DELETED, None)), Some(Announcement::Deleted { id: id() }));
        assert_eq!(announcement(envelope("/images/create", Some(RUNTIME))), None);
        let mut odd = envelope(DELETED, None);
        odd.event.as_mut().unwrap().value = vec![0x0a, 0xff];
        assert_eq!(announcement(odd), None);
        assert_eq!(announcement(Envelope { event: None, ..envelope(DELETED, None) }), None);
    }
}
