//! containerd's event service, to which any client may subscribe.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use pericarp_protos::containerd::{
    events::{PublishRequest, SubscribeRequest, events_client::EventsClient},
    types::Envelope,
};
use prost::Message;
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::timeout,
};
use tonic::{Request, metadata::MetadataValue, transport::Channel};

use crate::{
    HANG_LIMIT,
    cri::{self, CONTAINERD_SOCKET},
};

/// An event of a container, without the fields that differ from run to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskEvent {
    /// For example `/tasks/exit`.
    pub topic: String,
    /// The container.
    pub container: String,
    /// The exec, or empty for an event of the container itself.
    pub exec: String,
}

/// A subscription to all tasks' events.
pub struct Events {
    received: Arc<Mutex<Vec<TaskEvent>>>,
    count: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Events {
    /// Subscribes. Every later event is recorded.
    pub async fn subscribe() -> Result<Self> {
        let channel = cri::connect(CONTAINERD_SOCKET).await?;
        let (mut client, publisher) = (EventsClient::new(channel.clone()), EventsClient::new(channel));
        let request = SubscribeRequest { filters: vec!["namespace==k8s.io".to_owned()] };
        let mut subscribing = std::pin::pin!(client.subscribe(request));
        // containerd responds only when there is a first event, so this publishes one.
        let mut stream = loop {
            tokio::select! {
                response = &mut subscribing => break response.context("subscribe to events")?.into_inner(),
                () = tokio::time::sleep(Duration::from_millis(100)) => publish_marker(publisher.clone()).await?,
            }
        };
        let received = Arc::new(Mutex::new(Vec::new()));
        let (counter, count) = watch::channel(0);
        let collected = Arc::clone(&received);
        let task = tokio::spawn(async move {
            while let Ok(Some(envelope)) = stream.message().await {
                if let Some(event) = TaskEvent::read(&envelope) {
                    let mut collected = collected.lock().await;
                    collected.push(event);
                    counter.send_replace(collected.len());
                }
            }
        });
        Ok(Self { received, count, task })
    }

    /// All events of one container so far, in order.
    pub async fn of(&self, container: &str) -> Vec<TaskEvent> {
        self.received.lock().await.iter().filter(|event| event.container == container).cloned().collect()
    }

    /// Waits for an event.
    pub async fn wait_for(&self, topic: &str, container: &str, exec: &str) -> Result<()> {
        let expected =
            TaskEvent { topic: topic.to_owned(), container: container.to_owned(), exec: exec.to_owned() };
        let mut count = self.count.clone();
        let found = async {
            while !self.received.lock().await.contains(&expected) {
                count.changed().await.context("the subscription has ended")?;
            }
            Ok(())
        };
        match timeout(HANG_LIMIT, found).await {
            Ok(found) => found,
            Err(_) => bail!("no {expected:?}; received {:?}", self.of(container).await),
        }
    }
}

async fn publish_marker(mut publisher: EventsClient<Channel>) -> Result<()> {
    let event = prost_types::Any { type_url: "pericarp.tests.Listening".to_owned(), value: Vec::new() };
    let mut request =
        Request::new(PublishRequest { topic: "/pericarp/tests".to_owned(), event: Some(event) });
    request.metadata_mut().insert("containerd-namespace", MetadataValue::from_static("k8s.io"));
    publisher.publish(request).await.context("publish an event")?;
    Ok(())
}

/// What tasks' events have in common: `container_id` is the first field of each, and what names an exec the second,
/// in `TaskExit` (`id`, which is the container's for its own exit), `TaskExecAdded` and `TaskExecStarted`.
#[derive(Clone, PartialEq, Message)]
struct Common {
    #[prost(string, tag = "1")]
    container: String,
}

#[derive(Clone, PartialEq, Message)]
struct WithExec {
    #[prost(string, tag = "2")]
    exec: String,
}

impl TaskEvent {
    fn read(envelope: &Envelope) -> Option<Self> {
        let payload = envelope.event.as_ref()?;
        let topic = envelope.topic.strip_prefix("/tasks/")?;
        let container = Common::decode(payload.value.as_slice()).ok()?.container;
        let mut exec = String::new();
        if matches!(topic, "exit" | "exec-added" | "exec-started") {
            exec = WithExec::decode(payload.value.as_slice()).ok()?.exec;
        }
        if exec == container {
            exec.clear();
        }
        Some(Self { topic: envelope.topic.clone(), container, exec })
    }
}
