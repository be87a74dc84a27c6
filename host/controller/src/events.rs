//! The agent's events: task events go on to containerd, timings are kept and logged.

use std::sync::Arc;

use pericarp_protos::{
    agent::{ContainerTiming, Event, TaskEvent, container_timing::Phase, event},
    containerd::{
        events::{ForwardRequest, events_client::EventsClient},
        types::Envelope,
    },
};
use tonic::transport::Channel;

use crate::{guest::Agent, pod::Pod, source::in_namespace};

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
