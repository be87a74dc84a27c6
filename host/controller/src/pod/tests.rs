use std::{
    num::NonZeroU64,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use pericarp_protos::{host::HostClient, ttrpc};
use pericarp_vmm::{RateLimit, RateLimits};
use tokio::sync::watch;

use super::{
    in_memory::{MemoryContainers, MemoryEvents},
    owned::{Resource, tests::Fake},
    ports::ContainerRequest,
    *,
};
use crate::host::{
    machine::Machine,
    network::{PodNetwork, steer::SteerError},
    process::Process,
    rootfs::{ImageLayers, RootFs},
};

pub fn environment(run_dir: &Path) -> Arc<Environment> {
    environment_with(run_dir, Arc::default())
}

fn environment_with(run_dir: &Path, events: Arc<MemoryEvents>) -> Arc<Environment> {
    environment_of(run_dir, Arc::default(), events)
}

fn environment_of(
    run_dir: &Path,
    containers: Arc<MemoryContainers>,
    events: Arc<MemoryEvents>,
) -> Arc<Environment> {
    Arc::new(Environment {
        config: Config { run_dir: run_dir.into(), ..Config::default() },
        containers,
        events,
        capacity: HostCapacity { cpus: 2, memory_mib: 4096 },
        boots: BootQueue::new(1),
        machines_user_namespace: None,
        read_older_record: |_, _| None,
    })
}

fn spec() -> PodSpec {
    PodSpec {
        name: "web".into(),
        namespace: "default".into(),
        ..PodSpec::unknown("abc".parse().unwrap(), "k8s.io")
    }
}

/// A pod that is only known, and its task, which a test drives itself.
pub fn undriven(run_dir: &Path) -> (Arc<Pod>, PodTask) {
    let size = Size { vcpus: 1, memory_mib: 512 };
    Pod::new(Record::new(spec(), size), environment(run_dir))
}

fn pod(run_dir: &Path) -> Arc<Pod> {
    Pod::create(spec(), environment(run_dir)).unwrap()
}

/// Gives a pod one more thing to be removed when it is removed.
pub async fn own(pod: &Pod, remove: impl FnMut() -> std::io::Result<()> + Send + 'static) {
    pod.mailbox.send(Command::Own(Fake::resource(remove))).await.unwrap();
}

/// Gives a pod something that cannot be removed as long as this is so.
pub async fn cannot_remove(pod: &Pod, while_this: &Arc<AtomicBool>) {
    let fails = Arc::clone(while_this);
    own(pod, move || {
        if fails.load(Ordering::Relaxed) { Err(std::io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_asks_for_nested_virtualization_is_refused_where_it_is_not_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let nested = PodSpec { nested_virtualization: true, ..spec() };
    let error = Pod::create(nested, environment(directory.path())).err().unwrap();
    assert!(matches!(&error, PodError::NestedVirtualization { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("default/web") && text.contains("nested_virtualization = true"), "{text}");
}

#[tokio::test]
async fn a_pod_has_the_nodes_rate_limits_or_tighter_ones_and_is_refused_if_it_asks_for_more() {
    let directory = tempfile::tempdir().unwrap();
    let rate = |operations: u64| {
        let disk = RateLimit { operations_per_second: NonZeroU64::new(operations), ..RateLimit::default() };
        RateLimits { disk, ..RateLimits::default() }
    };
    let environment = |limits: RateLimits| {
        let config = Config { rate_limits: limits, run_dir: directory.path().into(), ..Config::default() };
        let others = environment(directory.path());
        let others = Arc::try_unwrap(others).unwrap_or_else(|_| panic!("nobody else has it yet"));
        Arc::new(Environment { config, ..others })
    };
    let create = |operations: u64| {
        Pod::create(PodSpec { rate_limits: rate(operations), ..spec() }, environment(rate(100)))
    };
    for (asked, effective) in [(0, 100), (50, 50), (100, 100)] {
        let pod = create(asked).unwrap();
        assert_eq!(pod.machine_config(Vec::new()).rate_limits, rate(effective));
        pod.remove().await.unwrap();
    }
    let error = create(101).err().unwrap();
    let text = crate::telemetry::error_chain::chain(&error);
    let annotation = "io.pericarp.rate-limit.disk.operations-per-second is 101";
    assert!(text.contains("default/web") && text.contains(annotation) && text.contains("100"), "{text}");
}

#[tokio::test]
async fn a_pod_whose_netns_is_gone_does_not_start_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let netns = "/run/netns/no-such-netns";
    let spec = PodSpec { netns: Some(netns.into()), ..spec() };
    let pod = Pod::create(spec, environment(directory.path())).unwrap();
    let error = pod.start().await.unwrap_err();
    let text = crate::telemetry::error_chain::chain(&error);
    assert!(text.contains("default/web") && text.contains(netns) && text.contains("CNI"), "{text}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    assert!(pod.is_removed());
    pod.stop().await.unwrap();
    pod.remove().await.unwrap();
}

#[tokio::test]
async fn a_pod_to_which_nothing_can_be_forwarded_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    assert!(start::take_forward(&pod, &mut PodNetwork::default()).is_none());
    let source = std::io::Error::from_raw_os_error(38);
    let error = SteerError::Bpf { what: "load a BPF program", source };
    let mut network = PodNetwork { forward: Some(Err(error)), ..PodNetwork::default() };
    let reason = start::take_forward(&pod, &mut network).unwrap().err().unwrap();
    assert!(
        reason.contains("refuses to load a BPF program") && reason.contains("not implemented"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_guest_cannot_prepare_what_is_no_container_of_its_pod() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    for id in ["unknown", "../abc", ""] {
        let prepared =
            async { pod.prepare_container(&containers::container_id(id)?, AgentFeatures::default()).await };
        let error = pod.error_for_guest(&prepared.await.unwrap_err());
        assert_eq!(error.code, ttrpc::Code::NOT_FOUND, "{id}");
        let message = &error.message;
        assert!(message.contains("default/web") && message.contains("in this pod"), "{message}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_container_for_which_something_unknown_was_asked_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    let error = pod.prepare_container(&"odd".parse().unwrap(), AgentFeatures::default()).await.unwrap_err();
    let error = pod.error_for_guest(&error);
    assert_eq!(error.code, ttrpc::Code::INVALID_ARGUMENT, "{}", error.message);
    assert!(error.message.contains("default/web") && error.message.contains("hologram"), "{}", error.message);
}

#[tokio::test]
async fn what_was_never_prepared_can_be_released() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    pod.release_container(&"gone".parse().unwrap()).await.unwrap();
    assert!(containers::container_id("../../etc").is_err());
}

#[tokio::test]
async fn a_pod_that_was_never_started_can_be_stopped_and_removed_twice() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    pod.stop().await.unwrap();
    pod.stop().await.unwrap();
    assert_eq!(pod.wait().await.exit, Exit::Code(0));
    assert!(matches!(pod.start().await, Err(PodError::Phase { phase: Phase::Ended, .. })));
    pod.remove().await.unwrap();
    pod.remove().await.unwrap();
    pod.stop().await.unwrap();
    assert!(matches!(pod.start().await, Err(PodError::Removed { .. })));
}

/// What blocks has much to do with what others supply. A mistake in it must not cost the node its controller, nor the
/// pod its end.
#[tokio::test(start_paused = true)]
async fn a_pod_whose_task_panics_is_removed_nonetheless() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    let mut panics = 1;
    own(&pod, move || {
        panics -= 1;
        assert!(panics < 0, "a mistake");
        Ok(())
    })
    .await;
    assert!(matches!(pod.remove().await, Err(PodError::Failed { .. })));
    assert!(!pod.is_removed());
    // Nobody asks for it again.
    pod.removed().await;
}

/// A request is carried through to the same state whether or not its caller waits for it to the end.
#[tokio::test]
async fn a_caller_that_goes_away_changes_nothing() {
    for patience in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let pod = pod(directory.path());
        let removed = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&removed);
        own(&pod, move || {
            seen.store(true, Ordering::SeqCst);
            Ok(())
        })
        .await;
        let mut removing = Box::pin(pod.remove());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut is_done = false;
        for _ in 0..patience {
            is_done = is_done || removing.as_mut().poll(&mut context).is_ready();
            tokio::task::yield_now().await;
        }
        drop(removing);
        if patience > 0 {
            pod.removed().await;
            assert!(removed.load(Ordering::SeqCst));
        } else {
            assert!(!pod.is_stop_requested(), "who has not asked has not asked");
        }
    }
}

/// A guest with five events, of which it tells whoever asks those that are asked for. The answer counts the requests.
fn guest_with_five_events(vsock: &Path) -> watch::Receiver<Vec<u64>> {
    use pericarp_protos::{
        agent::{self, Event, EventsRequest, event},
        protobuf::{Message as _, well_known_types::any::Any},
        ttrpc::proto::{Codec as _, GenMessage, MessageHeader, Request},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::UnixListener::bind(vsock).unwrap();
    let (sender, asked) = watch::channel(Vec::new());
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            stream.write_all(b"OK 7\n").await.unwrap();
            let message = GenMessage::read_from(&mut stream).await.unwrap();
            let request = Request::decode(&message.payload).unwrap();
            let after = EventsRequest::parse_from_bytes(&request.payload).unwrap().after_sequence;
            sender.send_modify(|asked| asked.push(after));
            for sequence in after + 1..=5 {
                let topic = if sequence == 5 { "delete" } else { "paused" };
                // Field 1 of every task event: the container, which is `c1`, except for one that tries its luck.
                let container = if sequence == 2 { "c2" } else { "c1" };
                let value = [&[0x0a, 2], container.as_bytes()].concat();
                let name = if sequence == 5 { "TaskDelete" } else { "TaskPaused" };
                let payload = Any { type_url: format!("containerd.events.{name}"), value, ..Any::default() };
                let topic = format!("/tasks/{topic}");
                let task =
                    agent::TaskEvent { topic, payload: Some(payload).into(), ..agent::TaskEvent::default() };
                let event = Event { sequence, event: Some(event::Event::Task(task)), ..Event::default() };
                let payload = event.write_to_bytes().unwrap();
                let header = MessageHeader::new_data(1, payload.len().try_into().unwrap());
                GenMessage { header, payload }.write_to(&mut stream).await.unwrap();
            }
        }
    });
    asked
}

#[tokio::test]
async fn containers_are_taken_for_deleted_only_if_their_pod_is_known_and_they_are_not() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("abc")).unwrap();
    let containers = Arc::new(MemoryContainers::default());
    let environment = environment_of(directory.path(), Arc::clone(&containers), Arc::default());
    let pod = Pod::create(spec(), environment).unwrap();
    let layers = ImageLayers { images: Vec::new(), writable: None, map_ids: false };
    let rootfs = RootFs::Images { layers, mounted: None };
    let request = ContainerRequest { spec: Vec::new(), given_devices: None, rootfs };
    containers.containers.lock().unwrap().insert("there".to_owned(), request);
    for id in ["there", "deleted"] {
        pod.note_progress(|progress| progress.add(id));
    }
    // One that was put together from what was seen may be another's.
    assert_eq!(pod.deleted_containers().await.unwrap(), []);
    containers.known_pods.lock().unwrap().insert("abc".to_owned());
    assert_eq!(pod.deleted_containers().await.unwrap(), ["deleted".parse().unwrap()]);
    // Who does not answer has not said that there is none.
    pod.note_progress(|progress| progress.add("unavailable"));
    pod.deleted_containers().await.unwrap_err();
}

#[tokio::test]
async fn events_wait_for_whoever_takes_them_and_go_on_where_they_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let of_pod = directory.path().join("abc");
    std::fs::create_dir(&of_pod).unwrap();
    let events = Arc::new(MemoryEvents::default());
    events.is_closed.store(true, Ordering::SeqCst);
    let new = || Pod::create(spec(), environment_with(directory.path(), Arc::clone(&events))).unwrap();
    let pod = new();
    let mut asked = guest_with_five_events(&pod.files.vsock());
    pod.note_progress(|progress| progress.add("c1"));
    pod.follow_events();
    // It asks again, and for the same, as long as nobody takes them.
    asked.wait_for(|asked| asked.len() >= 2).await.unwrap();
    assert!(asked.borrow().iter().all(|after| *after == 0), "{:?}", *asked.borrow());

    events.is_closed.store(false, Ordering::SeqCst);
    let expected = ["/tasks/paused", "/tasks/paused", "/tasks/paused", "/tasks/delete"];
    events.taken.subscribe().wait_for(|taken| taken.len() == expected.len()).await.unwrap();
    assert_eq!(*events.taken.borrow(), expected);

    // The next controller has nothing left to hand on: not even after it has asked again.
    while progress::Progress::read(&of_pod).unwrap().last_event < 5 {
        tokio::task::yield_now().await;
    }
    let next = new();
    next.progress.resume(progress::Progress::read(&of_pod).unwrap());
    assert!(!next.progress.knows("c1"), "its end has been told");
    next.follow_events();
    asked.wait_for(|asked| asked.last() == Some(&5)).await.unwrap();
    assert_eq!(*events.taken.borrow(), expected);
}

