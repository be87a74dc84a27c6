//! The guest's events: those of tasks are handed on, timings are noted.

use std::{
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use pericarp_protos::{
    agent::{self, ContainerTiming, Event, container_timing, event},
    id::ContainerId,
    protobuf::well_known_types::timestamp::Timestamp,
};
use prost::Message as _;

use super::{
    Pod,
    ports::{Delivery, TaskEvent},
    progress::Progress,
    task::Command,
};
use crate::{
    fault::FaultPoint,
    guest::event_stream::EventStream,
    telemetry::{
        error_chain::chain,
        rate::Rate,
        timeline::{ContainerTimeline, milliseconds},
    },
};

/// Characters of a topic that are logged.
const TOPIC_MAX: usize = 64;
/// How long after a failure it is tried again. Neither containerd's socket nor the guest's tells when it is worth it.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Events of a pod at once, and then one in each interval. containerd handles those of the whole node one after the
/// other, writes a line of its log and a file for many of them, and keeps what it has not handled in a queue without an
/// end.
const BURST: u32 = 1000;
const EACH: Duration = Duration::from_millis(10);

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
fn container_of(task: &agent::TaskEvent) -> Option<ContainerId> {
    let payload = task.payload.as_ref()?;
    let expected = TASK_EVENTS.iter().find(|(topic, _)| *topic == task.topic)?.1;
    let named = payload.type_url.rsplit('/').next();
    let decoded = OfContainer::decode(payload.value.as_slice()).ok()?;
    if named == Some(expected) { decoded.container_id.try_into().ok() } else { None }
}

/// A guest's word for a time; `None` for what is before 1970 or cannot be counted.
fn time(timestamp: &Timestamp) -> Option<SystemTime> {
    let seconds = u64::try_from(timestamp.seconds).ok()?;
    let nanoseconds =
        u32::try_from(timestamp.nanos).ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds))
}

fn task_event(event: &Event, task: &agent::TaskEvent) -> TaskEvent {
    let payload = task.payload.as_ref();
    TaskEvent {
        topic: task.topic.clone(),
        at: event.timestamp.as_ref().and_then(time),
        type_url: payload.map(|any| any.type_url.clone()).unwrap_or_default(),
        payload: payload.map(|any| any.value.clone()).unwrap_or_default(),
    }
}

/// Whether events are handed on now.
#[derive(Debug)]
struct Interruption {
    /// Whether it was reported already: what repeats is reported once.
    is_reported: bool,
    /// What has not been taken waits in the guest, not here. A guest that advances only to fail waits, too.
    pause: Duration,
}

impl Default for Interruption {
    fn default() -> Self {
        Self { is_reported: false, pause: PAUSE_MIN }
    }
}

/// What is to be written about an interruption.
#[derive(Debug, PartialEq, Eq)]
enum Report {
    Begun(String),
    Over,
}

impl Interruption {
    /// What follows when no more events are taken for now: what is reported, and how long to wait.
    fn after(&mut self, has_advanced: bool, taken: Result<(), String>) -> (Option<Report>, Duration) {
        self.pause = if has_advanced && taken.is_ok() { PAUSE_MIN } else { PAUSE_MAX.min(2 * self.pause) };
        let report = match taken {
            // After an event that was handed on it is another interruption.
            Err(reason) if !self.is_reported || has_advanced => {
                self.is_reported = true;
                Some(Report::Begun(reason))
            }
            Ok(()) if self.is_reported && has_advanced => {
                self.is_reported = false;
                Some(Report::Over)
            }
            _ => None,
        };
        (report, self.pause)
    }
}

