use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use pericarp_protos::ttrpc;
use tonic::transport::Endpoint;

use super::*;
use crate::{
    network::{PodNetwork, steer::SteerError},
    source::{ContainerRecord, SourceError},
};

/// Knows two containers: `known`, of the pod `other`, and `odd`, of the pod `abc`, for which CRI was asked for something
/// that it does not know.
struct OneContainer;

#[async_trait]
impl ContainerSource for OneContainer {
    async fn container(
        &self,
        _namespace: &str,
        _sandbox: &str,
        id: &str,
    ) -> Result<ContainerRecord, SourceError> {
        let of = [("known", "other"), ("odd", "abc")].into_iter().find(|(container, _)| *container == id);
        if let Some((_, pod)) = of {
            Ok(ContainerRecord {
                sandbox: pod.into(),
                spec: Vec::new(),
                asked_for: Some(br#"{"Metadata":{"Config":{"hologram":true}}}"#.into()),
                snapshotter: "overlayfs".into(),
                rootfs: Vec::new(),
            })
        } else {
            Err(SourceError::NotFound { id: id.into() })
        }
    }

    async fn sandbox(&self, _namespace: &str, id: &str) -> Result<(), SourceError> {
        Err(SourceError::NotFound { id: id.into() })
    }
}

pub(crate) fn node(run_dir: &std::path::Path) -> Arc<Node> {
    node_with_containerd(run_dir, "/no/such/socket")
}

fn node_with_containerd(run_dir: &std::path::Path, socket: &str) -> Arc<Node> {
    let channel = Endpoint::from_shared(format!("unix://{socket}")).unwrap().connect_lazy();
    Arc::new(Node {
        config: Config { run_dir: run_dir.into(), ..Config::default() },
        source: Arc::new(OneContainer),
        forwarder: Forwarder::new(channel),
        host: Host { cpus: 2, memory_mib: 4096 },
    })
}

fn config(network: cri::NamespaceMode) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: "web".into(),
            namespace: "default".into(),
            ..Default::default()
        }),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: network as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(super) fn pod(run_dir: &std::path::Path) -> Arc<Pod> {
    let config = config(cri::NamespaceMode::Pod);
    Arc::new(Pod::new("abc".parse().unwrap(), "k8s.io".into(), config, String::new(), node(run_dir)).unwrap())
}

impl Pod {
    /// Gives it one more thing to be undone when it is removed.
    pub(crate) fn push_undo(
        &self,
        what: &'static str,
        step: impl FnMut() -> std::io::Result<()> + Send + 'static,
    ) {
        self.state().directory.push(what, step);
    }
}

/// Gives a pod something that cannot be undone as long as this is so.
pub(crate) fn cannot_undo(pod: &Pod, while_this: &Arc<AtomicBool>) {
    let fails = while_this.clone();
    pod.push_undo("remove what is busy", move || {
        if fails.load(Ordering::Relaxed) { Err(std::io::ErrorKind::ResourceBusy.into()) } else { Ok(()) }
    });
}

#[tokio::test]
async fn a_pod_on_the_hosts_network_is_refused_with_its_name_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(cri::NamespaceMode::Node);
    let error =
        Pod::new("abc".parse().unwrap(), "k8s.io".into(), config, String::new(), node(directory.path()))
            .err()
            .unwrap();
    let text = error.to_string();
    assert!(text.contains("default/web") && text.contains("remove hostNetwork"), "{text}");
}

#[tokio::test]
async fn a_pod_that_asks_for_nested_virtualization_is_refused_where_it_is_not_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = config(cri::NamespaceMode::Pod);
    config.annotations.insert("io.pericarp.nested-virtualization".to_owned(), "true".to_owned());
    let error =
        Pod::new("abc".parse().unwrap(), "k8s.io".into(), config, String::new(), node(directory.path()))
            .err()
            .unwrap();
    assert!(matches!(&error, PodError::Nested { source: crate::nested::Error::NotAllowed, .. }), "{error:?}");
}

#[tokio::test]
async fn a_pod_whose_netns_is_gone_does_not_start_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(cri::NamespaceMode::Pod);
    let netns = "/run/netns/no-such-netns".to_owned();
    let pod =
        Pod::new("abc".parse().unwrap(), "k8s.io".into(), config, netns.clone(), node(directory.path()))
            .unwrap();
    let pod = Arc::new(pod);
    let error = pod.start().await.unwrap_err();
    let text = crate::errors::chain(&error);
    assert!(text.contains("default/web") && text.contains(&netns) && text.contains("CNI"), "{text}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    pod.stop().await.unwrap();
    pod.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_pod_to_which_nothing_can_be_forwarded_says_why_in_its_status() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    assert_eq!(pod.verbose_info().await["pericarp"]["portForward"], json!(null));
    let source = std::io::Error::from_raw_os_error(38);
    let error = SteerError::Bpf { what: "load a BPF program", source };
    let mut network = PodNetwork { forward: Some(Err(error)), ..PodNetwork::default() };
    assert!(pod.take_forward(&mut network).is_none());
    std::fs::create_dir(directory.path().join("abc")).unwrap();
    pod.write_record(std::process::id(), record::Stage::Running).unwrap();
    let record = std::fs::read_to_string(directory.path().join("abc").join(file::STATE)).unwrap();
    assert!(record.contains("refuses to load a BPF program"), "{record}");
    let info = pod.verbose_info().await;
    let text = info["pericarp"]["portForward"].as_str().unwrap();
    assert!(text.contains("refuses to load a BPF program") && text.contains("not implemented"), "{text}");
}

