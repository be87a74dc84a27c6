//! `containerd.services.sandbox.v1.Controller`: what containerd asks of the controller, in its versions 2.1 to 2.4.
//!
//! Handlers send a request to the pod and wait. hyper drops a handler whose client has gone away: what it has asked for
//! is carried through nonetheless.

use std::{collections::HashMap, sync::Arc};

use pericarp_protos::{
    cri,
    id::{InvalidId, SandboxId},
    sandbox::{
        ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest,
        ControllerMetricsResponse, ControllerPlatformRequest, ControllerPlatformResponse,
        ControllerShutdownRequest, ControllerShutdownResponse, ControllerStartRequest,
        ControllerStartResponse, ControllerStatusRequest, ControllerStatusResponse, ControllerStopRequest,
        ControllerStopResponse, ControllerUpdateRequest, ControllerUpdateResponse, ControllerWaitRequest,
        ControllerWaitResponse, controller_server::Controller, types,
    },
};
use prost_types::{Any, Timestamp};
use serde::Deserialize;
use serde_json::json;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use super::{
    info, metrics,
    pod_spec::{POD_CONFIG_TYPE, PodSpecError, cpu_and_memory, pod_spec},
};
use crate::{
    config::rate_limits::RateLimitError,
    host::cgroup,
    pod::{Environment, Pod, PodError, ResizeError, StartError, life::Phase},
    pods::{Pods, remove_unless_claimed},
    telemetry::error_chain::chain,
};

/// The Task API's version that the agent speaks. containerd would execute a shim for any other.
const TASK_API_VERSION: u32 = 3;

/// containerd's name for an OCI runtime spec in an `Any`; its value is JSON.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// The extension of a sandbox in which containerd has what CRI's `UpdatePodSandboxResources` asks for, from 2.3 on
/// (`internal/cri/server/podsandbox`, `UpdatedResourcesKey`).
const UPDATED_RESOURCES: &str = "updated-resources";
/// The extension in which containerd keeps CRI's request. It does not change after `Create`.
const METADATA: &str = "metadata";

/// All pods of this node, served to containerd.
pub struct Sandboxes {
    environment: Arc<Environment>,
    pods: Pods,
}

impl Sandboxes {
    pub fn new(environment: Arc<Environment>, pods: Pods) -> Self {
        Self { environment, pods }
    }

    fn pod(&self, id: &str) -> Result<Arc<Pod>, Status> {
        self.pods.get(id).ok_or_else(|| Status::not_found(format!("there is no pod sandbox {id:?}")))
    }
}

impl From<PodSpecError> for Status {
    fn from(error: PodSpecError) -> Self {
        Self::invalid_argument(chain(&error))
    }
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let code = match &error {
            PodError::NestedVirtualization { .. }
            | PodError::RateLimit { source: RateLimitError::TooMuch { .. }, .. } => Code::PermissionDenied,
            PodError::RateLimit { source: RateLimitError::BurstWithoutRate { .. }, .. } => {
                Code::InvalidArgument
            }
            PodError::Size { .. } | PodError::Resize { source: ResizeError::Size(_), .. } => {
                Code::ResourceExhausted
            }
            PodError::Phase { .. } | PodError::NotRunning { .. } => Code::FailedPrecondition,
            PodError::Start { source: StartError::NotReady { .. } | StartError::Starved { .. }, .. } => {
                Code::DeadlineExceeded
            }
            PodError::Removed { .. } => Code::NotFound,
            PodError::Start { .. }
            | PodError::Teardown { .. }
            | PodError::Resize { .. }
            | PodError::Failed { .. } => Code::Internal,
        };
        Self::new(code, chain(&error))
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
        Status::invalid_argument(format!("pod sandbox {id:?} is asked for without a PodSandboxConfig"))
    })?;
    if options.type_url.trim_start_matches("types.googleapis.com/") != POD_CONFIG_TYPE {
        let kind = &options.type_url;
        return Err(Status::invalid_argument(format!(
            "pod sandbox {id:?} is asked for with a {kind}; {POD_CONFIG_TYPE} is expected"
        )));
    }
    Ok(&options.value)
}

/// What containerd hands on of CRI's `UpdatePodSandboxResources`, in JSON (`podsandbox.UpdatedResources`).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct UpdatedResources {
    overhead: Option<cri::LinuxContainerResources>,
    resources: Option<cri::LinuxContainerResources>,
}

