//! What happened in the guest, kept in order for the controller.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pericarp_protos::{
    agent::{ContainerTiming, Event, EventsRequest, TaskEvent, container_timing::Phase, event},
    protobuf::{
        Message, MessageField, MessageFull,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    ttrpc::Code,
};
use tokio::sync::watch;

use crate::server::ServerStream;

/// How many past events are kept for a controller that reconnects.
const KEPT: usize = 1024;

/// The bounded, ordered log of events.
pub struct Events {
    log: Mutex<Log>,
    /// The newest sequence number.
    newest: watch::Sender<u64>,
    /// Number of the newest reader; older ones end.
    reader: watch::Sender<u64>,
}

#[derive(Default)]
struct Log {
    newest: u64,
    events: VecDeque<Event>,
}

impl Events {
    /// An empty log.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { log: Mutex::default(), newest: watch::channel(0).0, reader: watch::channel(0).0 })
    }

    /// Records one of containerd's task events.
    ///
    /// `topic` and the type of `payload` are containerd's (`api/events/task.proto`).
    pub fn publish<M: MessageFull>(&self, topic: &str, payload: &M) {
        let mut any = Any::new();
        any.type_url = format!("containerd.events.{}", M::NAME);
        // Encoding into memory cannot fail for messages of this size.
        any.value = payload.write_to_bytes().unwrap_or_default();
        let mut task = TaskEvent::new();
        topic.clone_into(&mut task.topic);
        task.payload = MessageField::some(any);
        self.record(event::Event::Task(task));
    }

    /// Records how long the agent took for one phase of a container's start.
    pub fn timing(&self, container_id: &str, phase: Phase, duration: Duration) {
        let mut timing = ContainerTiming::new();
        container_id.clone_into(&mut timing.container_id);
        timing.phase = phase.into();
        timing.duration_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.record(event::Event::Timing(timing));
    }

    fn record(&self, what: event::Event) {
        let mut log = self.log();
        log.newest += 1;
        let mut event = Event::new();
        event.sequence = log.newest;
        event.timestamp = MessageField::some(timestamp(SystemTime::now()));
        event.event = Some(what);
        if log.events.len() == KEPT {
            log.events.pop_front();
        }
        log.events.push_back(event);
        let newest = log.newest;
        drop(log);
        self.newest.send_replace(newest);
    }

    /// Serves one `Agent.Events` call.
    pub async fn stream(self: Arc<Self>, request: Vec<u8>, mut stream: ServerStream) {
        let request = match EventsRequest::parse_from_bytes(&request) {
            Ok(request) => request,
            Err(error) => {
                return stream.fail(Code::INVALID_ARGUMENT, &format!("not an EventsRequest: {error}")).await;
            }
        };
        self.reader.send_modify(|reader| *reader += 1);
        let mut reader = self.reader.subscribe();
        reader.mark_unchanged();
        let disconnected = stream.disconnected();
        tokio::select! {
            () = self.send_from(request.after_sequence, &stream) => {}
            _ = reader.changed() => {}
            () = disconnected => {}
        }
        stream.close().await;
    }

    async fn send_from(&self, mut after: u64, stream: &ServerStream) {
        let mut newest = self.newest.subscribe();
        loop {
            newest.mark_unchanged();
            while let Some(event) = self.next_after(after) {
                after = event.sequence;
                if stream.send(&event).await.is_err() {
                    return;
                }
            }
            if newest.changed().await.is_err() {
                return;
            }
        }
    }

    fn next_after(&self, after: u64) -> Option<Event> {
        let log = self.log();
        let oldest = log.events.front()?.sequence;
        let index = (after + 1).saturating_sub(oldest);
        log.events.get(usize::try_from(index).ok()?).cloned()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // The log is whole after each statement, so a panic elsewhere does not spoil it.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A point in time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut timestamp = Timestamp::new();
    timestamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    timestamp.nanos = since.subsec_nanos().cast_signed();
    timestamp
}
