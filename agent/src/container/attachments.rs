//! What a container uses of the pod's devices, volumes and huge pages.

use std::sync::Arc;

use oci_spec::runtime::{LinuxResources, Spec};
use pericarp_protos::{host::PrepareContainerResponse, id::ContainerId};

use super::ContainerError;
use crate::pod::{
    ContainerDisks, HugePageReservation, HugePages, HugePagesError, MemoryVolumes, MountedSubPaths,
    MountedVolumes, Volumes, huge_pages,
};

/// What the pod has for its containers.
#[derive(Default)]
pub struct PodStorage {
    volumes: Arc<Volumes>,
    memory_volumes: MemoryVolumes,
    huge_pages: Arc<HugePages>,
}

/// What a container uses of the pod until it is deleted.
pub struct Attachments {
    disks: ContainerDisks,
    volumes: MountedVolumes,
    sub_paths: MountedSubPaths,
    huge_pages: HugePageReservation,
}

impl Attachments {
    /// Reserves the huge pages of a new container, attaches its disks and mounts its volumes and its root. Returns its
    /// spec, changed to use them.
    pub async fn attach(
        id: &ContainerId,
        storage: &PodStorage,
        mut spec: Spec,
        prepared: PrepareContainerResponse,
    ) -> Result<(Self, Spec), ContainerError> {
        let PrepareContainerResponse { disks, memory_volumes, .. } = prepared;
        let reservation = storage.huge_pages.reservation(id.as_str());
        reserve_huge_pages(&reservation, &mut spec)
            .await
            .map_err(|source| ContainerError::HugePages { id: id.to_string(), source })?;
        let sub_paths = storage
            .memory_volumes
            .mount(&mut spec, &memory_volumes)
            .map_err(|source| ContainerError::MemoryVolumes { id: id.to_string(), source })?;
        let (disks, spec) = ContainerDisks::attach(spec, disks)
            .await
            .map_err(|source| ContainerError::Disks { id: id.to_string(), source })?;
        let volumes = storage.volumes.mount(&spec).await;
        Ok((Self { disks, volumes, sub_paths, huge_pages: reservation }, spec))
    }

    /// Changes how many huge pages the container may use. Resources without limits of huge pages change nothing.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), HugePagesError> {
        self.huge_pages.set(resources).await
    }

    /// Unmounts its root and the volumes that no other container uses, frees the huge pages, and detaches the disks.
    pub async fn detach(self) {
        self.volumes.release().await;
        drop(self.sub_paths);
        drop(self.huge_pages);
        self.disks.detach().await;
    }
}

/// Reserves the huge pages that a new container may use, and mounts the volumes of huge pages that its spec names.
async fn reserve_huge_pages(
    reservation: &HugePageReservation,
    spec: &mut Spec,
) -> Result<(), HugePagesError> {
    if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        reservation.set(resources).await?;
    }
    huge_pages::mount_volumes(spec)
}
