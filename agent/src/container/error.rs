//! Why something could not be done to a container or a process.

use std::io;

use crate::{
    launch::LaunchError,
    pod::{DeviceError, HugePagesError, MemoryVolumeError},
    resources::CgroupError,
    stdio::StdioError,
};

/// Why something could not be done to a container or a process. Every text names the container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// There is no such exec.
    #[error("{0}: not found")]
    NotFound(String),
    /// The process has ended, so that it cannot get a signal.
    #[error("{0}: process already finished: not found")]
    Finished(String),
    /// The exec id is in use.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The state of the container or process does not allow the call.
    #[error("{subject}: {problem}")]
    State {
        /// The container or process.
        subject: String,
        /// Why its state does not allow the call.
        problem: &'static str,
    },
    /// The kernel refuses a signal.
    #[error("{subject}: cannot send signal {number}: {reason}")]
    Signal {
        /// The container or process.
        subject: String,
        /// The signal's number.
        number: u32,
        /// What the kernel said.
        reason: &'static str,
    },
    /// The container's disks cannot be attached.
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
    /// The container cannot have its volumes in memory.
    #[error("container {id}: {source}")]
    MemoryVolumes {
        /// The container.
        id: String,
        /// What went wrong.
        source: MemoryVolumeError,
    },
    /// The container could not be created. The text begins like runc's.
    #[error(
        "container {id}: OCI runtime create failed: unable to start container process: error during container \
         init: {source}"
    )]
    Create {
        /// The container.
        id: String,
        /// What went wrong.
        source: LaunchError,
    },
    /// The container could not be started.
    #[error("container {id}: OCI runtime start failed: {source}")]
    Start {
        /// The container.
        id: String,
        /// What went wrong.
        source: io::Error,
    },
    /// A process could not be executed in a running container. The text begins like runc's.
    #[error(
        "container {id}: OCI runtime exec failed: exec failed: unable to start container process: {source}"
    )]
    Exec {
        /// The container.
        id: String,
        /// What went wrong.
        source: LaunchError,
    },
    /// The streams could not be set up.
    #[error("{subject}: {source}")]
    Stdio {
        /// The container or process.
        subject: String,
        /// What went wrong.
        source: StdioError,
    },
    /// Something could not be done to the container's cgroup.
    #[error("container {id}: {source}")]
    Cgroup {
        /// The container.
        id: String,
        /// What went wrong.
        source: CgroupError,
    },
    /// A system call has failed.
    #[error("{subject}: cannot {what}: {source}")]
    System {
        /// The container or process.
        subject: String,
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
}
