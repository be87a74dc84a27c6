//! The pod that this guest is: its configuration, network, volumes and devices.
//!
//! The pod's network, IPC and UTS namespaces are the guest's own, because the machine is the pod. Only a pod with a
//! user namespace has namespaces of its own, which belong to that user namespace.

mod configuration;
pub mod devices;
mod files;
pub mod huge_pages;
mod memory_volumes;
pub mod namespaces;
mod network;
pub mod port_forward;
mod sysctls;
mod volumes;

use std::{
    future::pending,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use pericarp_protos::{
    agent::ConfigureRequest,
    guest::{CGROUP_PARENT, ETC_DIR},
};
use protobuf::Message as _;
use tokio::sync::watch;

pub use self::{
    configuration::PodError,
    devices::{ContainerDisks, DeviceError},
    huge_pages::{HugePageReservation, HugePages, HugePagesError},
    memory_volumes::{MemoryVolumeError, MemoryVolumes, MountedSubPaths},
    volumes::{MountedVolumes, Volumes},
};
use crate::{
    init,
    launch::{self, Action, Descriptors, LaunchError, Reaper, Request},
    resources,
};

/// Whose network, IPC and UTS namespaces the pod has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// The guest's.
    Guest,
    /// Its own, which belong to its user namespace.
    Own,
}

/// The pod that this guest is.
#[derive(Default)]
pub struct Pod {
    reaper: Arc<Reaper>,
    configure_called: AtomicBool,
    configured: watch::Sender<Option<Namespaces>>,
    share: OnceLock<Result<(), String>>,
}

impl Pod {
    /// A guest that has not been configured yet.
    pub fn new(reaper: Arc<Reaper>) -> Arc<Self> {
        Arc::new(Self { reaper, ..Self::default() })
    }

    /// Whether [`Self::configure`] has succeeded, so that containers may be created.
    pub fn is_configured(&self) -> bool {
        self.configured.borrow().is_some()
    }

    /// Waits until [`Self::configure`] has succeeded; returns `None` if it never will.
    pub async fn wait_until_configured(&self) -> Option<Namespaces> {
        *self.configured.subscribe().wait_for(Option::is_some).await.ok()?
    }

    /// Mounts the pod's share, which has the containers' files. Only the first call does; the others return its result.
    pub fn mount_share(&self) -> Result<(), String> {
        // In tests the agent is not PID 1, and there is no share.
        let mount = || if std::process::id() == 1 { init::mount_share() } else { Ok(()) };
        self.share.get_or_init(|| mount().map_err(|error| error.to_string())).clone()
    }

    /// Mounts the share when the pod has been configured and nobody waits for it: the device needs some time.
    pub async fn mount_share_when_idle(self: Arc<Self>) {
        if self.wait_until_configured().await.is_some() {
            tokio::task::yield_now().await;
            if let Err(error) = self.mount_share() {
                tracing::error!("{error}");
            }
        }
    }

    /// Makes the guest into the pod that the controller describes. This can be done only once.
    pub async fn configure(&self, request: &ConfigureRequest) -> Result<(), PodError> {
        if self.configure_called.swap(true, Ordering::Relaxed) {
            return Err(PodError::AlreadyConfigured);
        }
        resources::limit_pod_tasks(CGROUP_PARENT, request.tasks_max).map_err(PodError::Limits)?;
        files::write(Path::new(ETC_DIR), request)?;
        files::mount_shared_memory(request).map_err(PodError::SharedMemory)?;
        let namespaces = if request.user_namespace.is_some() {
            self.create_namespaces(request).await?;
            Namespaces::Own
        } else {
            configuration::configure_namespaces(request).await?;
            Namespaces::Guest
        };
        self.configured.send_replace(Some(namespaces));
        Ok(())
    }

    /// Has a helper create and configure the pod's namespaces, because this process must stay in its own.
    async fn create_namespaces(&self, request: &ConfigureRequest) -> Result<(), LaunchError> {
        let request = request.write_to_bytes().map_err(io::Error::other)?;
        let request = Request {
            id: String::new(),
            directory: PathBuf::from(ETC_DIR),
            action: Action::PodNamespaces(request),
        };
        launch::launch(&self.reaper, &request, Descriptors::null()?, pending()).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_is_configured_only_once() {
        let pod = Pod::default();
        pod.configure_called.store(true, Ordering::Relaxed);
        assert!(matches!(pod.configure(&ConfigureRequest::new()).await, Err(PodError::AlreadyConfigured)));
    }
}
