//! Containers' file systems: made when the guest asks for a container that is on record.

use std::time::Instant;

use pericarp_protos::{host::Disk, id::ContainerId};
use thiserror::Error;

use super::{
    Pod,
    disks::DiskError,
    life::PreparedAhead,
    ports::{ContainerRequest, SourceError},
    resize::ResizeError,
    task::PodTask,
};
use crate::{
    fault::FaultPoint,
    guest::{
        service::{AgentFeatures, Prepared},
        translate::{self, HugeDirectory, TranslatedSpec},
    },
    host::{
        empty_dir::MemoryEmptyDir,
        rootfs::RootFs,
        share::{ShareError, SharedRoot},
        user_namespace::UserNamespaceError,
    },
    telemetry::error_chain::chain,
};

/// A container cannot be prepared.
#[derive(Debug, Error)]
pub enum ContainerError {
    #[error("there is no container {id:?} in this pod")]
    NotOfThisPod { id: String },
    #[error("the pod is being taken down")]
    Ended,
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Spec(#[from] translate::Error),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(
        "the machine has no free slot for the image layers of the container; use fewer raw block volumes or containers"
    )]
    NoSlotForLayers,
    #[error(
        "the agent of this pod is of an earlier version, which cannot map the ids of image layers; replace the pod"
    )]
    UnmappedLayers,
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    #[error(transparent)]
    Resize(#[from] ResizeError),
}

/// Reads a guest's word for a container. What is not an id names none.
pub(super) fn container_id(text: &str) -> Result<ContainerId, ContainerError> {
    text.parse().map_err(|_| not_of_this_pod(text))
}

fn not_of_this_pod(id: &str) -> ContainerError {
    // Only a guest that is broken or hostile asks for this.
    let id = id.chars().take(ContainerId::LONGEST).collect();
    ContainerError::NotOfThisPod { id }
}

impl Pod {
    /// What is on record about a container of this pod. Nothing is believed of an id that a guest names.
    pub(super) async fn look_up(&self, id: &ContainerId) -> Result<ContainerRequest, ContainerError> {
        match self.environment.containers.container(&self.spec, id).await {
            Err(SourceError::NotFound { .. }) => Err(not_of_this_pod(id.as_str())),
            request => Ok(request?),
        }
    }
}

/// Containers of a pod that are prepared and that no guest has asked for yet.
const AHEAD_MAX: usize = 32;

impl PodTask {
    /// Prepares a container, or returns what was prepared of it already.
    pub(super) async fn prepare_for_guest(
        &mut self,
        id: &ContainerId,
        request: ContainerRequest,
        agent: AgentFeatures,
    ) -> Result<Prepared, ContainerError> {
        let running = self.life.running_mut().ok_or(ContainerError::Ended)?;
        running.agent = agent;
        match running.prepared_ahead.remove(id) {
            Some(ahead) if ahead.request == request && ahead.agent == agent => {
                // What the pod may use may have changed meanwhile.
                if let Err(error) = self.fit_limits(id, request.limits()).await {
                    // The guest does not release what it was not given.
                    self.release_or_report(id).await;
                    return Err(error);
                }
                Ok(ahead.prepared)
            }
            _ => self.prepare(id, request, agent).await,
        }
    }

    /// Prepares a container that its guest will ask for.
    pub(super) async fn prepare_ahead(&mut self, id: ContainerId, request: ContainerRequest) {
        // The guest may have been quicker.
        let is_known = self.pod.status.borrow().containers.contains_key(&id);
        let Some(running) = self.life.running() else { return };
        if is_known || running.prepared_ahead.len() >= AHEAD_MAX {
            return;
        }
        let agent = running.agent;
        match self.prepare(&id, request.clone(), agent).await {
            Ok(prepared) => {
                if let Some(running) = self.life.running_mut() {
                    running.prepared_ahead.insert(id, PreparedAhead { request, agent, prepared });
                }
            }
            // The guest will be told, if it asks.
            Err(error) => {
                let error = chain(&error);
                tracing::debug!(pod = self.pod.id(), container = %id, error, "a new container cannot be prepared");
            }
        }
    }

    /// Releases a container that its source has deleted, whatever has become of it: its guest may never have asked for
    /// it, or may have given up.
    pub(super) async fn release_deleted(&mut self, id: &ContainerId) {
        self.pod.note_progress(|progress| progress.forget(id.as_str()));
        self.release_or_report(id).await;
    }

    async fn release_or_report(&mut self, id: &ContainerId) {
        if let Err(error) = self.release(id).await {
            let error = chain(&error);
            let pod = self.pod.id();
            tracing::warn!(pod, container = %id, error, "cannot release a container");
        }
    }

