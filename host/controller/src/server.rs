//! `containerd.services.sandbox.v1.Controller`: what containerd asks of the controller.

use std::{collections::HashMap, sync::Arc};

use pericarp_protos::id::{InvalidId, SandboxId};
use pericarp_protos::sandbox::{
    ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest, ControllerMetricsResponse,
    ControllerPlatformRequest, ControllerPlatformResponse, ControllerShutdownRequest,
    ControllerShutdownResponse, ControllerStartRequest, ControllerStartResponse, ControllerStatusRequest,
    ControllerStatusResponse, ControllerStopRequest, ControllerStopResponse, ControllerUpdateRequest,
    ControllerUpdateResponse, ControllerWaitRequest, ControllerWaitResponse, controller_server::Controller,
    types,
};
use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use crate::{
    errors::chain,
    fault, metrics, nested,
    orphans::Pods,
    pod::{BootError, Node, POD_CONFIG_TYPE, Phase, Pod, PodError},
};

/// The Task API's version that the agent speaks. containerd would execute a shim for any other.
const TASK_API_VERSION: u32 = 3;

/// All pods of this node, served to containerd.
pub struct Sandboxes {
    node: Arc<Node>,
    pods: Pods,
}

impl Sandboxes {
    /// Starts with the pods that were taken over.
    pub fn new(node: Arc<Node>, adopted: Vec<Arc<Pod>>) -> Sandboxes {
        let pods = Pods::default();
        for pod in adopted {
            pods.lock().insert(pod.id.clone(), pod.clone());
            pods.remove_unless_claimed(&pod);
        }
        Sandboxes { node, pods }
    }

    fn pod(&self, id: &str) -> Result<Arc<Pod>, Status> {
        self.pods
            .lock()
            .get(id)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("there is no pod sandbox {id:?}")))
    }
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Status {
        let code = match &error {
            PodError::Nested { source: nested::Error::NotAllowed, .. } => Code::PermissionDenied,
            PodError::Refused { .. } | PodError::Unreadable { .. } | PodError::Nested { .. } => {
                Code::InvalidArgument
            }
            PodError::Size { .. } => Code::ResourceExhausted,
            PodError::Phase { .. } => Code::FailedPrecondition,
            PodError::Boot { source: BootError::NotReady { .. }, .. } => Code::DeadlineExceeded,
            PodError::Boot { .. } | PodError::Teardown { .. } => Code::Internal,
        };
        Status::new(code, chain(&error))
    }
}

fn namespace(metadata: &MetadataMap) -> Result<String, Status> {
    metadata
        .get("containerd-namespace")
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned)
        .ok_or_else(|| Status::invalid_argument("the request carries no containerd namespace"))
}

fn sandbox_id(id: &str) -> Result<SandboxId, Status> {
    id.parse().map_err(|error: InvalidId| Status::invalid_argument(error.to_string()))
}

/// The pod's configuration as CRI gave it to containerd, encoded.
fn pod_config(request: &ControllerCreateRequest) -> Result<&[u8], Status> {
    let id = &request.sandbox_id;
    let options = request.options.as_ref().ok_or_else(|| {
        Status::invalid_argument(format!("pod sandbox {id:?} comes without a PodSandboxConfig"))
    })?;
    if options.type_url.trim_start_matches("types.googleapis.com/") != POD_CONFIG_TYPE {
        let kind = &options.type_url;
        return Err(Status::invalid_argument(format!(
            "pod sandbox {id:?} comes with a {kind}; {POD_CONFIG_TYPE} is expected"
        )));
    }
    Ok(&options.value)
}

#[tonic::async_trait]
impl Controller for Sandboxes {
    async fn create(
        &self,
        request: Request<ControllerCreateRequest>,
    ) -> Result<Response<ControllerCreateResponse>, Status> {
        let namespace = namespace(request.metadata())?;
        let request = request.into_inner();
        let sandbox = sandbox_id(&request.sandbox_id)?;
        let config = pod_config(&request)?;
        let (id, netns) = (request.sandbox_id.clone(), request.netns_path.clone());
        let pod = Pod::from_message(sandbox, namespace, config, netns, self.node.clone())?;
        match self.pods.lock().entry(id.clone()) {
            std::collections::hash_map::Entry::Occupied(known) => {
                Err(Status::already_exists(format!("{} exists already", known.get().name())))
            }
            std::collections::hash_map::Entry::Vacant(free) => {
                tracing::info!(pod = id, name = pod.name(), size = ?pod.size, "pod created");
                free.insert(Arc::new(pod));
                Ok(Response::new(ControllerCreateResponse { sandbox_id: id }))
            }
        }
    }