/// A guest that takes the controller's connection for requests, as its agent would.
async fn accept_controller(listener: &tokio::net::UnixListener) -> HostClient {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut line = [0; 13];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"CONNECT 1027\n");
    stream.write_all(b"OK 7\n").await.unwrap();
    let socket = ttrpc::asynchronous::transport::Socket::new(stream);
    HostClient::new(ttrpc::asynchronous::Client::new(socket))
}

/// What a guest gets that has been taken over: its requests come on the agent's own connection.
#[tokio::test]
async fn a_hostile_guest_cannot_have_a_container_of_another_pod_and_is_dialled_again() {
    use pericarp_protos::host::{FitResourcesRequest, PrepareContainerRequest, ReleaseContainerRequest};
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("abc")).unwrap();
    let pod = pod(directory.path());
    let listener = tokio::net::UnixListener::bind(pod.files.vsock()).unwrap();
    pod.serve_requests();
    let context = || ttrpc::context::with_timeout(0);
    for _ in 0..2 {
        let host = accept_controller(&listener).await;
        for id in ["known", "no-such-container", "../../etc", "", &"x".repeat(3000)] {
            let request = PrepareContainerRequest { container_id: id.to_owned(), ..Default::default() };
            match host.prepare_container(context(), &request).await {
                Err(ttrpc::Error::RpcStatus(status)) => {
                    assert_eq!(status.code(), ttrpc::Code::NOT_FOUND, "{id:?}: {status:?}");
                    let message = status.message();
                    assert!(message.contains("default/web") && message.contains("in this pod"), "{message}");
                    assert!(message.len() < 500, "a guest's {} bytes come back", id.len());
                }
                answer => panic!("{id:?} is answered with {answer:?}"),
            }
        }
        let request = FitResourcesRequest { container_id: "known".into(), ..Default::default() };
        match host.fit_resources(context(), &request).await {
            Err(ttrpc::Error::RpcStatus(status)) => assert_eq!(status.code(), ttrpc::Code::NOT_FOUND),
            answer => panic!("{answer:?}"),
        }
        // Nothing of it is this pod's, so nothing happens.
        let request = ReleaseContainerRequest { container_id: "known".into(), ..Default::default() };
        host.release_container(context(), &request).await.unwrap();
        // What is larger than any request ends the connection, and there is another.
        let request = PrepareContainerRequest { container_id: "x".repeat(5000), ..Default::default() };
        host.prepare_container(context(), &request).await.unwrap_err();
    }
    accept_controller(&listener).await;
}

