//! The sandbox Controller, called as CRI of containerd 2.4 calls it (`internal/cri/server`, `sandbox_*.go`, through
//! `core/sandbox/proxy/controller.go`): with every field that containerd fills in, and with what its tracing adds to
//! each call.
//!
//! The task API's address that `Start` returns comes back in no call to the Controller. From 2.3.1 on, CRI hands it to
//! containerd's own task service (`CreateTaskRequest.task_api_address` and `task_api_version`), which dials it.

use std::{collections::HashMap, time::SystemTime};

use anyhow::{Context, Result};
use pericarp_protos::sandbox::{
    ControllerCreateRequest, ControllerMetricsRequest, ControllerPlatformRequest, ControllerShutdownRequest,
    ControllerStartRequest, ControllerStartResponse, ControllerStatusRequest, ControllerStatusResponse,
    ControllerStopRequest, ControllerUpdateRequest, ControllerWaitRequest, ControllerWaitResponse,
    controller_client::ControllerClient,
    types::{self, Metric, Platform},
};
use prost_types::{Any, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tonic::{
    Request, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::Channel,
};

use super::{
    controller::{Controller, NamespaceInterceptor, options},
    netns::NetworkNamespace,
};
use crate::{api, cri};

/// The name of the proxy plugin and of the runtime's `sandboxer`.
const SANDBOXER: &str = "pericarp";
/// The type of CRI's own record of a pod, and its key among a sandbox's extensions.
const METADATA: (&str, &str) = ("metadata", "github.com/containerd/cri/pkg/store/sandbox/Metadata");
/// The type of what a pod's resources are changed to, and its key among a sandbox's extensions.
const UPDATED_RESOURCES: (&str, &str) = ("updated-resources", "io.containerd.cri.v1/UpdatedResources");

/// Adds to each call what containerd's OpenTelemetry adds from 2.3 on (`otelgrpc.NewClientHandler`), beside CRI's
/// namespace.
#[derive(Clone, Copy, Debug)]
struct TracingInterceptor;

impl Interceptor for TracingInterceptor {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = NamespaceInterceptor.call(request)?;
        for (key, value) in [
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ("tracestate", "congo=t61rcWkgMzE"),
            ("baggage", "node=one"),
        ] {
            request.metadata_mut().insert(key, MetadataValue::from_static(value));
        }
        Ok(request)
    }
}

/// A sandbox as containerd has it on record, and a connection to its controller.
pub struct Sandbox {
    client: ControllerClient<InterceptedService<Channel, TracingInterceptor>>,
    config: api::PodSandboxConfig,
    netns_path: String,
    /// What containerd's store has, and what it sends.
    pub record: types::Sandbox,
}

impl Sandbox {
    /// Makes the record of a pod, as `RunPodSandbox` does it before it calls the controller.
    pub async fn new(
        controller: &Controller,
        id: &str,
        config: api::PodSandboxConfig,
        netns: &NetworkNamespace,
    ) -> Result<Self> {
        let socket = controller.run_dir.join("r/controller.sock");
        let channel = cri::connect(socket.to_str().context("a socket path in UTF-8")?).await?;
        let api::PodSandboxMetadata { name, namespace, uid, attempt } =
            config.metadata.clone().unwrap_or_default();
        let name = format!("{name}_{namespace}_{uid}_{attempt}");
        let metadata = json!({ "Version": "v1", "Metadata": {
            "ID": id,
            "Name": name,
            "Config": as_go_writes(&config)?,
            "NetNSPath": netns.path(),
            "IP": "10.88.0.2",
            "AdditionalIPs": null,
            "RuntimeHandler": SANDBOXER,
            "CNIResult": { "Interfaces": { "eth0": { "IPConfigs": [{ "IP": "10.88.0.2", "Gateway": "10.88.0.1" }],
                "Mac": "0a:58:0a:58:00:02", "Sandbox": netns.path() } }, "DNS": [{}], "Routes": null },
            "ProcessLabel": "",
        } });
        let now = Timestamp::from(SystemTime::now());
        let record = types::Sandbox {
            sandbox_id: id.to_owned(),
            // The runtime has no options.
            runtime: Some(types::sandbox::Runtime {
                name: "io.containerd.pericarp.v1".to_owned(),
                options: None,
            }),
            spec: None,
            labels: HashMap::from([("name".to_owned(), name)]),
            created_at: Some(now),
            updated_at: Some(now),
            extensions: HashMap::from([extension(METADATA, &metadata)]),
            sandboxer: SANDBOXER.to_owned(),
        };
        let client = ControllerClient::with_interceptor(channel, TracingInterceptor);
        Ok(Self { client, config, netns_path: netns.path(), record })
    }

    /// `Create`. CRI gives a pod no annotations here; they are in its configuration, too.
    pub async fn create(&mut self) -> Result<(), Status> {
        self.create_with_annotations(HashMap::new()).await
    }

    /// `Create` with annotations of the sandbox itself, as another client of containerd may give it.
    pub async fn create_with_annotations(
        &mut self,
        annotations: HashMap<String, String>,
    ) -> Result<(), Status> {
        let request = ControllerCreateRequest {
            sandbox_id: self.id(),
            // Only the pause container has a root file system.
            rootfs: Vec::new(),
            options: Some(options(&self.config)),
            netns_path: self.netns_path.clone(),
            annotations,
            sandbox: Some(self.record.clone()),
            sandboxer: SANDBOXER.to_owned(),
        };
        self.client.create(request).await.map(drop)
    }

