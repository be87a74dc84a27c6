use async_trait::async_trait;
use pericarp_protos::ttrpc;
use tonic::transport::Endpoint;

use super::*;
use crate::{
    network::{PodNetwork, steer::SteerError},
    source::{ContainerRecord, SourceError},
};

/// Knows one container, `known`, of the pod `other`.
struct OneContainer;

#[async_trait]
impl ContainerSource for OneContainer {
    async fn container(&self, _namespace: &str, id: &str) -> Result<ContainerRecord, SourceError> {
        if id == "known" {
            Ok(ContainerRecord {
                sandbox: "other".into(),
                spec: Vec::new(),
                snapshotter: "overlayfs".into(),
                rootfs: Vec::new(),
            })
        } else {
            Err(SourceError::NotFound { id: id.into() })
        }
    }
}

fn node(run_dir: &std::path::Path) -> Arc<Node> {
    let channel = Endpoint::from_static("unix:///no/such/socket").connect_lazy();
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

fn pod(run_dir: &std::path::Path) -> Arc<Pod> {
    let config = config(cri::NamespaceMode::Pod);
    Arc::new(Pod::new("abc".into(), "k8s.io".into(), config, String::new(), node(run_dir)).unwrap())
}

#[tokio::test]
async fn a_pod_on_the_hosts_network_is_refused_with_its_name_and_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(cri::NamespaceMode::Node);
    let error =
        Pod::new("abc".into(), "k8s.io".into(), config, String::new(), node(directory.path())).err().unwrap();
    let text = error.to_string();
    assert!(text.contains("default/web") && text.contains("remove hostNetwork"), "{text}");
}

#[tokio::test]
async fn a_pod_whose_netns_is_gone_does_not_start_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(cri::NamespaceMode::Pod);
    let netns = "/run/netns/no-such-netns".to_owned();
    let pod = Pod::new("abc".into(), "k8s.io".into(), config, netns.clone(), node(directory.path())).unwrap();
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
    record::write(&pod, std::process::id(), record::Stage::Running).unwrap();
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
        let (code, message) = pod.prepare_container(id).await.unwrap_err().into_status(&pod);
        assert_eq!(code, ttrpc::Code::NOT_FOUND, "{id}");
        assert!(message.contains("default/web") && message.contains("in this pod"), "{message}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn releasing_what_was_never_prepared_is_no_error_but_a_path_is() {
    let directory = tempfile::tempdir().unwrap();
    let pod = pod(directory.path());
    assert!(pod.release_container("gone").await.is_ok());
    assert!(pod.release_container("../../etc").await.is_err());
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
