//! containerd is told what happens to containers.

use std::time::Duration;

use async_trait::async_trait;
use pericarp_protos::containerd::{
    events::{ForwardRequest, events_client::EventsClient},
    types::Envelope,
};
use tonic::{Code, Status, transport::Channel};

use super::in_namespace;
use crate::pod::{
    ports::{Delivery, EventSink, TaskEvent},
    spec::PodSpec,
};

/// How long containerd may take for one event.
const TIMEOUT: Duration = Duration::from_secs(10);

/// containerd's event service.
pub struct ContainerdEvents {
    channel: Channel,
}

impl ContainerdEvents {
    /// Uses a connection that is made when it is first needed, and again when it was lost.
    pub fn new(channel: Channel) -> Self {
        Self { channel }
    }

    async fn forward(&self, namespace: &str, event: TaskEvent) -> Result<(), Status> {
        let envelope = Envelope {
            timestamp: event.at.map(Into::into),
            namespace: namespace.to_owned(),
            topic: event.topic,
            event: Some(prost_types::Any { type_url: event.type_url, value: event.payload }),
        };
        let request = in_namespace(ForwardRequest { envelope: Some(envelope) }, namespace)?;
        EventsClient::new(self.channel.clone()).forward(request).await.map(drop)
    }
}

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

#[async_trait]
impl EventSink for ContainerdEvents {
    async fn deliver(&self, pod: &PodSpec, event: TaskEvent) -> Delivery {
        match tokio::time::timeout(TIMEOUT, self.forward(&pod.source_namespace, event)).await {
            Ok(Ok(())) => Delivery::Taken,
            Ok(Err(status)) if is_refusal(status.code()) => Delivery::Refused(status.to_string()),
            Ok(Err(status)) => Delivery::Deferred(format!("containerd takes no events now: {status}")),
            Err(_) => Delivery::Deferred("containerd does not take an event in time".to_owned()),
        }
    }
}
