use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use prost::Message as _;

use super::*;
use crate::pod::tests::{cannot_remove, environment, own};

#[test]
fn an_id_that_is_no_directory_name_is_refused() {
    assert!(sandbox_id("0123456789abcdef").is_ok());
    for id in ["", "..", "a/b", "/x", &"x".repeat(65)] {
        assert_eq!(sandbox_id(id).unwrap_err().code(), Code::InvalidArgument, "{id:?}");
    }
}

fn create_request() -> Request<ControllerCreateRequest> {
    let config = cri::PodSandboxConfig::default().encode_to_vec();
    let mut request = Request::new(ControllerCreateRequest {
        sandbox_id: "abc".into(),
        options: Some(Any { type_url: POD_CONFIG_TYPE.into(), value: config }),
        netns_path: "/run/netns/no-such-netns".into(),
        ..ControllerCreateRequest::default()
    });
    request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
    request
}

async fn sandboxes(run_dir: &Path) -> Sandboxes {
    let sandboxes = Sandboxes::new(environment(run_dir), Pods::default());
    sandboxes.create(create_request()).await.unwrap();
    sandboxes
}

async fn shutdown(sandboxes: &Sandboxes) -> Result<(), Status> {
    let request = ControllerShutdownRequest { sandbox_id: "abc".into(), ..Default::default() };
    sandboxes.shutdown(Request::new(request)).await.map(drop)
}

async fn start(sandboxes: &Sandboxes) -> Status {
    let start = ControllerStartRequest { sandbox_id: "abc".into(), ..Default::default() };
    sandboxes.start(Request::new(start)).await.unwrap_err()
}

#[tokio::test]
async fn a_pod_that_cannot_be_removed_stays_until_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    let busy = Arc::new(AtomicBool::new(true));
    cannot_remove(&sandboxes.pod("abc").unwrap(), &busy).await;
    for _ in 0..2 {
        let status = shutdown(&sandboxes).await.unwrap_err();
        assert!(status.message().contains("cannot remove what is busy"), "{status}");
    }
    busy.store(false, Ordering::Relaxed);
    shutdown(&sandboxes).await.unwrap();
    assert_eq!(shutdown(&sandboxes).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_pod_whose_id_is_taken_is_refused_and_one_that_was_removed_can_be_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    assert_eq!(sandboxes.create(create_request()).await.unwrap_err().code(), Code::AlreadyExists);
    shutdown(&sandboxes).await.unwrap();
    sandboxes.create(create_request()).await.unwrap();
    assert!(sandboxes.pod("abc").is_ok());
}

/// Whose deadline has passed, or who was restarted.
#[tokio::test]
async fn a_pod_is_removed_although_whoever_asked_for_it_has_gone_away() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    let pod = sandboxes.pod("abc").unwrap();
    let (begun, removing) = std::sync::mpsc::channel();
    let (go_on, told) = std::sync::mpsc::channel::<()>();
    own(&pod, move || {
        begun.send(()).unwrap();
        told.recv().map_err(std::io::Error::other)
    })
    .await;
    let asking = shutdown(&sandboxes);
    let begins = tokio::task::spawn_blocking(move || removing.recv().unwrap());
    tokio::select! {
        _ = asking => panic!("it is not removed yet"),
        begun = begins => begun.unwrap(),
    }
    // Nobody asks any more, and nothing of it may be forgotten.
    go_on.send(()).unwrap();
    pod.removed().await;
    assert!(sandboxes.pod("abc").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_has_not_started_and_cannot_be_removed_is_removed_when_it_can_be() {
    let directory = tempfile::tempdir().unwrap();
    for fails in [false, true] {
        let sandboxes = sandboxes(directory.path()).await;
        let pod = sandboxes.pod("abc").unwrap();
        let busy = Arc::new(AtomicBool::new(fails));
        cannot_remove(&pod, &busy).await;
        let status = start(&sandboxes).await;
        assert!(status.message().contains("no-such-netns"), "{status}");
        assert_eq!(sandboxes.pod("abc").is_ok(), fails, "nothing is forgotten that is left of it");
        // Longer than the longest pause.
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert_eq!(sandboxes.pod("abc").is_ok(), fails);
        busy.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert!(sandboxes.pod("abc").is_err());
        assert!(pod.is_removed());
    }
}

/// As containerd 2.3 leaves one behind when it cannot pull the image of its pause container.
#[tokio::test(start_paused = true)]
async fn a_pod_that_nobody_starts_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    tokio::time::sleep(Duration::from_secs(9 * 60)).await;
    assert!(sandboxes.pod("abc").is_ok());
    tokio::time::sleep(Duration::from_secs(2 * 60)).await;
    assert_eq!(start(&sandboxes).await.code(), Code::NotFound);
}

#[test]
fn a_request_without_a_pod_is_refused_with_its_id() {
    let request = ControllerCreateRequest { sandbox_id: "abc".into(), ..ControllerCreateRequest::default() };
    let status = pod_config(&request).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("abc"));
}

