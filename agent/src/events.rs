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

/// How many past events of containers are kept for a controller that reconnects: several hundred lives.
const KEPT_OF_CONTAINERS: usize = 2048;

/// How many past events of execs, and times, are kept. Apart from the others: a probe every second, or a client
/// that executes without pause, must not push out the news that a container has ended.
const KEPT_OTHERS: usize = 1024;

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
    of_containers: Kept<KEPT_OF_CONTAINERS>,
    others: Kept<KEPT_OTHERS>,
}

/// The last events of one kind, in order.
#[derive(Default)]
struct Kept<const LIMIT: usize>(VecDeque<Event>);

impl<const LIMIT: usize> Kept<LIMIT> {
    fn push(&mut self, event: Event) {
        if self.0.len() == LIMIT {
            self.0.pop_front();
        }
        self.0.push_back(event);
    }

    fn next_after(&self, after: u64) -> Option<&Event> {
        self.0.get(self.0.partition_point(|event| event.sequence <= after))
    }
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// A container's own life.
    Container,
    /// An exec in it.
    Exec,
}

impl Events {
    /// An empty log.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { log: Mutex::default(), newest: watch::channel(0).0, reader: watch::channel(0).0 })
    }

    /// Records one of containerd's task events.
    ///
    /// `topic` and the type of `payload` are containerd's (`api/events/task.proto`).
    pub fn publish<M: MessageFull>(&self, about: About, topic: &str, payload: &M) {
        let mut any = Any::new();
        any.type_url = format!("containerd.events.{}", M::NAME);
        // Encoding into memory cannot fail for messages of this size.
        any.value = payload.write_to_bytes().unwrap_or_default();
        let mut task = TaskEvent::new();
        topic.clone_into(&mut task.topic);
        task.payload = MessageField::some(any);
        self.record(about == About::Container, event::Event::Task(task));
    }

    /// Records how long the agent took for one phase of a container's start.
    pub fn timing(&self, container_id: &str, phase: Phase, duration: Duration) {
        let mut timing = ContainerTiming::new();
        container_id.clone_into(&mut timing.container_id);
        timing.phase = phase.into();
        timing.duration_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.record(false, event::Event::Timing(timing));
    }

    fn record(&self, of_container: bool, what: event::Event) {
        let mut log = self.log();
        log.newest += 1;
        let mut event = Event::new();
        event.sequence = log.newest;
        event.timestamp = MessageField::some(timestamp(SystemTime::now()));
        event.event = Some(what);
        if of_container {
            log.of_containers.push(event);
        } else {
            log.others.push(event);
        }
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
        let next = [log.of_containers.next_after(after), log.others.next_after(after)];
        next.into_iter().flatten().min_by_key(|event| event.sequence).cloned()
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

#[cfg(test)]
mod tests {
    use containerd_shim_protos::events::task::TaskExit;

    use super::*;

    fn told(events: &Events, mut after: u64) -> Vec<u64> {
        let mut sequences = Vec::new();
        while let Some(event) = events.next_after(after) {
            after = event.sequence;
            sequences.push(after);
        }
        sequences
    }

    #[test]
    fn events_of_both_kinds_are_told_in_the_order_in_which_they_happened() {
        let events = Events::new();
        for n in 0..9 {
            let about = if n % 3 == 0 { About::Container } else { About::Exec };
            events.publish(about, "/tasks/exit", &TaskExit::new());
        }
        assert_eq!(told(&events, 0), (1..=9).collect::<Vec<_>>());
        assert_eq!(told(&events, 4), (5..=9).collect::<Vec<_>>());
        assert!(told(&events, 9).is_empty() && told(&events, u64::MAX).is_empty());
    }

    #[test]
    fn a_flood_of_execs_does_not_push_out_the_end_of_a_container() {
        let events = Events::new();
        events.publish(About::Container, "/tasks/exit", &TaskExit::new());
        for _ in 0..100_000 {
            events.publish(About::Exec, "/tasks/exit", &TaskExit::new());
        }
        events.publish(About::Container, "/tasks/delete", &TaskExit::new());
        let told = told(&events, 0);
        assert_eq!((told[0], told.last()), (1, Some(&100_002)));
        assert_eq!(told.len(), KEPT_OTHERS + 2, "the memory for the rest is bounded");
        assert_eq!(told[1], 100_001 - KEPT_OTHERS as u64 + 1, "and the newest are kept");
    }
}
