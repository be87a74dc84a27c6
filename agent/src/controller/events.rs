//! The log of events in the guest, which the controller reads in order.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pericarp_protos::{
    agent::{ContainerTiming, Event, EventsRequest, TaskEvent, container_timing::Phase, event},
    protobuf::{Message, MessageField, MessageFull, well_known_types::timestamp::Timestamp},
    ttrpc::Code,
};
use tokio::sync::watch;

use crate::ttrpc::{ServerStream, pack};

/// How many events of containers are kept for a controller that reconnects: the lives of several hundred containers.
const CONTAINER_EVENTS_MAX: usize = 2048;

/// How many events of execs and timings are kept. They are kept apart from those of containers, so that frequent execs
/// do not displace the exit of a container.
const OTHER_EVENTS_MAX: usize = 1024;

/// The bounded log of events, in order.
pub struct EventLog {
    log: Mutex<Log>,
    /// The newest event's sequence number.
    newest: watch::Sender<u64>,
    /// The newest reader's number. Older readers end.
    newest_reader: watch::Sender<u64>,
}

#[derive(Default)]
struct Log {
    newest: u64,
    of_containers: BoundedLog<CONTAINER_EVENTS_MAX>,
    others: BoundedLog<OTHER_EVENTS_MAX>,
}

/// The last events of one kind, in order.
#[derive(Default)]
struct BoundedLog<const LIMIT: usize>(VecDeque<Event>);

impl<const LIMIT: usize> BoundedLog<LIMIT> {
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
pub enum EventSubject {
    /// A container.
    Container,
    /// An exec in a container, or how long something has taken.
    Exec,
}

impl EventLog {
    /// An empty log.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            log: Mutex::default(),
            newest: watch::channel(0).0,
            newest_reader: watch::channel(0).0,
        })
    }

    /// Records one of containerd's task events.
    ///
    /// `topic` and the type of `payload` are containerd's (`api/events/task.proto`).
    pub fn publish<M: MessageFull>(&self, subject: EventSubject, topic: &str, payload: &M) {
        let mut task = TaskEvent::new();
        topic.clone_into(&mut task.topic);
        task.payload = MessageField::some(pack(format!("containerd.events.{}", M::NAME), payload));
        self.record(subject, event::Event::Task(task));
    }

    /// Records how long one phase of a container's start has taken.
    pub fn record_timing(&self, container_id: &str, phase: Phase, duration: Duration) {
        let mut timing = ContainerTiming::new();
        container_id.clone_into(&mut timing.container_id);
        timing.phase = phase.into();
        timing.duration_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.record(EventSubject::Exec, event::Event::Timing(timing));
    }

    fn record(&self, subject: EventSubject, content: event::Event) {
        let mut log = self.log();
        log.newest += 1;
        let mut event = Event::new();
        event.sequence = log.newest;
        event.timestamp = MessageField::some(timestamp(SystemTime::now()));
        event.event = Some(content);
        match subject {
            EventSubject::Container => log.of_containers.push(event),
            EventSubject::Exec => log.others.push(event),
        }
        let newest = log.newest;
        drop(log);
        self.newest.send_replace(newest);
    }

    /// Serves one `Agent.Events` call, until a newer call comes or the connection is closed.
    pub async fn stream(self: Arc<Self>, request: Vec<u8>, mut stream: ServerStream) {
        let request = match EventsRequest::parse_from_bytes(&request) {
            Ok(request) => request,
            Err(error) => {
                return stream.fail(Code::INVALID_ARGUMENT, &format!("not an EventsRequest: {error}")).await;
            }
        };
        self.newest_reader.send_modify(|number| *number += 1);
        let mut newest_reader = self.newest_reader.subscribe();
        newest_reader.mark_unchanged();
        let disconnected = stream.disconnected();
        tokio::select! {
            () = self.send_from(request.after_sequence, &stream) => {}
            _ = newest_reader.changed() => {}
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
        // Each change is a single statement, so the log is consistent after a panic.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Converts a point in time to protobuf's type.
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

    fn sequences_after(events: &EventLog, mut after: u64) -> Vec<u64> {
        let mut sequences = Vec::new();
        while let Some(event) = events.next_after(after) {
            after = event.sequence;
            sequences.push(after);
        }
        sequences
    }

    #[test]
    fn events_of_both_kinds_are_told_in_the_order_in_which_they_happened() {
        let events = EventLog::new();
        for n in 0..9 {
            let subject = if n % 3 == 0 { EventSubject::Container } else { EventSubject::Exec };
            events.publish(subject, "/tasks/exit", &TaskExit::new());
        }
        assert_eq!(sequences_after(&events, 0), (1..=9).collect::<Vec<_>>());
        assert_eq!(sequences_after(&events, 4), (5..=9).collect::<Vec<_>>());
        assert!(sequences_after(&events, 9).is_empty() && sequences_after(&events, u64::MAX).is_empty());
    }

    #[test]
    fn a_flood_of_execs_does_not_push_out_the_end_of_a_container() {
        let events = EventLog::new();
        events.publish(EventSubject::Container, "/tasks/exit", &TaskExit::new());
        for _ in 0..100_000 {
            events.publish(EventSubject::Exec, "/tasks/exit", &TaskExit::new());
        }
        events.publish(EventSubject::Container, "/tasks/delete", &TaskExit::new());
        let sequences = sequences_after(&events, 0);
        assert_eq!((sequences[0], sequences.last()), (1, Some(&100_002)));
        assert_eq!(sequences.len(), OTHER_EVENTS_MAX + 2, "the memory for the rest is bounded");
        assert_eq!(sequences[1], 100_001 - OTHER_EVENTS_MAX as u64 + 1, "and the newest are kept");
    }
}
