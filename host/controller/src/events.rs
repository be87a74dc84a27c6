//! The agent's events: task events go on to containerd, timings are kept and logged.

use std::{io, sync::Arc, time::Duration};

use pericarp_protos::{
    agent::{ContainerTiming, Event, TaskEvent, container_timing::Phase, event},
    containerd::{
        events::{ForwardRequest, events_client::EventsClient},
        types::Envelope,
    },
    id::ContainerId,
};
use prost::Message as _;
use tonic::{Code, transport::Channel};

use crate::{errors::chain, event_stream::EventStream, fault, pod::Pod, rate::Rate, source::in_namespace};

/// Characters of a topic that are logged.
const TOPIC_MAX: usize = 64;
/// How long containerd may take for one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long after a failure it is tried again. Neither containerd's socket nor the guest's tells when it is worth it.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Events of a pod at once, and then one in each interval. containerd handles those of the whole node one after the other,
/// writes a line of its log and a file for many of them, and keeps what it has not handled in a queue without an end.
const BURST: u32 = 1000;
const EACH: Duration = Duration::from_millis(10);

/// Whether containerd would say the same the next time.
fn is_refusal(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

/// Hands events on to containerd's event service.
pub struct Forwarder {
    channel: Channel,
}

impl Forwarder {
    pub fn new(channel: Channel) -> Forwarder {
        Forwarder { channel }
    }

    async fn forward(&self, namespace: &str, event: &Event, task: &TaskEvent) -> Result<(), tonic::Status> {
        let payload = task.payload.as_ref();
        let envelope = Envelope {
            timestamp: event
                .timestamp
                .as_ref()
                .map(|time| prost_types::Timestamp { seconds: time.seconds, nanos: time.nanos }),
            namespace: namespace.to_owned(),
            topic: task.topic.clone(),
            event: payload
                .map(|any| prost_types::Any { type_url: any.type_url.clone(), value: any.value.clone() }),
        };
        let request = in_namespace(ForwardRequest { envelope: Some(envelope) }, namespace)?;
        EventsClient::new(self.channel.clone()).forward(request).await.map(drop)
    }
}

/// What every task event begins with: `container_id` is field 1 of each message in
/// `containerd.events` (`api/events/task.proto`).
#[derive(Clone, PartialEq, prost::Message)]
struct OfContainer {
    #[prost(string, tag = "1")]
    container_id: String,
}

/// Topic and message of each event that a task may tell (`core/runtime/events.go`).
const TASK_EVENTS: [(&str, &str); 10] = [
    ("/tasks/create", "containerd.events.TaskCreate"),
    ("/tasks/start", "containerd.events.TaskStart"),
    ("/tasks/oom", "containerd.events.TaskOOM"),
    ("/tasks/exit", "containerd.events.TaskExit"),
    ("/tasks/delete", "containerd.events.TaskDelete"),
    ("/tasks/exec-added", "containerd.events.TaskExecAdded"),
    ("/tasks/exec-started", "containerd.events.TaskExecStarted"),
    ("/tasks/paused", "containerd.events.TaskPaused"),
    ("/tasks/resumed", "containerd.events.TaskResumed"),
    ("/tasks/checkpointed", "containerd.events.TaskCheckpointed"),
];

/// The container that an event is about; `None` for what is no task event. containerd believes what it is
/// told, so a guest must not tell of anything but its own containers.
fn container_of(task: &TaskEvent) -> Option<ContainerId> {
    let payload = task.payload.as_ref()?;
    let expected = TASK_EVENTS.iter().find(|(topic, _)| *topic == task.topic)?.1;
    let named = payload.type_url.rsplit('/').next();
    let decoded = OfContainer::decode(payload.value.as_slice()).ok()?;
    if named == Some(expected) { decoded.container_id.try_into().ok() } else { None }
}

/// What became of an event that was to be handed on.
enum Handed {
    /// containerd has it, or will never take it.
    Over,
    /// containerd does not answer, and this is why: to be tried again.
    NotYet(String),
}

impl Pod {
    /// Takes the agent's events for as long as the guest lives, from where the last controller stopped.
    pub(crate) fn follow_events(self: &Arc<Self>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let rate = Rate::new(BURST, EACH);
            let mut pause = PAUSE_MIN;
            // Whether it was said already: what repeats is said once.
            let mut interrupted = false;
            while pod.end().is_none() {
                let before = pod.last_event();
                let taken = pod.take_events(&rate).await;
                // What has not been taken waits in the guest, not here.
                pause = if pod.last_event() > before { PAUSE_MIN } else { PAUSE_MAX.min(2 * pause) };
                if interrupted && pod.last_event() > before {
                    interrupted = false;
                    tracing::info!(pod = pod.id, "the guest's events are handed on again");
                }
                if let Err(reason) = taken
                    && !interrupted
                    && pod.end().is_none()
                {
                    interrupted = true;
                    tracing::warn!(pod = pod.id, reason, "the guest's events wait");
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ended = pod.wait() => {}
                }
            }
        });
    }

    /// Takes events until there are no more on this connection, or containerd does not take one.
    async fn take_events(&self, rate: &Rate) -> Result<(), String> {
        let lost = |error: io::Error| error.to_string();
        let mut events = EventStream::open(&self.vsock(), self.last_event()).await.map_err(lost)?;
        while let Some(event) = events.next().await.map_err(lost)? {
            rate.wait().await;
            match self.take_event(&event).await {
                Handed::Over => {}
                Handed::NotYet(reason) => return Err(reason),
            }
        }
        Ok(())
    }

    async fn take_event(&self, event: &Event) -> Handed {
        let last = self.last_event();
        if event.sequence <= last {
            // Only an agent that is broken or hostile says something twice. It waits before it is heard again.
            return Handed::NotYet(format!("it tells of event {} again", event.sequence));
        }
        if event.sequence > last + 1 {
            let missing = event.sequence - last - 1;
            self.caused_by_guest(|| {
                tracing::warn!(pod = self.id, missing, "the guest has had to drop events");
            });
        }
        let mut ended = None;
        match &event.event {
            Some(event::Event::Task(task)) => {
                let container =
                    container_of(task).filter(|container| self.knows_container(container.as_str()));
                let Some(container) = container else {
                    let topic: String = task.topic.chars().take(TOPIC_MAX).collect();
                    self.caused_by_guest(|| {
                        tracing::warn!(pod = self.id, topic, "guest tells of what is not its own; dropped");
                    });
                    self.progress(|progress| progress.last_event = event.sequence);
                    return Handed::Over;
                };
                if let Handed::NotYet(reason) = self.hand_on(event, task).await {
                    return Handed::NotYet(reason);
                }
                fault::point("event-handed-on");
                ended = (task.topic == "/tasks/delete").then_some(container);
            }
            Some(event::Event::Timing(timing)) => self.take_timing(timing),
            _ => {}
        }
        self.progress(|progress| {
            progress.last_event = event.sequence;
            if let Some(container) = &ended {
                progress.forget(container.as_str());
            }
        });
        if let Some(container) = ended {
            self.release_deleted(&container).await;
        }
        Handed::Over
    }

    /// The agent has asked for this before, but maybe while there was no controller.
    async fn release_deleted(&self, container: &ContainerId) {
        if let Err(error) = self.release_container(container).await {
            self.caused_by_guest(|| {
                let error = chain(&error);
                tracing::warn!(pod = self.id, %container, error, "cannot release a deleted container");
            });
        }
    }

    async fn hand_on(&self, event: &Event, task: &TaskEvent) -> Handed {
        let forwarding = self.node().forwarder.forward(&self.namespace, event, task);
        match tokio::time::timeout(FORWARD_TIMEOUT, forwarding).await {
            Ok(Ok(())) => Handed::Over,
            Ok(Err(status)) if is_refusal(status.code()) => {
                self.caused_by_guest(|| {
                    tracing::warn!(pod = self.id, topic = task.topic, %status, "containerd does not take an event");
                });
                Handed::Over
            }
            Ok(Err(status)) => Handed::NotYet(format!("containerd takes no events now: {status}")),
            Err(_) => Handed::NotYet("containerd does not take an event in time".to_owned()),
        }
    }

    fn take_timing(&self, timing: &ContainerTiming) {
        let milliseconds = crate::timeline::milliseconds(timing.duration_ns);
        let phase = timing.phase.enum_value_or_default();
        let known = self.with_container_timeline(&timing.container_id, |timeline| match phase {
            Phase::PHASE_CREATE => timeline.create = Some(milliseconds),
            Phase::PHASE_START => timeline.start = Some(milliseconds),
            Phase::PHASE_UNSPECIFIED => {}
        });
        if let Some(timeline) = known {
            self.caused_by_guest(|| {
                tracing::info!(
                    pod = self.id,
                    container = timing.container_id,
                    ?timeline,
                    "container {phase:?}"
                );
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_protos::{agent::TaskEvent, protobuf::well_known_types::any::Any};

    use super::*;

    fn event(topic: &str, kind: &str, container: &str) -> TaskEvent {
        let value = OfContainer { container_id: container.into() }.encode_to_vec();
        TaskEvent {
            topic: topic.into(),
            payload: Some(Any { type_url: kind.into(), value, ..Any::default() }).into(),
            ..TaskEvent::default()
        }
    }

    #[test]
    fn a_task_event_names_its_container() {
        let plain = event("/tasks/exit", "containerd.events.TaskExit", "c1");
        let with_host = event("/tasks/exit", "type.googleapis.com/containerd.events.TaskExit", "c1");
        assert_eq!(container_of(&plain).unwrap().as_str(), "c1");
        assert_eq!(container_of(&with_host).unwrap().as_str(), "c1");
    }

    #[test]
    fn anything_else_names_none() {
        for (topic, kind) in [
            ("/containers/delete", "containerd.events.ContainerDelete"),
            ("/tasks/exit", "containerd.events.ContainerDelete"),
            ("/tasks/../images", "containerd.events.TaskExit"),
            ("", ""),
        ] {
            assert_eq!(container_of(&event(topic, kind, "c1")), None, "{topic} {kind}");
        }
        let mut damaged = event("/tasks/exit", "containerd.events.TaskExit", "c1");
        damaged.payload.as_mut().unwrap().value = vec![0x0a, 0xff];
        assert_eq!(container_of(&damaged), None);
    }
}