impl Pod {
    /// Takes the guest's events for as long as it lives, from where the last controller stopped.
    pub(super) fn follow_events(self: &Arc<Self>) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let rate = Rate::new(BURST, EACH);
            let mut interruption = Interruption::default();
            while pod.end().is_none() {
                let before = pod.progress.last_event();
                let taken = tokio::select! {
                    taken = pod.take_events(&rate) => taken,
                    // What its machine's socket still holds is told by nobody who lives.
                    _ended = pod.wait() => return,
                };
                let has_advanced = pod.progress.last_event() > before;
                let (report, pause) = interruption.after(has_advanced, taken);
                match report {
                    Some(Report::Over) => pod.caused_by_guest(|| {
                        tracing::info!(pod = pod.id(), "the guest's events are handed on again");
                    }),
                    Some(Report::Begun(reason)) if !pod.is_ending() => pod.caused_by_guest(|| {
                        tracing::warn!(pod = pod.id(), reason, "the guest's events wait");
                    }),
                    _ => {}
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ended = pod.wait() => {}
                }
            }
        });
    }

    /// Takes events until there are no more on this connection, or one cannot be handed on now.
    async fn take_events(&self, rate: &Rate) -> Result<(), String> {
        let lost = |error: io::Error| error.to_string();
        let after = self.progress.last_event();
        let mut events = EventStream::open(&self.files.vsock(), after).await.map_err(lost)?;
        while let Some(event) = events.next().await.map_err(lost)? {
            rate.wait().await;
            self.take_event(&event).await?;
        }
        Ok(())
    }

    /// Hands an event on. The error says why that cannot be done now.
    async fn take_event(&self, event: &Event) -> Result<(), String> {
        let last = self.progress.last_event();
        if event.sequence <= last {
            // Only an agent that is broken or hostile says something twice. It waits before it is heard again.
            return Err(format!("it tells of event {} again", event.sequence));
        }
        if event.sequence > last + 1 {
            let missing = event.sequence - last - 1;
            self.caused_by_guest(|| {
                tracing::warn!(pod = self.id(), missing, "the guest has had to drop events");
            });
        }
        let mut deleted = None;
        match &event.event {
            Some(event::Event::Task(task)) => deleted = self.take_task_event(event, task).await?,
            Some(event::Event::Timing(timing)) => self.take_timing(timing).await,
            _ => {}
        }
        self.note_progress(|progress| {
            progress.last_event = event.sequence;
            if let Some(container) = &deleted {
                progress.forget(container.as_str());
            }
        });
        if let Some(container) = deleted {
            self.release_after_deletion(&container).await;
        }
        Ok(())
    }

    /// Hands a task's event on; returns the container if it tells that it was deleted.
    async fn take_task_event(
        &self,
        event: &Event,
        task: &agent::TaskEvent,
    ) -> Result<Option<ContainerId>, String> {
        let container = container_of(task).filter(|container| self.progress.knows(container.as_str()));
        let Some(container) = container else {
            let topic: String = task.topic.chars().take(TOPIC_MAX).collect();
            self.caused_by_guest(|| {
                tracing::warn!(pod = self.id(), topic, "guest tells of what is not its own; dropped");
            });
            return Ok(None);
        };
        match self.environment.events.deliver(&self.spec, task_event(event, task)).await {
            Delivery::Taken => {}
            Delivery::Refused(reason) => self.caused_by_guest(|| {
                tracing::warn!(pod = self.id(), topic = task.topic, reason, "an event is not taken");
            }),
            Delivery::Deferred(reason) => return Err(reason),
        }
        FaultPoint::EventHandedOn.reached();
        Ok((task.topic == "/tasks/delete").then_some(container))
    }

    /// The agent has asked for this before, but maybe while there was no controller.
    async fn release_after_deletion(&self, container: &ContainerId) {
        if let Err(error) = self.release_container(container).await {
            self.caused_by_guest(|| {
                let error = chain(&error);
                tracing::warn!(pod = self.id(), %container, error, "cannot release a deleted container");
            });
        }
    }

    /// Changes what is on record about the pod's events.
    pub(super) fn note_progress(&self, change: impl FnOnce(&mut Progress)) {
        if self.is_removed() {
            // Another pod may have the directory by now.
            return;
        }
        if let Err(error) = self.progress.change(change) {
            self.caused_by_guest(|| {
                let pod = self.id();
                tracing::warn!(pod, %error, "events may be told twice after a restart of the controller");
            });
        }
    }

    async fn take_timing(&self, timing: &ContainerTiming) {
        let Ok(id) = timing.container_id.parse() else { return };
        let duration = Some(milliseconds(timing.duration_ns));
        let timing = match timing.phase.enum_value_or_default() {
            container_timing::Phase::PHASE_CREATE => {
                ContainerTimeline { create: duration, ..ContainerTimeline::default() }
            }
            container_timing::Phase::PHASE_START => {
                ContainerTimeline { start: duration, ..ContainerTimeline::default() }
            }
            container_timing::Phase::PHASE_UNSPECIFIED => return,
        };
        // A pod that has been removed has no use for it.
        let _ = self.mailbox.send(Command::ContainerTiming { id, timing }).await;
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

    /// A guest that tells the same event again and again, or breaks its connection after each, must not fill the node's
    /// log.
    #[test]
    fn what_a_guest_repeats_is_reported_once_and_what_it_does_anew_seldom() {
        let mut interruption = Interruption::default();
        let mut after = |has_advanced, taken: Result<(), &str>| {
            interruption.after(has_advanced, taken.map_err(str::to_owned))
        };
        assert_eq!(after(true, Ok(())), (None, PAUSE_MIN));
        assert_eq!(after(true, Err("a")), (Some(Report::Begun("a".to_owned())), 2 * PAUSE_MIN));
        for _ in 0..10 {
            assert_eq!(after(false, Err("b")).0, None);
            assert_eq!(after(false, Ok(())).0, None);
        }
        for _ in 0..10 {
            assert_eq!(after(true, Err("c")), (Some(Report::Begun("c".to_owned())), PAUSE_MAX));
        }
        assert_eq!(after(true, Ok(())), (Some(Report::Over), PAUSE_MIN));
        assert_eq!(after(true, Ok(())), (None, PAUSE_MIN));
    }

    #[test]
    fn a_guests_time_is_a_time_or_nothing() {
        let at = |seconds, nanos| time(&Timestamp { seconds, nanos, ..Timestamp::default() });
        assert_eq!(at(1, 500_000_000), Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1500)));
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000), (i64::MIN, i32::MAX)] {
            assert_eq!(at(seconds, nanos), None);
        }
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
