//! From the kernel's first user-space instruction to a guest in which the agent can serve.
//!
//! Every system call here delays the start of every pod.

mod limits;
mod loopback;
mod mounts;

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};

pub use self::{loopback::bring_loopback_up, mounts::mount_share};

/// Where [`prepare`] puts the agent's binary in the guest's root.
pub const AGENT_PATH: &str = "/pericarp-agent";

/// The number of descriptors to which a container may raise its limit; the same as systemd's limit for services.
const DESCRIPTOR_LIMIT: u64 = 524_288;

/// A step of the boot that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}: {source}")]
pub struct BootError {
    what: String,
    source: io::Error,
}

impl BootError {
    fn new(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { what: what.into(), source }
    }
}

/// Prepares the guest: file systems, cgroups, loopback interface, limits.
pub fn prepare() -> Result<(), BootError> {
    mounts::move_to_new_root()?;
    mounts::mount_file_systems()?;
    bring_loopback_up().map_err(BootError::new("bring the loopback interface up"))?;
    let limit = Rlimit { current: Some(DESCRIPTOR_LIMIT), maximum: Some(DESCRIPTOR_LIMIT) };
    setrlimit(Resource::Nofile, limit)
        .map_err(|errno| BootError::new("raise the limit of open files")(errno.into()))?;
    limits::raise()?;
    std::fs::write("/proc/self/oom_score_adj", "-1000")
        .map_err(BootError::new("protect the agent from the OOM killer"))
}