    async fn start(
        &self,
        request: Request<ControllerStartRequest>,
    ) -> Result<Response<ControllerStartResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pod(&id)?;
        let starting = pod.clone();
        let started = carried_through(&pod, "started", async move { starting.start().await }).await?;
        if let Err(error) = started {
            let forget = matches!(error, PodError::Boot { .. });
            let status = Status::from(error);
            tracing::warn!(pod = id, error = status.message(), "pod failed to start");
            // containerd forgets a pod that has not started. What is left of it is not to be forgotten here.
            if forget && pod.is_undone() {
                self.pods.lock().remove(&id);
            } else if forget {
                self.pods.remove_when_undone(&pod);
            }
            return Err(status);
        }
        self.pods.remove_unless_claimed(&pod);
        let pid = match pod.phase() {
            Phase::Running { pid } => pid,
            _ => 0,
        };
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: id,
            pid,
            created_at: Some(Timestamp::from(pod.created_at)),
            labels: HashMap::new(),
            address: pod.address(),
            version: TASK_API_VERSION,
        }))
    }

    async fn platform(
        &self,
        _request: Request<ControllerPlatformRequest>,
    ) -> Result<Response<ControllerPlatformResponse>, Status> {
        let platform = types::Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..types::Platform::default()
        };
        Ok(Response::new(ControllerPlatformResponse { platform: Some(platform) }))
    }

    async fn stop(
        &self,
        request: Request<ControllerStopRequest>,
    ) -> Result<Response<ControllerStopResponse>, Status> {
        let pod = self.pod(&request.into_inner().sandbox_id)?;
        let stopping = pod.clone();
        carried_through(&pod, "stopped", async move { stopping.stop().await }).await??;
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<ControllerWaitRequest>,
    ) -> Result<Response<ControllerWaitResponse>, Status> {
        let pod = self.pod(&request.into_inner().sandbox_id)?;
        pod.claim();
        let ended = pod.wait().await;
        Ok(Response::new(ControllerWaitResponse {
            exit_status: ended.exit.status(),
            exited_at: Some(Timestamp::from(ended.at)),
        }))
    }

    async fn status(
        &self,
        request: Request<ControllerStatusRequest>,
    ) -> Result<Response<ControllerStatusResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pod(&request.sandbox_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("info".to_owned(), pod.verbose_info().await.to_string());
        }
        let (state, pid) = match pod.phase() {
            Phase::Running { pid } => ("SANDBOX_READY", pid),
            Phase::Created | Phase::Starting | Phase::Ended => ("SANDBOX_NOTREADY", 0),
        };
        Ok(Response::new(ControllerStatusResponse {
            sandbox_id: request.sandbox_id,
            pid,
            state: state.into(),
            info,
            created_at: Some(Timestamp::from(pod.created_at)),
            exited_at: pod.end().map(|ended| Timestamp::from(ended.at)),
            extra: None,
            address: pod.address(),
            version: TASK_API_VERSION,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Result<Response<ControllerShutdownResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pod(&id)?;
        let (pods, removed) = (self.pods.clone(), pod.clone());
        carried_through(&pod, "removed", async move {
            removed.shutdown().await?;
            fault::point("pod-removed");
            pods.lock().remove(&removed.id);
            tracing::info!(pod = removed.id, name = removed.name(), "pod removed");
            Ok::<_, PodError>(())
        })
        .await??;
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<ControllerMetricsRequest>,
    ) -> Result<Response<ControllerMetricsResponse>, Status> {
        let pod = self.pod(&request.into_inner().sandbox_id)?;
        if !matches!(pod.phase(), Phase::Running { .. }) {
            return Err(Status::failed_precondition(format!("{} is not running", pod.name())));
        }
        let cgroup = pod.cgroup().ok_or_else(|| {
            Status::unimplemented(format!("{} has no numbers: they need cgroup v2 on the host", pod.name()))
        })?;
        Ok(Response::new(ControllerMetricsResponse { metrics: Some(metrics::of_pod(&pod.id, &cgroup)) }))
    }

    async fn update(
        &self,
        request: Request<ControllerUpdateRequest>,
    ) -> Result<Response<ControllerUpdateResponse>, Status> {
        // containerd's record of the sandbox has changed. Nothing in it is used here after Create, so it is
        // enough to know the pod.
        self.pod(&request.into_inner().sandbox_id)?;
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}

/// Does something to a pod on a task of its own: a client that goes away must not leave it half done.
async fn carried_through<T: Send + 'static>(
    pod: &Pod,
    done: &str,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Status> {
    let failed = |_| Status::internal(format!("{} cannot be {done}: the controller failed", pod.name()));
    tokio::spawn(work).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        sync::atomic::{AtomicBool, Ordering},
        time::Duration,
    };

    use pericarp_protos::cri;
    use prost::Message as _;

    use super::*;
    use crate::pod::tests::{cannot_undo, node};

    #[test]
    fn an_id_that_is_no_directory_name_is_refused() {
        assert!(sandbox_id("0123456789abcdef").is_ok());
        for id in ["", "..", "a/b", "/x", &"x".repeat(65)] {
            assert_eq!(sandbox_id(id).unwrap_err().code(), Code::InvalidArgument, "{id:?}");
        }
    }

    async fn sandboxes(run_dir: &Path) -> Sandboxes {
        let sandboxes = Sandboxes::new(node(run_dir), Vec::new());
        let config = cri::PodSandboxConfig::default().encode_to_vec();
        let mut request = Request::new(ControllerCreateRequest {
            sandbox_id: "abc".into(),
            options: Some(prost_types::Any { type_url: POD_CONFIG_TYPE.into(), value: config }),
            netns_path: "/run/netns/no-such-netns".into(),
            ..ControllerCreateRequest::default()
        });
        request.metadata_mut().insert("containerd-namespace", "k8s.io".parse().unwrap());
        sandboxes.create(request).await.unwrap();
        sandboxes
    }

    async fn shutdown(sandboxes: &Sandboxes) -> Result<(), Status> {
        let request = ControllerShutdownRequest { sandbox_id: "abc".into(), ..Default::default() };
        sandboxes.shutdown(Request::new(request)).await.map(drop)
    }

    #[tokio::test]
    async fn a_pod_that_cannot_be_undone_stays_until_it_can_be() {
        let directory = tempfile::tempdir().unwrap();
        let sandboxes = sandboxes(directory.path()).await;
        let busy = Arc::new(AtomicBool::new(true));
        cannot_undo(&sandboxes.pod("abc").unwrap(), &busy);
        for _ in 0..2 {
            let status = shutdown(&sandboxes).await.unwrap_err();
            assert!(status.message().contains("cannot remove what is busy"), "{status}");
        }
        busy.store(false, Ordering::Relaxed);
        shutdown(&sandboxes).await.unwrap();
        assert_eq!(shutdown(&sandboxes).await.unwrap_err().code(), Code::NotFound);
    }

    /// Whose deadline has passed, or who was restarted.
    #[tokio::test]
    async fn a_pod_is_removed_although_whoever_asked_for_it_has_gone_away() {
        let directory = tempfile::tempdir().unwrap();
        let sandboxes = sandboxes(directory.path()).await;
        let pod = sandboxes.pod("abc").unwrap();
        let (begun, removing) = std::sync::mpsc::channel();
        let (go_on, told) = std::sync::mpsc::channel::<()>();
        pod.push_undo("wait to be told", move || {
            begun.send(()).unwrap();
            told.recv().map_err(std::io::Error::other)
        });
        let asking = shutdown(&sandboxes);
        let begins = tokio::task::spawn_blocking(move || removing.recv().unwrap());
        tokio::select! {
            _ = asking => panic!("it is not removed yet"),
            begun = begins => begun.unwrap(),
        }
        // Nobody asks any more, and nothing of it may be forgotten.
        go_on.send(()).unwrap();
        while sandboxes.pod("abc").is_ok() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(pod.is_undone());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_has_not_started_and_cannot_be_undone_is_undone_when_it_can_be() {
        let directory = tempfile::tempdir().unwrap();
        for fails in [false, true] {
            let sandboxes = sandboxes(directory.path()).await;
            let pod = sandboxes.pod("abc").unwrap();
            let busy = Arc::new(AtomicBool::new(fails));
            cannot_undo(&pod, &busy);
            let start = ControllerStartRequest { sandbox_id: "abc".into(), ..Default::default() };
            let status = sandboxes.start(Request::new(start)).await.unwrap_err();
            assert!(status.message().contains("no-such-netns"), "{status}");
            assert_eq!(sandboxes.pod("abc").is_ok(), fails, "nothing is forgotten that is left of it");
            // Longer than the longest pause.
            tokio::time::sleep(Duration::from_secs(100)).await;
            assert_eq!(sandboxes.pod("abc").is_ok(), fails);
            busy.store(false, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(100)).await;
            assert!(sandboxes.pod("abc").is_err());
            assert!(pod.is_undone());
        }
    }

    #[test]
    fn a_request_without_a_pod_is_refused_with_its_id() {
        let request =
            ControllerCreateRequest { sandbox_id: "abc".into(), ..ControllerCreateRequest::default() };
        let status = pod_config(&request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("abc"));
    }
}
