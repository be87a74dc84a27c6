//! What a pod needs of those outside: where its containers are on record, and who is told its events.

use std::time::SystemTime;

use async_trait::async_trait;
use pericarp_protos::id::ContainerId;
use thiserror::Error;

use super::spec::PodSpec;
use crate::{
    guest::translate::{self, GivenDevices},
    host::{rootfs::RootFs, size::Limits},
};

/// A container as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerRequest {
    /// OCI runtime spec (JSON), for the host.
    pub spec: Vec<u8>,
    /// The devices of the host that were asked for; `None` if nobody knows what was asked for.
    pub given_devices: Option<GivenDevices>,
    pub rootfs: RootFs,
}

impl ContainerRequest {
    /// What it may use.
    pub fn limits(&self) -> Limits {
        Limits::of_spec(&self.spec)
    }
}

/// A container cannot be looked up.
#[derive(Debug, Error)]
pub enum SourceError {
    #[error("there is no {id}")]
    NotFound { id: String },
    #[error("{source_name} does not answer when asked for {what} of {id}")]
    Unavailable {
        /// Who was asked.
        source_name: &'static str,
        what: &'static str,
        id: String,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the record of container {id} has no usable {what}")]
    Incomplete { what: &'static str, id: String },
    /// Something was asked for that a pod of Pericarp's cannot have.
    #[error(transparent)]
    Refused(#[from] translate::Error),
    /// The root file system is of a kind that cannot be served.
    #[error("{message}")]
    RootFs { snapshotter: String, message: String },
}

/// Where containers are on record. Nothing that a guest says is believed without it.
#[async_trait]
pub trait ContainerSource: Send + Sync {
    /// Looks up a container of this pod. One of another pod does not exist.
    async fn container(&self, pod: &PodSpec, id: &ContainerId) -> Result<ContainerRequest, SourceError>;

    /// Checks that a container of this pod is on record: [`SourceError::NotFound`] if there is none. What it consists
    /// of is not looked up.
    async fn check_container(&self, pod: &PodSpec, id: &ContainerId) -> Result<(), SourceError>;

    /// Whether somebody knows the pod: [`SourceError::NotFound`] if nobody does.
    async fn check_pod(&self, pod: &PodSpec) -> Result<(), SourceError>;
}

/// Something that happened to a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskEvent {
    /// containerd's topic, for example `/tasks/exit`.
    pub topic: String,
    /// When it happened, by the guest's clock.
    pub at: Option<SystemTime>,
    /// The name of the message's type, for example `containerd.events.TaskExit`.
    pub type_url: String,
    /// The message, encoded.
    pub payload: Vec<u8>,
}

/// What became of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It was taken.
    Taken,
    /// It will never be taken, and this is why.
    Refused(String),
    /// It may be taken later; this is why it was not.
    Deferred(String),
}

/// Who is told what happens to containers.
#[async_trait]
pub trait EventSink: Send + Sync {
    async fn deliver(&self, pod: &PodSpec, event: TaskEvent) -> Delivery;
}