/// What its guest has asked for may take its time, also for ever; that is no reason for a machine to live on.
#[tokio::test]
async fn a_machine_is_ended_before_anything_that_its_pod_is_busy_with() {
    let directory = tempfile::tempdir().unwrap();
    let (pod, mut task) = undriven(directory.path());
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let (pid, pidfd) = Process::of(process.id()).unwrap().open().unwrap().unwrap();
    task.is_machine_watched = true;
    pod.watch_machine(Machine::adopt(pid, pidfd).unwrap());
    let (go_on, hang) = std::sync::mpsc::channel::<()>();
    task.owned.add(Fake::resource(move || hang.recv().map_err(std::io::Error::other)));
    task.spawn(Life::running_with(life::Running::taken_over(process.id(), spec().resources)));
    let stopping = tokio::spawn({
        let pod = Arc::clone(&pod);
        async move { pod.stop().await }
    });
    let ended = tokio::time::timeout(Duration::from_secs(60), pod.wait()).await;
    ended.expect("its machine is ended although something else hangs");
    assert!(!stopping.is_finished());
    go_on.send(()).unwrap();
    stopping.await.unwrap().unwrap();
    // Its exit status was taken by whoever watched it.
    let _ = process.wait();
}

/// A pod's machine ends by itself: what else there is of the pod is removed, its directory is kept, and its end is
/// known.
#[tokio::test]
async fn what_runs_of_a_pod_is_removed_when_its_machine_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (pod, mut task) = undriven(directory.path());
    std::fs::create_dir(pod.directory()).unwrap();
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let (pid, pidfd) = Process::of(process.id()).unwrap().open().unwrap().unwrap();
    let (removed, mut removing) = tokio::sync::mpsc::unbounded_channel();
    task.owned.add(Resource::Directory { path: pod.directory().to_owned() });
    task.owned.add(Fake::resource(move || {
        removed.send(()).unwrap();
        Ok(())
    }));
    task.is_machine_watched = true;
    pod.watch_machine(Machine::adopt(pid, pidfd).unwrap());
    task.spawn(Life::running_with(life::Running::taken_over(process.id(), spec().resources)));
    process.kill().unwrap();
    assert_eq!(pod.wait().await.exit, Exit::Signal(9));
    removing.recv().await.unwrap();
    assert!(pod.status().reason.unwrap().contains("ended unexpectedly"));
    assert_eq!(record::end_on_record(pod.directory()).unwrap().exit, Exit::Signal(9));
    pod.remove().await.unwrap();
    assert!(!pod.directory().exists());
    // Its exit status was taken by whoever watched it.
    let _ = process.wait();
}

