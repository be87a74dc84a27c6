//! What can be wrong with a task call, with the codes that containerd's runc shim answers
//! (containerd: `cmd/containerd-shim-runc-v2/{task,process}`).

use pericarp_protos::{
    id::InvalidId,
    ttrpc::{self, Code},
};

use crate::{
    cgroup::CgroupError, devices::DeviceError, huge_pages::HugePagesError, runtime::RuntimeError, server,
    stdio::StdioError,
};

/// Why a task call failed. Every text names the container.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container or process.
    #[error("{0}: not found")]
    NotFound(String),
    /// The process has ended, so it cannot be signalled.
    #[error("{0}: process already finished: not found")]
    Finished(String),
    /// What was given is no id.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The id is in use.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The call does not fit the state.
    #[error("{subject}: {problem}")]
    State {
        /// The container or process.
        subject: String,
        /// What is in the way.
        problem: &'static str,
    },
    /// The request itself is wrong.
    #[error("{subject}: {problem}")]
    Invalid {
        /// The container or process.
        subject: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The controller could not, or would not, prepare the container.
    #[error("container {id}: the controller cannot prepare it: {source}")]
    Prepare {
        /// The container.
        id: String,
        /// What the controller answered.
        source: ttrpc::Error,
    },
    /// The machine cannot be made to fit new limits; the answer says why.
    #[error("container {id}: the machine cannot be made to fit: {source}")]
    Fit {
        /// The container.
        id: String,
        /// What the controller answered.
        source: ttrpc::Error,
    },
    /// The container's disks are of no use.
    #[error("container {id}: {source}")]
    Disks {
        /// The container.
        id: String,
        /// What went wrong.
        source: DeviceError,
    },
    /// The container cannot have its huge pages.
    #[error("container {id}: {source}")]
    HugePages {
        /// The container.
        id: String,
        /// What went wrong.
        source: HugePagesError,
    },
    /// The container could not be made.
    #[error(
        "container {id}: OCI runtime create failed: unable to start container process: error during container init: {source}"
    )]
    Create {
        /// The container.
        id: String,
        /// What went wrong.
        source: RuntimeError,
    },
    /// The container could not be started.
    #[error("container {id}: OCI runtime start failed: {source}")]
    Start {
        /// The container.
        id: String,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A process could not be made in a running container.
    #[error(
        "container {id}: OCI runtime exec failed: exec failed: unable to start container process: {source}"
    )]
    Exec {
        /// The container.
        id: String,
        /// What went wrong.
        source: RuntimeError,
    },
    /// The streams could not be set up.
    #[error("{subject}: {source}")]
    Stdio {
        /// The container or process.
        subject: String,
        /// What went wrong.
        source: StdioError,
    },
    /// Something is wrong with the container's cgroup.
    #[error("container {id}: {source}")]
    Cgroup {
        /// The container.
        id: String,
        /// What went wrong.
        source: CgroupError,
    },
    /// A system call failed that should not.
    #[error("{subject}: cannot {what}: {source}")]
    System {
        /// The container or process.
        subject: String,
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: std::io::Error,
    },
    /// Checkpoints are not supported.
    #[error("container {0}: checkpoints are not supported")]
    Checkpoint(String),
}

impl TaskError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) | Self::Stdio { source: StdioError::Taken(_), .. } => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Id(_)
            | Self::Invalid { .. }
            | Self::Stdio { source: StdioError::Url(_), .. }
            | Self::Cgroup {
                source: CgroupError::Path(_) | CgroupError::Limits { .. } | CgroupError::Devices { .. },
                ..
            } => Code::INVALID_ARGUMENT,
            Self::Checkpoint(_) => Code::UNIMPLEMENTED,
            Self::Prepare { source: ttrpc::Error::RpcStatus(status), .. }
            | Self::Fit { source: ttrpc::Error::RpcStatus(status), .. } => status.code(),
            Self::Prepare { .. } | Self::Fit { .. } => Code::UNAVAILABLE,
            Self::HugePages { source: HugePagesError::TooFew { .. }, .. } => Code::RESOURCE_EXHAUSTED,
            Self::Create { .. }
            | Self::Exec { .. }
            | Self::Start { .. }
            | Self::Stdio { .. }
            | Self::Cgroup { .. }
            | Self::Disks { .. }
            | Self::HugePages { .. }
            | Self::System { .. } => Code::UNKNOWN,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        // The status's own text, without ttrpc's wrapping of it.
        let message = match &error {
            TaskError::Prepare { id, source: ttrpc::Error::RpcStatus(status) }
            | TaskError::Fit { id, source: ttrpc::Error::RpcStatus(status) } => {
                format!("container {id}: {}", status.message)
            }
            other => other.to_string(),
        };
        server::status(error.code(), message)
    }
}
