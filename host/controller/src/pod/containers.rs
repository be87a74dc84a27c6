//! Containers' file systems: made when the guest asks for a container that containerd knows.

use std::{
    fs::{self, DirBuilder, File, FileType},
    io,
    os::unix::fs::{DirBuilderExt as _, FileTypeExt as _},
    path::{Path, PathBuf},
    time::Instant,
};

use pericarp_protos::ttrpc;
use thiserror::Error;

use super::{Phase, Pod};
use crate::{
    errors::chain,
    machine::file,
    mounts::{self, Access, Mount, MountError},
    source::SourceError,
    spec::{self, Propagation, ReadOnly, Volume},
    undo::Undo,
};

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
    Rootfs(#[from] MountError),
    #[error("volume {source_path} for {destination} does not exist on the host")]
    VolumeMissing { source_path: PathBuf, destination: String },
    #[error("volume {source_path} for {destination} is a {kind}, which cannot reach into a machine")]
    VolumeKind { source_path: PathBuf, destination: String, kind: &'static str },
    #[error("cannot mount volume {source_path} for {destination}")]
    Volume {
        source_path: PathBuf,
        destination: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot make or remove the container's directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
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
            | ContainerError::VolumeMissing { .. }
            | ContainerError::VolumeKind { .. } => Code::INVALID_ARGUMENT,
            ContainerError::Ended | ContainerError::Rootfs(_) => Code::FAILED_PRECONDITION,
            ContainerError::Source(_) | ContainerError::Volume { .. } | ContainerError::Directory { .. } => {
                Code::INTERNAL
            }
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
        let _share = self.share.lock().await;
        let Phase::Running { pid } = self.phase() else { return Err(ContainerError::Ended) };
        let translated = spec::translate(&record.spec, id, pid)?;
        let directory = self.container_directory(id);
        // Mounting may wait for a disk: not on the runtime's own threads.
        let mounted =
            tokio::task::spawn_blocking(move || mount_all(&directory, &record.rootfs, &translated.volumes))
                .await
                .map_err(|_| ContainerError::Ended)?;
        mounted?;
        let elapsed = begun.elapsed();
        self.state().containers.entry(id.to_owned()).or_default().prepare =
            Some(elapsed.as_secs_f64() * 1000.0);
        tracing::info!(pod = self.id, container = id, ?elapsed, "container prepared");
        Ok(translated.spec)
    }

    /// Unmounts what was prepared. A container that was not is no error.
    pub(super) async fn release_container(&self, id: &str) -> Result<(), ContainerError> {
        if !is_id(id) {
            return Err(self.not_of_this_pod(id));
        }
        let _share = self.share.lock().await;
        let directory = self.container_directory(id);
        self.state().containers.remove(id);
        tokio::task::spawn_blocking(move || unmount_all(&directory))
            .await
            .map_err(|_| ContainerError::Ended)?
    }

    fn container_directory(&self, id: &str) -> PathBuf {
        self.directory.join(file::SHARE).join(id)
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

fn mount_all(directory: &Path, rootfs: &[Mount], volumes: &[Volume]) -> Result<(), ContainerError> {
    let mut undo = Undo::default();
    let make = |path: &Path| {
        DirBuilder::new()
            .mode(0o755)
            .create(path)
            .map_err(|source| ContainerError::Directory { path: path.into(), source })
    };
    if directory.exists() {
        // An earlier attempt of the same container: containerd tries again only after it has given up.
        unmount_all(directory)?;
    }
    make(directory)?;
    undo.push("remove a container's file systems", {
        let directory = directory.to_owned();
        move || mounts::unmount_tree(&directory).and_then(|()| mounts::remove_tree(&directory))
    });
    let root = directory.join("rootfs");
    make(&root)?;
    mounts::mount_rootfs(rootfs, &root)?;
    let parent = directory.join("volumes");
    make(&parent)?;
    for volume in volumes {
        mount_volume(volume, &parent.join(volume.index.to_string()))?;
    }
    // All is well: from here it is release or the pod's end that unmounts.
    undo.forget();
    Ok(())
}

fn mount_volume(volume: &Volume, target: &Path) -> Result<(), ContainerError> {
    let (source_path, destination) = (volume.source.clone(), volume.destination.clone());
    let kind = match fs::metadata(&volume.source) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ContainerError::VolumeMissing { source_path, destination });
        }
        Err(source) => return Err(ContainerError::Volume { source_path, destination, source }),
    };
    if let Some(kind) = unservable(kind) {
        return Err(ContainerError::VolumeKind { source_path, destination, kind });
    }
    let made = if kind.is_dir() { fs::create_dir(target) } else { File::create(target).map(drop) };
    let access = match volume.read_only {
        ReadOnly::No => Access::ReadWrite,
        ReadOnly::Top => Access::ReadOnly,
        ReadOnly::Recursive => Access::RecursiveReadOnly,
    };
    made.and_then(|()| {
        mounts::bind(
            &volume.source,
            target,
            volume.recursive,
            access,
            volume.propagation == Propagation::Slave,
        )
    })
    .map_err(|source| ContainerError::Volume { source_path, destination, source })
}

fn unservable(kind: FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_socket() => Some("socket"),
        kind if kind.is_fifo() => Some("FIFO"),
        kind if kind.is_block_device() => Some("block device"),
        kind if kind.is_char_device() => Some("character device"),
        _ => None,
    }
}

fn unmount_all(directory: &Path) -> Result<(), ContainerError> {
    mounts::unmount_tree(directory)
        .and_then(|()| mounts::remove_tree(directory))
        .map_err(|source| ContainerError::Directory { path: directory.into(), source })
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

    #[test]
    fn a_socket_is_refused_as_a_volume_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let volume = Volume {
            index: 0,
            source: path,
            destination: "/run/x.sock".into(),
            recursive: false,
            read_only: ReadOnly::No,
            propagation: Propagation::Private,
        };
        let error = mount_volume(&volume, &directory.path().join("0")).unwrap_err();
        assert!(
            error.to_string().ends_with("for /run/x.sock is a socket, which cannot reach into a machine")
        );
    }

    #[test]
    fn a_missing_volume_is_named_with_its_destination() {
        let volume = Volume {
            index: 0,
            source: "/no/such/volume".into(),
            destination: "/data".into(),
            recursive: false,
            read_only: ReadOnly::No,
            propagation: Propagation::Private,
        };
        let error = mount_volume(&volume, Path::new("/no/such/target")).unwrap_err();
        assert_eq!(error.to_string(), "volume /no/such/volume for /data does not exist on the host");
    }
}