#[tokio::test]
async fn a_guest_cannot_prepare_another_pods_container() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    for id in ["known", "unknown", "../abc", ""] {
        let prepared = async { pod.prepare_container(&Pod::container_id(id)?).await };
        let (code, message) = prepared.await.unwrap_err().into_status(&pod);
        assert_eq!(code, ttrpc::Code::NOT_FOUND, "{id}");
        assert!(message.contains("default/web") && message.contains("in this pod"), "{message}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_container_for_which_something_unknown_was_asked_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    let (code, message) = pod.prepare_container(&"odd".parse().unwrap()).await.unwrap_err().into_status(&pod);
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("default/web") && message.contains("hologram"), "{message}");
}

#[tokio::test]
async fn a_pod_for_which_something_unknown_was_asked_is_refused_with_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let made = |message: &[u8]| {
        Pod::from_message(
            "abc".parse().unwrap(),
            "k8s.io".into(),
            message,
            String::new(),
            node(directory.path()),
        )
    };
    let known = config(cri::NamespaceMode::Pod).encode_to_vec();
    assert!(made(&known).is_ok());
    // Field 1000, a number.
    let error = made(&[&known[..], &[0xc0, 0x3e, 1]].concat()).err().unwrap();
    let text = error.to_string();
    assert!(text.contains("default/web") && text.contains("number 1000"), "{text}");
    assert!(matches!(made(&[0xff]), Err(PodError::Unreadable { .. })));
}

#[tokio::test]
async fn releasing_what_was_never_prepared_is_no_error_but_a_path_is() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    assert!(pod.release_container(&"gone".parse().unwrap()).await.is_ok());
    assert!(Pod::container_id("../../etc").is_err());
}

#[tokio::test]
async fn a_pod_that_was_never_started_can_be_stopped_and_removed_twice() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    for _ in 0..2 {
        pod.stop().await.unwrap();
        pod.shutdown().await.unwrap();
    }
    assert_eq!(pod.wait().await.exit, Exit::Code(0));
    assert!(matches!(pod.start().await, Err(PodError::Phase { .. })));
}

/// A guest with five events, of which it tells whoever asks those that are asked for. The answer counts the requests.
fn guest_with_five_events(directory: &std::path::Path) -> tokio::sync::watch::Receiver<Vec<u64>> {
    use pericarp_protos::{
        agent::{Event, EventsRequest, TaskEvent, event},
        protobuf::{Message as _, well_known_types::any::Any},
        ttrpc::proto::{Codec as _, GenMessage, MessageHeader, Request},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::UnixListener::bind(directory.join(file::VSOCK)).unwrap();
    let (sender, asked) = tokio::sync::watch::channel(Vec::new());
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
                // Field 1 of every task event: the container, which is `c1`, but for one that tries its luck.
                let container = if sequence == 2 { "c2" } else { "c1" };
                let value = [&[0x0a, 2], container.as_bytes()].concat();
                let name = if sequence == 5 { "TaskDelete" } else { "TaskPaused" };
                let payload = Any { type_url: format!("containerd.events.{name}"), value, ..Any::default() };
                let topic = format!("/tasks/{topic}");
                let task = TaskEvent { topic, payload: Some(payload).into(), ..TaskEvent::default() };
                let event = Event { sequence, event: Some(event::Event::Task(task)), ..Event::default() };
                let payload = event.write_to_bytes().unwrap();
                let header = MessageHeader::new_data(1, payload.len().try_into().unwrap());
                GenMessage { header, payload }.write_to(&mut stream).await.unwrap();
            }
        }
    });
    asked
}

/// containerd's event service, as far as it takes events.
struct FakeContainerd(tokio::sync::mpsc::UnboundedSender<String>);

#[tonic::async_trait]
impl pericarp_protos::containerd::events::events_server::Events for FakeContainerd {
    type SubscribeStream =
        tokio_stream::Empty<Result<pericarp_protos::containerd::types::Envelope, tonic::Status>>;

    async fn publish(
        &self,
        _: tonic::Request<pericarp_protos::containerd::events::PublishRequest>,
    ) -> Result<tonic::Response<()>, tonic::Status> {
        Err(tonic::Status::unimplemented("not here"))
    }

