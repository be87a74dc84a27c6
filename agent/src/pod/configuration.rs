//! Configures the pod's namespaces: their host name, network and sysctls.

use std::{
    io,
    path::{Path, PathBuf},
};

use pericarp_protos::agent::ConfigureRequest;

use super::{
    network::{self, NetworkError},
    sysctls,
};
use crate::launch::LaunchError;

/// Why the guest cannot be made into the pod.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The guest has been configured before.
    #[error("this guest has already been configured")]
    AlreadyConfigured,
    /// The kernel refuses the host name.
    #[error("cannot set the hostname {0:?}")]
    Hostname(String, #[source] io::Error),
    /// The guest's kernel does not have a sysctl.
    #[error("sysctl {0:?} does not exist in the guest")]
    UnknownSysctl(String),
    /// The kernel refuses the value of a sysctl.
    #[error("cannot set sysctl {key:?} to {value:?}: {source}")]
    Sysctl {
        /// The sysctl's name.
        key: String,
        /// The value that was refused.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// One of the pod's files cannot be written.
    #[error("cannot write {path:?}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The pod's network cannot be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The pod's user namespace, or one that belongs to it, cannot be created or configured.
    #[error("cannot create the pod's namespaces: {0}")]
    Namespaces(#[from] LaunchError),
    /// The shared memory file system cannot be mounted.
    #[error("cannot mount the pod's shared memory: {0}")]
    SharedMemory(io::Error),
    /// The pod's limits cannot be set.
    #[error("cannot limit the pod's tasks: {0}")]
    Limits(io::Error),
}

/// Gives the namespaces of the calling thread the pod's host name, network and sysctls.
pub async fn configure_namespaces(request: &ConfigureRequest) -> Result<(), PodError> {
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(|errno| PodError::Hostname(request.hostname.clone(), errno.into()))?;
    }
    network::configure(request).await?;
    // Sysctls are set last, because some belong to an interface.
    sysctls::set(Path::new("/proc/sys"), &request.sysctls)
}