    /// Makes a container's files and disks appear in the guest, and returns its spec.
    pub(super) async fn prepare(
        &mut self,
        id: &ContainerId,
        request: ContainerRequest,
        agent: AgentFeatures,
    ) -> Result<Prepared, ContainerError> {
        let begun = Instant::now();
        FaultPoint::ContainerLookedUp.reached();
        let machine_pid = self.life.running().ok_or(ContainerError::Ended)?.pid;
        let limits = request.limits();
        let ContainerRequest { spec, given_devices, rootfs } = request;
        let of_pod = translate::Pod {
            machine_pid,
            id_map: self.pod.spec.id_map,
            huge_directory: HugeDirectory::at,
            uid: self.pod.spec.uid.clone(),
            memory_empty_dir: if agent.memory_volumes { MemoryEmptyDir::at } else { |_, _| Ok(None) },
        };
        let container = id.clone();
        // It may have to ask a file system.
        let translated = self
            .pod
            .blocking
            .run(move || translate::translate(&spec, &container, &of_pod, given_devices.as_ref()))
            .await?;
        // An earlier attempt of the same container: containerd tries again only after it has given up.
        self.remove_files(id).await?;
        self.remove_unrecorded_disks().await;
        self.fit_limits(id, limits).await?;
        let disks = match self.add_files(id, rootfs, &translated, agent).await {
            Ok(disks) => disks,
            Err(error) => {
                self.forget_limits(id);
                // The machine may have inserted what it has not answered in time.
                self.has_unrecorded_disks |= matches!(error, ContainerError::Disk(_));
                if let Err(error) = self.remove_files(id).await {
                    let error = chain(&error);
                    self.pod.caused_by_guest(|| {
                        let container = id.as_str();
                        tracing::warn!(pod = self.pod.id(), container, error, "cannot undo a preparation");
                    });
                }
                return Err(error);
            }
        };
        if !self.pod.progress.knows(id.as_str()) {
            self.pod.note_progress(|progress| progress.add(id.as_str()));
        }
        FaultPoint::ContainerPrepared.reached();
        let elapsed_ms = begun.elapsed().as_secs_f64() * 1000.0;
        self.publish(|status| status.containers.entry(id.clone()).or_default().prepare = Some(elapsed_ms));
        self.pod.caused_by_guest(|| {
            tracing::info!(pod = self.pod.id(), container = id.as_str(), elapsed_ms, "container prepared");
        });
        Ok(Prepared { spec: translated.spec, disks, memory_volumes: translated.memory_volumes })
    }

    /// Undoes what was prepared, if it was.
    pub(super) async fn release(&mut self, id: &ContainerId) -> Result<(), ContainerError> {
        self.publish(|status| {
            status.containers.remove(id);
        });
        self.forget_limits(id);
        if let Some(running) = self.life.running_mut() {
            running.prepared_ahead.remove(id);
        }
        if let Err(error) = self.set_oom_score(&self.all_limits()) {
            let error = chain(&error);
            self.pod.caused_by_guest(|| {
                tracing::warn!(pod = self.pod.id(), error, "the machine keeps its OOM score");
            });
        }
        self.remove_files(id).await?;
        self.remove_unrecorded_disks().await;
        FaultPoint::ContainerReleased.reached();
        Ok(())
    }

    /// Takes disks out of the machine that are no container's, if it may have some. What cannot be done is tried again
    /// with the next container.
    pub(super) async fn remove_unrecorded_disks(&mut self) {
        if !self.has_unrecorded_disks {
            return;
        }
        match self.pod.remove_unrecorded_disks().await {
            Ok(()) => self.has_unrecorded_disks = false,
            Err(error) => {
                let error = chain(&error);
                self.pod.caused_by_guest(|| {
                    tracing::warn!(pod = self.pod.id(), error, "a machine may keep a disk that nobody uses");
                });
            }
        }
    }

    /// Mounts what is mounted and inserts what is a disk.
    async fn add_files(
        &mut self,
        id: &ContainerId,
        rootfs: RootFs,
        translated: &TranslatedSpec,
        agent: AgentFeatures,
    ) -> Result<Vec<Disk>, ContainerError> {
        if !agent.maps_layers && matches!(&rootfs, RootFs::Images { layers, .. } if layers.map_ids) {
            return Err(ContainerError::UnmappedLayers);
        }
        let pod = &self.pod;
        let mut disks = Vec::new();
        for (number, volume) in (1..).zip(&translated.disks) {
            disks.push(pod.insert_volume(id, number, volume).await?);
        }
        // After the volumes: for them there is no other way.
        let root = match rootfs {
            RootFs::Mounted(mount) => SharedRoot::Mounted(mount),
            RootFs::Images { layers, mounted } => {
                match (pod.insert_layers(id, &layers, mounted.is_some()).await?, mounted) {
                    (Some(disk), _) => {
                        disks.push(disk);
                        SharedRoot::Disks(layers.writable)
                    }
                    (None, Some(mount)) => SharedRoot::Mounted(mount),
                    (None, None) => return Err(ContainerError::NoSlotForLayers),
                }
            }
        };
        let (share, container, volumes) = (pod.share(), id.clone(), translated.volumes.clone());
        let namespace = pod.user_namespace().await?;
        // Mounting may wait for a server.
        pod.blocking.run(move || share.add(&container, &root, &volumes, namespace.as_ref())).await?;
        Ok(disks)
    }

    /// Undoes [`PodTask::add_files`], whether or not it was called.
    async fn remove_files(&self, id: &ContainerId) -> Result<(), ContainerError> {
        let (share, container) = (self.pod.share(), id.clone());
        let unmounted = self.pod.blocking.run(move || share.remove_container(&container)).await;
        self.pod.remove_disks(id).await?;
        Ok(unmounted?)
    }
}

#[cfg(test)]
#[path = "containers_tests.rs"]
mod tests;