    async fn forward(
        &self,
        request: tonic::Request<pericarp_protos::containerd::events::ForwardRequest>,
    ) -> Result<tonic::Response<()>, tonic::Status> {
        self.0.send(request.into_inner().envelope.unwrap().topic).unwrap();
        Ok(tonic::Response::new(()))
    }

    async fn subscribe(
        &self,
        _: tonic::Request<pericarp_protos::containerd::events::SubscribeRequest>,
    ) -> Result<tonic::Response<Self::SubscribeStream>, tonic::Status> {
        Err(tonic::Status::unimplemented("not here"))
    }
}

#[tokio::test]
async fn events_wait_for_containerd_and_go_on_where_they_stopped() {
    use pericarp_protos::containerd::events::events_server::EventsServer;
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("containerd.sock");
    let of_pod = directory.path().join("abc");
    std::fs::create_dir(&of_pod).unwrap();
    let mut asked = guest_with_five_events(&of_pod);
    let node = node_with_containerd(directory.path(), socket.to_str().unwrap());
    let new = || {
        let config = config(cri::NamespaceMode::Pod);
        Arc::new(
            Pod::new("abc".parse().unwrap(), "k8s.io".into(), config, String::new(), node.clone()).unwrap(),
        )
    };
    let pod = new();
    pod.progress(|progress| progress.add("c1"));
    pod.follow_events();
    // It asks again, and for the same, as long as containerd is not there.
    asked.wait_for(|asked| asked.len() >= 2).await.unwrap();
    assert!(asked.borrow().iter().all(|after| *after == 0), "{:?}", *asked.borrow());

    let (sender, mut forwarded) = tokio::sync::mpsc::unbounded_channel();
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(EventsServer::new(FakeContainerd(sender)))
        .serve_with_incoming(tokio_stream::wrappers::UnixListenerStream::new(listener));
    tokio::spawn(server);
    for expected in ["/tasks/paused", "/tasks/paused", "/tasks/paused", "/tasks/delete"] {
        assert_eq!(forwarded.recv().await.unwrap(), expected);
    }

    // The next controller has nothing left to forward: not even after it has asked again.
    while Progress::read(&of_pod).unwrap().last_event < 5 {
        tokio::task::yield_now().await;
    }
    let next = new();
    next.state().progress = Progress::read(&of_pod).unwrap();
    assert!(!next.knows_container("c1"), "its end has been told");
    next.follow_events();
    asked.wait_for(|asked| asked.last() == Some(&5)).await.unwrap();
    assert!(forwarded.try_recv().is_err());
}

/// A guest that takes the controller's connection for requests, as its agent would.
async fn taken_over(listener: &tokio::net::UnixListener) -> pericarp_protos::host::HostClient {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut line = [0; 13];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"CONNECT 1027\n");
    stream.write_all(b"OK 7\n").await.unwrap();
    let socket = ttrpc::asynchronous::transport::Socket::new(stream);
    pericarp_protos::host::HostClient::new(ttrpc::asynchronous::Client::new(socket))
}

/// What a guest gets that has been taken over: its requests come on the agent's own connection.
#[tokio::test]
async fn a_hostile_guest_cannot_have_a_container_of_another_pod_and_is_dialled_again() {
    use pericarp_protos::host::{FitResourcesRequest, PrepareContainerRequest, ReleaseContainerRequest};
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("abc")).unwrap();
    let listener = tokio::net::UnixListener::bind(directory.path().join("abc").join(file::VSOCK)).unwrap();
    let pod = pod(directory.path());
    pod.serve_requests();
    let context = || ttrpc::context::with_timeout(0);
    for _ in 0..2 {
        let host = taken_over(&listener).await;
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
    taken_over(&listener).await;
}

/// A guest keeps the controller busy with what it asks for; that is no reason for it to live on.
#[tokio::test]
async fn a_machine_is_ended_before_anything_that_its_guest_has_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    let mut process = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = rustix::process::Pid::from_child(&process);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).unwrap();
    pod.state().phase = Phase::Running { pid: process.id() };
    pod.watch(machine::Machine::adopt(pid, pidfd).unwrap());
    let request = pod.share.lock().await;
    let stopping = tokio::spawn({
        let pod = pod.clone();
        async move { pod.stop().await }
    });
    let ended = tokio::time::timeout(std::time::Duration::from_secs(60), pod.wait()).await;
    ended.expect("its machine is ended although a request is under way");
    assert!(!stopping.is_finished());
    drop(request);
    stopping.await.unwrap().unwrap();
    // Its exit status was taken by whoever watched it.
    let _ = process.wait();
}

/// containerd handles the events of the whole node one after the other.
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
    let listener = tokio::net::UnixListener::bind(directory.path().join("abc").join(file::VSOCK)).unwrap();
    let pod = pod(directory.path());
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
    while pod.last_event() < EVENTS {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    assert!(start.elapsed() >= std::time::Duration::from_secs(4), "{:?}", start.elapsed());
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
