//! Containers' file systems: made when the guest asks for a container that containerd knows.

use std::time::Instant;

use pericarp_protos::{host::Disk, id::ContainerId, ttrpc};
use thiserror::Error;

use super::{
    Phase, Pod,
    disks::DiskError,
    guest_errors::{self, GuestError},
    resize::ResizeError,
};
use crate::{
    errors::chain,
    fault,
    guest::Prepared,
    rootfs::ImageLayers,
    share::{Root, Share, ShareError},
    size::Limits,
    source::{ContainerRecord, SourceError},
    spec::{self, HugeDirectory, Translated},
    user_namespace::UserNamespaceError,
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
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    UserNamespace(#[from] UserNamespaceError),
    #[error(transparent)]
    Resize(#[from] ResizeError),
}

impl ContainerError {
    /// For the agent, which hands it on to containerd. All of it goes to the log; the guest gets what it may know.
    pub fn into_status(self, pod: &Pod) -> (ttrpc::Code, String) {
        pod.caused_by_guest(|| {
            tracing::warn!(pod = pod.id, error = chain(&self), "what the guest asks for cannot be done");
        });
        (guest_errors::code(&self), format!("{}: {}", pod.name(), GuestError::from(&self)))
    }
}

impl Pod {
    /// Looks the container up, makes its files and disks appear in the guest, and answers with its spec.
    pub(super) async fn prepare_container(&self, id: &ContainerId) -> Result<Prepared, ContainerError> {
        let begun = Instant::now();
        let record = self.look_up(id).await?;
        let given = record.asked_for.as_ref().map(|asked_for| spec::check_record(asked_for)).transpose()?;
        fault::point("container-looked-up");
        let share = self.share.lock().await;
        let Phase::Running { pid } = self.phase() else { return Err(ContainerError::Ended) };
        let (spec, container) = (record.spec.clone(), id.clone());
        let pod = spec::Pod { machine_pid: pid, id_map: self.id_map, huge_directory: HugeDirectory::at };
        // It may have to ask a file system: not on the runtime's own threads.
        let translated =
            tokio::task::spawn_blocking(move || spec::translate(&spec, &container, &pod, given.as_ref()));
        let translated = translated.await.map_err(|_| ContainerError::Ended)??;
        // An earlier attempt of the same container: containerd tries again only after it has given up.
        self.take_away(id, &share).await?;
        self.fit(id, Limits::of_spec(&record.spec), &share.containers()).await?;
        let disks = match self.make_appear(id, record, &translated, &share).await {
            Ok(disks) => disks,
            Err(error) => {
                self.state().limits.remove(id);
                if let Err(error) = self.take_away(id, &share).await {
                    let error = chain(&error);
                    self.caused_by_guest(|| {
                        tracing::warn!(pod = self.id, container = %id, error, "cannot undo a preparation");
                    });
                }
                return Err(error);
            }
        };
        if !self.knows_container(id.as_str()) {
            self.progress(|progress| progress.add(id.as_str()));
        }
        fault::point("container-prepared");
        let elapsed = begun.elapsed();
        self.state().containers.entry(id.clone()).or_default().prepare = Some(elapsed.as_secs_f64() * 1000.0);
        self.caused_by_guest(|| {
            tracing::info!(pod = self.id, container = %id, ?elapsed, "container prepared");
        });
        Ok(Prepared { spec: translated.spec, disks })
    }

    /// Undoes what was prepared. A container that was not is no error.
    pub(crate) async fn release_container(&self, id: &ContainerId) -> Result<(), ContainerError> {
        let share = self.share.lock().await;
        self.state().containers.remove(id);
        self.state().limits.remove(id);
        if let Err(error) = self.set_oom_score(&self.all_limits()) {
            let error = chain(&error);
            self.caused_by_guest(|| {
                tracing::warn!(pod = self.id, error, "the machine keeps its OOM score");
            });
        }
        self.take_away(id, &share).await?;
        fault::point("container-released");
        Ok(())
    }

    /// A guest's word for a container. What is no id names none.
    pub(super) fn container_id(text: &str) -> Result<ContainerId, ContainerError> {
        text.parse().map_err(|_| Self::not_of_this_pod(text))
    }

    /// What is on record about a container of this pod. Nothing is believed of an id that a guest names.
    pub(super) async fn look_up(&self, id: &ContainerId) -> Result<ContainerRecord, ContainerError> {
        match self.node.source.container(&self.namespace, &self.id, id.as_str()).await {
            Ok(record) if record.sandbox == self.id => Ok(record),
            Ok(_) | Err(SourceError::NotFound { .. }) => Err(Self::not_of_this_pod(id.as_str())),
            Err(error) => Err(error.into()),
        }
    }

    /// Mounts what is mounted and inserts what is a disk.
    async fn make_appear(
        &self,
        id: &ContainerId,
        record: ContainerRecord,
        translated: &Translated,
        share: &Share,
    ) -> Result<Vec<Disk>, ContainerError> {
        let mut disks = Vec::new();
        for (number, volume) in (1..).zip(&translated.disks) {
            disks.push(self.insert_volume(id, number, volume).await?);
        }
        // After the volumes: for them there is no other way.
        let mut root = Root::Mounts { snapshotter: record.snapshotter, mounts: record.rootfs.clone() };
        if let Some(layers) = ImageLayers::of(&record.rootfs)
            && let Some(disk) = self.insert_layers(id, &layers).await?
        {
            disks.push(disk);
            root = Root::Disks(layers.writable);
        }
        let (files, container, volumes) = (share.clone(), id.clone(), translated.volumes.clone());
        let namespace = self.user_namespace()?;
        // Mounting may wait for a disk: not on the runtime's own threads.
        tokio::task::spawn_blocking(move || files.add(&container, &root, &volumes, namespace.as_ref()))
            .await
            .map_err(|_| ContainerError::Ended)??;
        Ok(disks)
    }

    /// Undoes [`Pod::make_appear`], whether or not it was called.
    async fn take_away(&self, id: &ContainerId, share: &Share) -> Result<(), ContainerError> {
        let (files, container) = (share.clone(), id.clone());
        let unmounted = tokio::task::spawn_blocking(move || files.remove_container(&container)).await;
        self.remove_disks(id).await?;
        unmounted.map_err(|_| ContainerError::Ended)?.map_err(ContainerError::from)
    }

    fn not_of_this_pod(id: &str) -> ContainerError {
        // Only a guest that is broken or hostile asks for this.
        let id = id.chars().take(ContainerId::LONGEST).collect();
        ContainerError::NotOfThisPod { id }
    }
}
