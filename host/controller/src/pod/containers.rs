//! Containers' file systems: made when the guest asks for a container that containerd knows.

use std::time::Instant;

use pericarp_protos::ttrpc;
use thiserror::Error;

use super::{Phase, Pod};
use crate::{errors::chain, share::ShareError, source::SourceError, spec};

/// Longest id that containerd gives (`identifiers.Validate`).
const ID_MAX: usize = 76;

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
}

impl ContainerError {
    /// For the agent, which hands it on to containerd.
    pub fn into_status(self, pod: &Pod) -> (ttrpc::Code, String) {
        use ttrpc::Code;
        let code = match &self {
            ContainerError::NotOfThisPod { .. } | ContainerError::Source(SourceError::NotFound { .. }) => {
                Code::NOT_FOUND
            }
            ContainerError::Source(SourceError::Unavailable { .. }) => Code::UNAVAILABLE,
            ContainerError::Spec(_)
            | ContainerError::Share(ShareError::VolumeMissing { .. } | ShareError::VolumeKind { .. }) => {
                Code::INVALID_ARGUMENT
            }
            ContainerError::Ended | ContainerError::Share(ShareError::Root(_)) => Code::FAILED_PRECONDITION,
            ContainerError::Source(_) | ContainerError::Share(_) => Code::INTERNAL,
        };
        (code, format!("{}: {}", pod.name(), chain(&self)))
    }
}

impl Pod {
    /// Looks the container up, mounts what it needs below the share, and answers with its spec.
    pub(super) async fn prepare_container(&self, id: &str) -> Result<Vec<u8>, ContainerError> {
        let begun = Instant::now();
        if !is_id(id) {
            return Err(self.not_of_this_pod(id));
        }
        let record = match self.node.source.container(&self.namespace, id).await {
            Ok(record) if record.sandbox == self.id => record,
            Ok(_) | Err(SourceError::NotFound { .. }) => return Err(self.not_of_this_pod(id)),
            Err(error) => return Err(error.into()),
        };
        let share = self.share.lock().await;
        let Phase::Running { pid } = self.phase() else { return Err(ContainerError::Ended) };
        let translated = spec::translate(&record.spec, id, pid)?;
        if !self.knows_container(id) {
            self.progress(|progress| progress.add(id));
        }
        let (files, container) = (share.clone(), id.to_owned());
        // Mounting may wait for a disk: not on the runtime's own threads.
        tokio::task::spawn_blocking(move || {
            // An earlier attempt of the same container: containerd tries again only after it has given up.
            files.remove_container(&container)?;
            files.add(&container, &record.snapshotter, &record.rootfs, &translated.volumes)
        })
        .await
        .map_err(|_| ContainerError::Ended)??;
        let elapsed = begun.elapsed();
        self.state().containers.entry(id.to_owned()).or_default().prepare =
            Some(elapsed.as_secs_f64() * 1000.0);
        tracing::info!(pod = self.id, container = id, ?elapsed, "container prepared");
        Ok(translated.spec)
    }

    /// Unmounts what was prepared. A container that was not is no error.
    pub(crate) async fn release_container(&self, id: &str) -> Result<(), ContainerError> {
        if !is_id(id) {
            return Err(self.not_of_this_pod(id));
        }
        let share = self.share.lock().await;
        self.state().containers.remove(id);
        let (files, container) = (share.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || files.remove_container(&container))
            .await
            .map_err(|_| ContainerError::Ended)?
            .map_err(ContainerError::from)
    }

    fn not_of_this_pod(&self, id: &str) -> ContainerError {
        // Only a guest that is broken or hostile asks for this.
        let id: String = id.chars().take(ID_MAX).collect();
        tracing::warn!(pod = self.id, container = ?id, "guest asks for a container that is not its own");
        ContainerError::NotOfThisPod { id }
    }
}

/// Whether a guest's word may be an id: one path component, and none of the special ones.
fn is_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphanumeric())
        && id.len() <= ID_MAX
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_plain_path_component() {
        for id in ["a", "0123abcdef", "web-1_x.y"] {
            assert!(is_id(id), "{id}");
        }
        for id in ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a\0b", "a b", &"x".repeat(77)] {
            assert!(!is_id(id), "{id:?}");
        }
    }
}