/// Whoever takes events may handle those of the whole node one after the other.
#[tokio::test(start_paused = true)]
async fn a_guest_that_tells_of_very_much_is_heard_slowly() {
    use pericarp_protos::{
        agent::Event,
        protobuf::Message as _,
        ttrpc::proto::{GenMessage, MessageHeader},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const EVENTS: u64 = 1500;
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("abc")).unwrap();
    let pod = pod(directory.path());
    let listener = tokio::net::UnixListener::bind(pod.files.vsock()).unwrap();
    pod.follow_events();
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.read_exact(&mut [0; 13]).await.unwrap();
    stream.write_all(b"OK 7\n").await.unwrap();
    GenMessage::read_from(&mut stream).await.unwrap();
    let start = tokio::time::Instant::now();
    for sequence in 1..=EVENTS {
        let payload = Event { sequence, ..Event::default() }.write_to_bytes().unwrap();
        let header = MessageHeader::new_data(1, u32::try_from(payload.len()).unwrap());
        GenMessage { header, payload }.write_to(&mut stream).await.unwrap();
    }
    while pod.progress.last_event() < EVENTS {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(start.elapsed() >= Duration::from_secs(4), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_a_guest_causes_is_written_no_more_often_than_the_limit_says() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    let mut written = 0;
    for _ in 0..1000 {
        pod.caused_by_guest(|| written += 1);
    }
    assert!((1..100).contains(&written), "{written}");
}