fn update(fields: &[&str], extensions: &[(&str, &str)]) -> ControllerUpdateRequest {
    let extension = |(key, value): &(&str, &str)| {
        let any = Any {
            type_url: "io.containerd.cri.v1/UpdatedResources".into(),
            value: value.as_bytes().to_vec(),
        };
        ((*key).to_owned(), any)
    };
    ControllerUpdateRequest {
        sandbox_id: "abc".into(),
        sandbox: Some(types::Sandbox {
            extensions: extensions.iter().map(extension).collect(),
            ..types::Sandbox::default()
        }),
        fields: fields.iter().map(|field| (*field).to_owned()).collect(),
        ..ControllerUpdateRequest::default()
    }
}

/// As containerd 2.3 writes it.
const RESOURCES: &str = r#"{"Overhead":{},"Resources":{"cpu_period":100000,"cpu_quota":150000,"cpu_shares":512,
    "memory_limit_in_bytes":268435456}}"#;

#[test]
fn the_resources_of_an_update_are_read() {
    let request = update(&["extensions"], &[("metadata", "{}"), ("updated-resources", RESOURCES)]);
    let updated = updated_resources(&request).unwrap().unwrap();
    let limits = cpu_and_memory(updated.resources.as_ref());
    assert_eq!((limits.cpu_milli, limits.memory_bytes), (Some(1500), Some(256 << 20)));
    assert_eq!(cpu_and_memory(updated.overhead.as_ref()).cpu_milli, None);
    assert!(updated_resources(&update(&["extensions"], &[("metadata", "{}")])).unwrap().is_none());
    assert!(updated_resources(&update(&["labels"], &[])).unwrap().is_none());
}

#[test]
fn an_update_that_is_not_understood_is_refused_with_what_it_is() {
    for (request, named) in [
        (update(&["extensions"], &[("hologram", "{}")]), "hologram"),
        (update(&["runtime"], &[]), "\"runtime\""),
        (update(&["extensions"], &[("updated-resources", "no json")]), "cannot be read"),
        (update(&["extensions"], &[("updated-resources", r#"{"Devices":[]}"#)]), "Devices"),
    ] {
        let status = updated_resources(&request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(named) && status.message().contains("abc"), "{status}");
    }
}

/// containerd's tracing adds these to every call from 2.3 on.
#[tokio::test]
async fn a_call_with_the_marks_of_a_trace_is_like_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = Sandboxes::new(environment(directory.path()), Pods::default());
    for (id, trace) in [
        ("a", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("b", "00-00000000000000000000000000000000-0000000000000000-00"),
        ("c", "no trace"),
    ] {
        let mut request = create_request();
        request.get_mut().sandbox_id = id.into();
        for (key, value) in [("traceparent", trace), ("tracestate", "x=1,y=2"), ("baggage", "node=one")] {
            request.metadata_mut().insert(key, value.parse().unwrap());
        }
        sandboxes.create(request).await.unwrap();
        assert!(sandboxes.pod(id).is_ok());
    }
}

/// What containerd 2.3 and later read into a struct of Go's, which fails for a value of another type, and then write
/// anew (`setUpdatedResources`; `podsandboxtypes.SandboxInfo`).
#[tokio::test]
async fn what_is_told_of_a_pod_has_the_types_of_containerds_own_struct() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    let request = ControllerStatusRequest {
        sandbox_id: "abc".into(),
        verbose: true,
        ..ControllerStatusRequest::default()
    };
    let status = sandboxes.status(Request::new(request)).await.unwrap().into_inner();
    let mut keys: Vec<_> = status.info.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["info", "pericarp"]);
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    for (key, has_its_type) in [
        ("pid", info["pid"].as_u64().is_some_and(|pid| u32::try_from(pid).is_ok())),
        ("processStatus", info["processStatus"].is_string()),
        ("netNamespaceClosed", info["netNamespaceClosed"].is_boolean()),
        ("runtimeType", info["runtimeType"].is_string()),
        ("runtimeSpec", info["runtimeSpec"].is_null() || info["runtimeSpec"].is_object()),
    ] {
        assert!(has_its_type, "{key}: {info}");
    }
    let config: cri::PodSandboxConfig = serde_json::from_value(info["config"].clone()).unwrap();
    assert_eq!(config, cri::PodSandboxConfig::default());
    for key in
        ["image", "snapshotKey", "snapshotter", "cniResult", "sandboxMetadata", "overhead", "resources"]
    {
        assert!(info.get(key).is_none(), "{key} is containerd's: {info}");
    }
}

#[tokio::test]
async fn a_pod_that_does_not_run_has_empty_numbers_and_no_new_size() {
    let directory = tempfile::tempdir().unwrap();
    let sandboxes = sandboxes(directory.path()).await;
    let metrics = || ControllerMetricsRequest { sandbox_id: "abc".into(), ..Default::default() };
    let answer = sandboxes.metrics(Request::new(metrics())).await.unwrap().into_inner().metrics.unwrap();
    let data = answer.data.unwrap();
    assert_eq!((data.type_url.as_str(), data.value.len()), ("io.containerd.cgroups.v2.Metrics", 0));
    let request = update(&["extensions"], &[("updated-resources", RESOURCES)]);
    let status = sandboxes.update(Request::new(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let unknown = ControllerMetricsRequest { sandbox_id: "other".into(), ..Default::default() };
    assert_eq!(sandboxes.metrics(Request::new(unknown)).await.unwrap_err().code(), Code::NotFound);
}
