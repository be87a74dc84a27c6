//! Why a task call has failed, with the codes that containerd's runc shim returns (containerd:
//! `cmd/containerd-shim-runc-v2/{task,process}`).

use pericarp_protos::{
    id::InvalidId,
    ttrpc::{self, Code},
};

use crate::{
    container::ContainerError, pod::HugePagesError, resources::CgroupError, stdio::StdioError, ttrpc::status,
};

/// Why a task call has failed. Every text names the container.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// There is no such container.
    #[error("{0}: not found")]
    NotFound(String),
    /// The container's id is malformed.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The container's id is in use.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The pod has not been configured, so that it cannot have containers yet.
    #[error("{0}: the pod has not been configured")]
    NotConfigured(String),
    /// The request is invalid.
    #[error("{subject}: {problem}")]
    Invalid {
        /// The container or process.
        subject: String,
        /// What is wrong with the request.
        problem: String,
    },
    /// The controller cannot prepare the container, or refuses to.
    #[error("container {id}: the controller cannot prepare it: {source}")]
    Prepare {
        /// The container.
        id: String,
        /// The controller's error.
        source: ttrpc::Error,
    },
    /// The machine cannot be resized for new limits.
    #[error("container {id}: the machine cannot be made to fit: {source}")]
    Resize {
        /// The container.
        id: String,
        /// The controller's error.
        source: ttrpc::Error,
    },
    /// Something could not be done to the container or process.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Checkpoints are not supported.
    #[error("container {0}: checkpoints are not supported")]
    Checkpoint(String),
}

impl TaskError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::NotConfigured(_) => Code::FAILED_PRECONDITION,
            Self::Id(_) | Self::Invalid { .. } => Code::INVALID_ARGUMENT,
            Self::Checkpoint(_) => Code::UNIMPLEMENTED,
            Self::Prepare { source: ttrpc::Error::RpcStatus(status), .. }
            | Self::Resize { source: ttrpc::Error::RpcStatus(status), .. } => status.code(),
            Self::Prepare { .. } | Self::Resize { .. } => Code::UNAVAILABLE,
            Self::Container(error) => container_code(error),
        }
    }
}

fn container_code(error: &ContainerError) -> Code {
    match error {
        ContainerError::NotFound(_) | ContainerError::Finished(_) => Code::NOT_FOUND,
        ContainerError::AlreadyExists(_) | ContainerError::Stdio { source: StdioError::InUse(_), .. } => {
            Code::ALREADY_EXISTS
        }
        ContainerError::State { .. } => Code::FAILED_PRECONDITION,
        ContainerError::Signal { .. }
        | ContainerError::Stdio { source: StdioError::Url(_), .. }
        | ContainerError::Cgroup {
            source: CgroupError::Path(_) | CgroupError::Limits { .. } | CgroupError::Devices { .. },
            ..
        } => Code::INVALID_ARGUMENT,
        ContainerError::HugePages { source: HugePagesError::TooFew { .. }, .. } => Code::RESOURCE_EXHAUSTED,
        ContainerError::Create { .. }
        | ContainerError::Exec { .. }
        | ContainerError::Start { .. }
        | ContainerError::Stdio { .. }
        | ContainerError::Cgroup { .. }
        | ContainerError::Disks { .. }
        | ContainerError::HugePages { .. }
        | ContainerError::MemoryVolumes { .. }
        | ContainerError::System { .. } => Code::UNKNOWN,
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        // The text of the controller's status, without ttrpc's description of the status.
        let message = match &error {
            TaskError::Prepare { id, source: ttrpc::Error::RpcStatus(status) }
            | TaskError::Resize { id, source: ttrpc::Error::RpcStatus(status) } => {
                format!("container {id}: {}", status.message)
            }
            other => other.to_string(),
        };
        status(error.code(), message)
    }
}
