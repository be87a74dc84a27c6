//! containerd has containers on record: the look-up of what a guest only names.

use std::time::Duration;

use async_trait::async_trait;
use pericarp_protos::{
    containerd::{
        containers::{Container, GetContainerRequest, containers_client::ContainersClient},
        snapshots::{MountsRequest, snapshots_client::SnapshotsClient},
    },
    id::ContainerId,
    sandbox::{StoreGetRequest, store_client::StoreClient},
};
use tonic::{Code, Status, transport::Channel};

use super::{container_record, huge_pages, in_namespace, rootfs};
use crate::{
    host::rootfs::RootFs,
    pod::{
        ports::{ContainerRequest, ContainerSource, SourceError},
        spec::PodSpec,
    },
};

/// Where CRI keeps what it was asked for (containerd: `internal/cri/labels`, `ContainerMetadataExtension`).
const CRI_RECORD: &str = "io.cri-containerd.container.metadata";

/// How long containerd may take for one answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Containers as stock containerd keeps them.
pub struct ContainerdContainers {
    channel: Channel,
}

impl ContainerdContainers {
    /// Uses a connection that is made when it is first needed, and again when it was lost.
    pub fn new(channel: Channel) -> Self {
        Self { channel }
    }

    async fn record(&self, namespace: &str, id: &ContainerId) -> Result<Container, SourceError> {
        let failed = failed("the record", id.as_str());
        let request = GetContainerRequest { id: id.to_string() };
        let request = in_namespace(request, namespace).map_err(failed)?;
        let mut containers = ContainersClient::new(self.channel.clone());
        let response = within_limit(containers.get(request)).await.map_err(failed)?.into_inner();
        response.container.ok_or_else(|| SourceError::Incomplete { what: "record", id: id.to_string() })
    }

    /// The record of a container of this pod.
    async fn record_in_pod(&self, pod: &PodSpec, id: &ContainerId) -> Result<Container, SourceError> {
        let container = self.record(&pod.source_namespace, id).await?;
        if container.sandbox == pod.id.as_str() {
            Ok(container)
        } else {
            Err(SourceError::NotFound { id: id.to_string() })
        }
    }

    /// The id of the sandbox that a container belongs to.
    pub async fn sandbox_of(&self, namespace: &str, id: &ContainerId) -> Result<String, SourceError> {
        Ok(self.record(namespace, id).await?.sandbox)
    }

    async fn root_fs(
        &self,
        pod: &PodSpec,
        id: &ContainerId,
        snapshotter: &str,
        key: String,
    ) -> Result<RootFs, SourceError> {
        if key.is_empty() {
            return Err(SourceError::Incomplete { what: "root file system", id: id.to_string() });
        }
        let failed = failed("the root file system", id.as_str());
        let request = MountsRequest { snapshotter: snapshotter.to_owned(), key };
        let request = in_namespace(request, &pod.source_namespace).map_err(failed)?;
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let response = within_limit(snapshots.mounts(request)).await.map_err(failed)?.into_inner();
        let mounts: Vec<_> = response
            .mounts
            .into_iter()
            .map(|mount| rootfs::Mount { kind: mount.r#type, source: mount.source, options: mount.options })
            .collect();
        rootfs::root_fs(snapshotter, &mounts, pod.id_map).map_err(|error| SourceError::RootFs {
            snapshotter: snapshotter.to_owned(),
            message: error.to_string(),
        })
    }
}

/// Gives a call up that containerd does not answer: a guest may have caused it, and somebody waits.
async fn within_limit<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
    })
}

/// The error of a call to containerd.
fn failed<'a>(what: &'static str, id: &'a str) -> impl Fn(Status) -> SourceError + Copy + 'a {
    move |status| match status.code() {
        Code::NotFound => SourceError::NotFound { id: id.to_owned() },
        _ => SourceError::Unavailable {
            source_name: "containerd",
            what,
            id: id.to_owned(),
            cause: Box::new(status),
        },
    }
}

#[async_trait]
impl ContainerSource for ContainerdContainers {
    async fn container(&self, pod: &PodSpec, id: &ContainerId) -> Result<ContainerRequest, SourceError> {
        // A guest names what it likes. containerd does work for a snapshot that it is asked for.
        let container = self.record_in_pod(pod, id).await?;
        let spec = container
            .spec
            .ok_or_else(|| SourceError::Incomplete { what: "OCI spec", id: id.to_string() })?
            .value;
        let record = container.extensions.get(CRI_RECORD).map(|record| record.value.as_slice());
        let given_devices = record.map(container_record::check).transpose()?;
        let spec = match record {
            Some(record) => huge_pages::restore_limits(spec, record),
            None => spec,
        };
        let rootfs = self.root_fs(pod, id, &container.snapshotter, container.snapshot_key).await?;
        Ok(ContainerRequest { spec, given_devices, rootfs })
    }

    async fn check_container(&self, pod: &PodSpec, id: &ContainerId) -> Result<(), SourceError> {
        self.record_in_pod(pod, id).await.map(drop)
    }

    async fn check_pod(&self, pod: &PodSpec) -> Result<(), SourceError> {
        let failed = failed("the record", pod.id.as_str());
        let request = StoreGetRequest { sandbox_id: pod.id.to_string() };
        let request = in_namespace(request, &pod.source_namespace).map_err(failed)?;
        let mut store = StoreClient::new(self.channel.clone());
        within_limit(store.get(request)).await.map(drop).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use tonic::transport::Endpoint;

    use super::*;

    #[tokio::test]
    async fn a_containerd_that_takes_connections_and_says_nothing_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("containerd.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let channel = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap().connect_lazy();
        let containerd = ContainerdContainers::new(channel);
        let pod = PodSpec::unknown("abc".parse().unwrap(), "k8s.io");
        // Time passes when there is nothing else to do.
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let error = containerd.container(&pod, &"c1".parse().unwrap()).await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error:?}");
        let error = containerd.check_pod(&pod).await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error:?}");
        assert_eq!(begun.elapsed().as_secs(), 2 * CALL_TIMEOUT.as_secs());
    }
}