    /// `Start`. Labels and spec of the response are put on record, as CRI does it.
    pub async fn start(&mut self) -> Result<ControllerStartResponse, Status> {
        let request = ControllerStartRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned() };
        let started = self.client.start(request).await?.into_inner();
        self.record.labels.clone_from(&started.labels);
        self.record.spec.clone_from(&started.spec);
        self.record.updated_at = Some(SystemTime::now().into());
        Ok(started)
    }

    /// `Wait`, in the background.
    pub fn wait(&self) -> JoinHandle<Result<ControllerWaitResponse, Status>> {
        let request = ControllerWaitRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned() };
        let mut client = self.client.clone();
        tokio::spawn(async move { Ok(client.wait(request).await?.into_inner()) })
    }

    /// `Status`, with or without `info`.
    pub async fn status(&mut self, verbose: bool) -> Result<ControllerStatusResponse, Status> {
        let request =
            ControllerStatusRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned(), verbose };
        Ok(self.client.status(request).await?.into_inner())
    }

    /// `Platform`.
    pub async fn platform(&mut self) -> Result<Option<Platform>, Status> {
        let request = ControllerPlatformRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned() };
        Ok(self.client.platform(request).await?.into_inner().platform)
    }

    /// `Metrics`.
    pub async fn metrics(&mut self) -> Result<Option<Metric>, Status> {
        let request = ControllerMetricsRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned() };
        Ok(self.client.metrics(request).await?.into_inner().metrics)
    }

    /// `Update`, as `UpdatePodSandboxResources` makes it.
    pub async fn update_resources(
        &mut self,
        overhead: Option<api::LinuxContainerResources>,
        resources: Option<api::LinuxContainerResources>,
    ) -> Result<(), Status> {
        let write = |resources: Option<api::LinuxContainerResources>| {
            resources.map_or(Ok(Value::Null), |resources| as_go_writes(&resources))
        };
        let both = write(overhead)
            .and_then(|overhead| Ok(json!({ "Overhead": overhead, "Resources": write(resources)? })));
        let both = both.map_err(|error| Status::internal(error.to_string()))?;
        self.set_extension(UPDATED_RESOURCES, &both);
        self.update(&["extensions"]).await
    }

    /// Puts an extension of any key and type on record.
    pub fn set_extension(&mut self, key_and_type: (&str, &str), value: &Value) {
        self.record.extensions.extend([extension(key_and_type, value)]);
    }

    /// `Update` with what is on record. Alone of all calls it names no sandboxer.
    pub async fn update(&mut self, fields: &[&str]) -> Result<(), Status> {
        let request = ControllerUpdateRequest {
            sandbox_id: self.id(),
            sandboxer: String::new(),
            sandbox: Some(self.record.clone()),
            fields: fields.iter().map(|field| (*field).to_owned()).collect(),
        };
        self.client.update(request).await.map(drop)
    }

    /// `Stop`. CRI sets no time limit.
    pub async fn stop(&mut self) -> Result<(), Status> {
        let request =
            ControllerStopRequest { sandbox_id: self.id(), timeout_secs: 0, sandboxer: SANDBOXER.to_owned() };
        self.client.stop(request).await.map(drop)
    }

    /// `Shutdown`.
    pub async fn shut_down(&mut self) -> Result<(), Status> {
        let request = ControllerShutdownRequest { sandbox_id: self.id(), sandboxer: SANDBOXER.to_owned() };
        self.client.shutdown(request).await.map(drop)
    }

    fn id(&self) -> String {
        self.record.sandbox_id.clone()
    }
}

fn extension((key, type_url): (&str, &str), value: &Value) -> (String, Any) {
    let any = Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes() };
    (key.to_owned(), any)
}

/// A message of CRI's as Go's `encoding/json` writes it: the fields of Go's structs are `omitempty`.
fn as_go_writes(message: &impl Serialize) -> Result<Value, serde_json::Error> {
    Ok(without_empty(serde_json::to_value(message)?))
}

fn without_empty(value: Value) -> Value {
    let is_empty = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) => false,
    };
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(_, value)| !is_empty(value))
            .map(|(key, value)| (key, without_empty(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_empty).collect(),
        other => other,
    }
}

/// What containerd reads the entry `info` of a verbose status into, before it writes that anew (Go:
/// `podsandboxtypes.SandboxInfo`). A type that Go could not read there would fail `PodSandboxStatus`.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SandboxInfo {
    pub pid: u32,
    pub process_status: String,
    pub net_namespace_closed: bool,
    pub image: String,
    pub snapshot_key: String,
    pub snapshotter: String,
    pub runtime_type: String,
    pub runtime_options: Value,
    pub config: Option<api::PodSandboxConfig>,
    pub runtime_spec: Option<oci_spec::runtime::Spec>,
    pub cni_result: Option<HashMap<String, Value>>,
    pub sandbox_metadata: Option<HashMap<String, Value>>,
    pub overhead: Option<api::ContainerResources>,
    pub resources: Option<api::ContainerResources>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_written_without_what_go_leaves_out() {
        let resources = api::LinuxContainerResources {
            cpu_quota: 150_000,
            hugepage_limits: vec![api::HugepageLimit { page_size: "2MB".to_owned(), limit: 0 }],
            ..Default::default()
        };
        let expected = json!({ "cpu_quota": 150_000, "hugepage_limits": [{ "page_size": "2MB" }] });
        assert_eq!(as_go_writes(&resources).unwrap(), expected);
        // A message that is there and says nothing is written.
        let config = api::PodSandboxConfig {
            linux: Some(api::LinuxPodSandboxConfig::default()),
            ..Default::default()
        };
        assert_eq!(as_go_writes(&config).unwrap(), json!({ "linux": {} }));
    }
}