/// What an update asks for that means something to a machine. The rest must be known to mean nothing.
fn updated_resources(request: &ControllerUpdateRequest) -> Result<Option<UpdatedResources>, Status> {
    let id = &request.sandbox_id;
    let refuse = |what: String| {
        Err(Status::invalid_argument(format!(
            "pod sandbox {id:?}: {what}, which this version of Pericarp does not know; nothing is changed"
        )))
    };
    // Labels are containerd's own.
    if let Some(field) =
        request.fields.iter().find(|field| !matches!(field.as_str(), "extensions" | "labels"))
    {
        return refuse(format!("its field {field:?} is to be updated"));
    }
    let Some(sandbox) = &request.sandbox else { return Ok(None) };
    if let Some(key) =
        sandbox.extensions.keys().find(|key| !matches!(key.as_str(), METADATA | UPDATED_RESOURCES))
    {
        return refuse(format!("it has the extension {key:?}"));
    }
    let Some(updated) = sandbox.extensions.get(UPDATED_RESOURCES) else { return Ok(None) };
    match serde_json::from_slice(&updated.value) {
        Ok(resources) => Ok(Some(resources)),
        Err(error) => refuse(format!("its {UPDATED_RESOURCES} cannot be read ({error})")),
    }
}

/// A spec of the sandbox, which containerd 2.3 and later give to NRI's plugins (`internal/cri/nri`, `nriPodSandbox`).
/// There is no process that would have it. A cgroup's path is in it as for runc: from the root of the hierarchy on.
fn spec(pod: &Pod) -> Any {
    let mut linux = json!({ "sysctl": pod.spec().sysctls });
    if let Some(path) = pod.status().owned.cgroup().as_deref().and_then(cgroup::path_in_hierarchy) {
        linux["cgroupsPath"] = json!(path);
    }
    let spec = json!({ "ociVersion": "1.2.1", "hostname": pod.spec().hostname, "linux": linux });
    Any { type_url: SPEC_TYPE.to_owned(), value: spec.to_string().into_bytes() }
}

#[tonic::async_trait]
impl Controller for Sandboxes {
    async fn create(
        &self,
        request: Request<ControllerCreateRequest>,
    ) -> Result<Response<ControllerCreateResponse>, Status> {
        let namespace = namespace(request.metadata())?;
        let request = request.into_inner();
        let id = sandbox_id(&request.sandbox_id)?;
        let spec = pod_spec(id, &namespace, pod_config(&request)?, &request.netns_path)?;
        let name = spec.title();
        if !self
            .pods
            .insert_new(spec.id.as_str(), || Pod::create(spec.clone(), Arc::clone(&self.environment)))?
        {
            return Err(Status::already_exists(format!("{name} exists already")));
        }
        tracing::info!(pod = request.sandbox_id, name, "pod created");
        Ok(Response::new(ControllerCreateResponse { sandbox_id: request.sandbox_id }))
    }

    async fn start(
        &self,
        request: Request<ControllerStartRequest>,
    ) -> Result<Response<ControllerStartResponse>, Status> {
        let id = request.into_inner().sandbox_id;
        let pod = self.pod(&id)?;
        // Before anything is made, so that it is watched whether or not this handler lives.
        remove_unless_claimed(&pod);
        let pid = pod.start().await?;
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: id,
            pid,
            created_at: Some(Timestamp::from(pod.spec().created_at)),
            labels: HashMap::new(),
            address: pod.task_address(),
            version: TASK_API_VERSION,
            spec: Some(spec(&pod)),
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
        self.pod(&request.into_inner().sandbox_id)?.stop().await?;
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
        let info = if request.verbose { info::of_pod(&pod).await } else { HashMap::new() };
        let (state, pid) = match pod.phase() {
            Phase::Running { pid } => ("SANDBOX_READY", pid),
            Phase::Created | Phase::Starting | Phase::Ended => ("SANDBOX_NOTREADY", 0),
        };
        Ok(Response::new(ControllerStatusResponse {
            sandbox_id: request.sandbox_id,
            pid,
            state: state.into(),
            info,
            created_at: Some(Timestamp::from(pod.spec().created_at)),
            exited_at: pod.end().map(|ended| Timestamp::from(ended.at)),
            extra: None,
            address: pod.task_address(),
            version: TASK_API_VERSION,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Result<Response<ControllerShutdownResponse>, Status> {
        self.pod(&request.into_inner().sandbox_id)?.remove().await?;
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<ControllerMetricsRequest>,
    ) -> Result<Response<ControllerMetricsResponse>, Status> {
        let pod = self.pod(&request.into_inner().sandbox_id)?;
        Ok(Response::new(ControllerMetricsResponse { metrics: Some(metrics::of_pod(&pod).await) }))
    }

    async fn update(
        &self,
        request: Request<ControllerUpdateRequest>,
    ) -> Result<Response<ControllerUpdateResponse>, Status> {
        let request = request.into_inner();
        let pod = self.pod(&request.sandbox_id)?;
        if let Some(UpdatedResources { overhead, resources }) = updated_resources(&request)? {
            pod.resize(cpu_and_memory(resources.as_ref()), cpu_and_memory(overhead.as_ref())).await?;
        }
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}

#[cfg(test)]
#[path = "sandboxes_tests.rs"]
mod tests;
