//! The agent's events: task events go on to containerd, timings are kept and logged.

use std::sync::Arc;

use pericarp_protos::{
    agent::{ContainerTiming, Event, TaskEvent, container_timing::Phase, event},
    containerd::{
        events::{ForwardRequest, events_client::EventsClient},
        types::Envelope,
    },
};
use prost::Message as _;
use tonic::transport::Channel;

use crate::{guest::Agent, pod::Pod, source::in_namespace};

/// Characters of a topic that are logged.
const TOPIC_MAX: usize = 64;

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
fn container_of(task: &TaskEvent) -> Option<String> {
    let payload = task.payload.as_ref()?;
    let expected = TASK_EVENTS.iter().find(|(topic, _)| *topic == task.topic)?.1;
    let named = payload.type_url.rsplit('/').next();
    let decoded = OfContainer::decode(payload.value.as_slice()).ok()?;
    (named == Some(expected)).then_some(decoded.container_id)
}

impl Pod {
    /// Takes the agent's events for as long as the guest lives.
    pub(crate) fn follow_events(self: &Arc<Self>, agent: Agent) {
        let pod = self.clone();
        tokio::spawn(async move {
            let mut events = match agent.events(pod.last_event()).await {
                Ok(events) => events,
                Err(error) => {
                    tracing::warn!(pod = pod.id, %error, "the guest's agent gives no events");
                    return;
                }
            };
            // Ends with the connection, which ends with the machine.
            while let Ok(Some(event)) = events.recv().await {
                pod.take_event(&event).await;
            }
        });
    }

    async fn take_event(&self, event: &Event) {
        self.set_last_event(event.sequence);
        match &event.event {
            Some(event::Event::Task(task)) => {
                if !container_of(task).is_some_and(|container| self.knows_container(&container)) {
                    let topic: String = task.topic.chars().take(TOPIC_MAX).collect();
                    tracing::warn!(pod = self.id, topic, "guest tells of what is not its own; dropped");
                    return;
                }
                if let Err(status) = self.node().forwarder.forward(&self.namespace, event, task).await {
                    tracing::warn!(pod = self.id, topic = task.topic, %status, "containerd does not take an event");
                }
            }
            Some(event::Event::Timing(timing)) => self.take_timing(timing),
            _ => {}
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
            tracing::info!(pod = self.id, container = timing.container_id, ?timeline, "container {phase:?}");
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
        assert_eq!(container_of(&plain).as_deref(), Some("c1"));
        assert_eq!(container_of(&with_host).as_deref(), Some("c1"));
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
