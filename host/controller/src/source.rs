//! Where containers come from: the look-up of what a guest only names.

use std::time::Duration;

use async_trait::async_trait;
use pericarp_protos::{
    containerd::{
        containers::{GetContainerRequest, containers_client::ContainersClient},
        snapshots::{MountsRequest, snapshots_client::SnapshotsClient},
    },
    sandbox::{StoreGetRequest, store_client::StoreClient},
};
use thiserror::Error;
use tonic::{Code, Request, Status, transport::Channel};

use crate::{rootfs::Mount, spec};

/// Where CRI keeps what it was asked for (containerd: `internal/cri/labels`, `ContainerMetadataExtension`).
const CRI_RECORD: &str = "io.cri-containerd.container.metadata";

/// How long containerd may take for one answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What is on record about a container.
#[derive(Clone, Debug)]
pub struct ContainerRecord {
    /// The pod that it belongs to.
    pub sandbox: String,
    /// OCI runtime spec (JSON), for the host.
    pub spec: Vec<u8>,
    /// What CRI was asked for (JSON), if it was CRI who made the container.
    pub asked_for: Option<Vec<u8>>,
    /// Which snapshotter holds its root filesystem, for messages.
    pub snapshotter: String,
    /// What its root filesystem is made of.
    pub rootfs: Vec<Mount>,
}

/// The records are not to be had.
#[derive(Debug, Error)]
pub enum SourceError {
    #[error("there is no {id}")]
    NotFound { id: String },
    #[error("containerd does not answer when asked for {what} of {id}")]
    Unavailable {
        what: &'static str,
        id: String,
        #[source]
        source: Box<Status>,
    },
    #[error("containerd's record of container {id} has no usable {what}")]
    Incomplete { what: &'static str, id: String },
}

/// Where containers are on record. Nothing that a guest says is believed without it.
#[async_trait]
pub trait ContainerSource: Send + Sync {
    /// The record of container `id` in a namespace of containerd.
    async fn container(
        &self,
        namespace: &str,
        sandbox: &str,
        id: &str,
    ) -> Result<ContainerRecord, SourceError>;

    /// Whether there is a sandbox `id` in a namespace of containerd: an error if not.
    async fn sandbox(&self, namespace: &str, id: &str) -> Result<(), SourceError>;
}

/// Containers as stock containerd keeps them.
pub struct Containerd {
    channel: Channel,
}

impl Containerd {
    /// Uses a connection that is made when it is first needed, and again when it was lost.
    pub fn new(channel: Channel) -> Containerd {
        Containerd { channel }
    }
}

/// Gives a call up that containerd does not answer: a guest may have caused it, and somebody waits.
async fn within_limit<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))
    })
}

/// Puts containerd's namespace on a request.
pub fn in_namespace<T>(message: T, namespace: &str) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let value = namespace.parse().map_err(|_| Status::invalid_argument("the namespace is not plain text"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

#[async_trait]
impl ContainerSource for Containerd {
    async fn container(
        &self,
        namespace: &str,
        sandbox: &str,
        id: &str,
    ) -> Result<ContainerRecord, SourceError> {
        let failed = |what| {
            move |status: Status| match status.code() {
                Code::NotFound => SourceError::NotFound { id: id.into() },
                _ => SourceError::Unavailable { what, id: id.into(), source: Box::new(status) },
            }
        };
        let incomplete = |what| SourceError::Incomplete { what, id: id.into() };
        let record =
            in_namespace(GetContainerRequest { id: id.into() }, namespace).map_err(failed("the record"))?;
        let mut containers = ContainersClient::new(self.channel.clone());
        let container = within_limit(containers.get(record))
            .await
            .map_err(failed("the record"))?
            .into_inner()
            .container
            .ok_or_else(|| incomplete("record"))?;
        // A guest names what it likes. containerd does work for a snapshot that it is asked for.
        if container.sandbox != sandbox {
            return Err(SourceError::NotFound { id: id.into() });
        }
        let spec = container.spec.ok_or_else(|| incomplete("OCI spec"))?;
        if container.snapshot_key.is_empty() {
            return Err(incomplete("root filesystem"));
        }
        let snapshotter = container.snapshotter;
        let mounts = MountsRequest { snapshotter: snapshotter.clone(), key: container.snapshot_key };
        let mounts = in_namespace(mounts, namespace).map_err(failed("the root filesystem"))?;
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let rootfs = within_limit(snapshots.mounts(mounts))
            .await
            .map_err(failed("the root filesystem"))?
            .into_inner()
            .mounts
            .into_iter()
            .map(|mount| Mount { kind: mount.r#type, source: mount.source, options: mount.options })
            .collect();
        let asked_for = container.extensions.get(CRI_RECORD).map(|record| record.value.clone());
        let spec = match &asked_for {
            Some(record) => spec::restore_limits(spec.value, record),
            None => spec.value,
        };
        Ok(ContainerRecord { sandbox: container.sandbox, spec, asked_for, snapshotter, rootfs })
    }

    async fn sandbox(&self, namespace: &str, id: &str) -> Result<(), SourceError> {
        let failed = |status: Status| match status.code() {
            Code::NotFound => SourceError::NotFound { id: id.into() },
            _ => SourceError::Unavailable { what: "the record", id: id.into(), source: Box::new(status) },
        };
        let request = in_namespace(StoreGetRequest { sandbox_id: id.into() }, namespace).map_err(failed)?;
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
        let containerd = Containerd::new(channel);
        // Time passes when there is nothing else to do.
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let error = containerd.container("k8s.io", "abc", "c1").await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error:?}");
        let error = containerd.sandbox("k8s.io", "abc").await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error:?}");
        assert_eq!(begun.elapsed().as_secs(), 2 * CALL_TIMEOUT.as_secs());
    }
}
