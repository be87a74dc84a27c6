//! Devices that are added while the guest runs: disks for containers, processors, and memory.

mod guest_devices;
mod layers;
mod node;
mod partitions;
mod processors;
mod slot;

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use oci_spec::runtime::Spec;
use pericarp_protos::{
    agent::{ResizeRequest, ResizeResponse},
    guest::USER_NAMESPACE,
    host::{Disk, Layers, disk::Use},
};
use rustix::mount::{UnmountFlags, unmount};

use self::{
    layers::{Lower, WritableLayer},
    slot::BlockDevice,
};

/// Why a device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver refuses the device in a slot.
    #[error("cannot {what} the device in slot {slot}: {source}")]
    Driver {
        /// "bind" or "unbind".
        what: &'static str,
        /// The slot.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device in a slot is not a block device.
    #[error("the device in slot {slot} is no disk: {source}")]
    NoDisk {
        /// The slot.
        slot: u32,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel refuses a partition of a disk.
    #[error("cannot make part {number} of the disk in slot {slot}: {source}")]
    Part {
        /// The slot.
        slot: u32,
        /// The partition's number, from 1.
        number: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// An image layer cannot be mounted.
    #[error("cannot mount the image layer on {layer:?}: {source}")]
    Image {
        /// Its block device.
        layer: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The overlay of the layers cannot be mounted.
    #[error("cannot mount the overlay of the container's layers: {source}")]
    Overlay {
        /// What the kernel said.
        source: io::Error,
    },
    /// The ids of the layers are to be mapped, and the pod's user namespace cannot be opened.
    #[error("cannot open the pod's user namespace, by which the ids of image layers are mapped: {source}")]
    NoUserNamespace {
        /// What went wrong.
        source: io::Error,
    },
    /// A directory cannot be created.
    #[error("cannot create {path:?}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The spec does not have a root that the layers could replace.
    #[error("the spec has no root")]
    NoRoot,
    /// The guest's devices cannot be listed.
    #[error("cannot list the guest's devices: {0}")]
    List(io::Error),
    /// The layers have only one of upper and work directory.
    #[error("layers need both an upper and a work directory, or neither")]
    HalfWritable,
    /// The spec does not have the device that a disk is for.
    #[error("the spec has no block device {0:?}")]
    NoNode(String),
    /// The processors cannot be listed.
    #[error("cannot list the guest's processors: {0}")]
    Processors(io::Error),
    /// A processor cannot be brought online or taken offline.
    #[error("processor {number}: cannot {what}: {source}")]
    Processor {
        /// Its number.
        number: u32,
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread that works on the devices has panicked.
    #[error("a device's work was not done")]
    Lost,
}

/// How to undo one step of attaching a container's disks.
#[derive(Debug)]
enum UndoStep {
    /// Unbinds the driver from a slot.
    Unbind(u32),
    DeletePartition(PathBuf, u32),
    Unmount(PathBuf),
    /// Removes a directory and the empty directories in it.
    RemoveDirectory(PathBuf),
}

impl UndoStep {
    fn run(self) {
        let result = match &self {
            Self::Unbind(slot) => slot::unbind(*slot).map_err(io::Error::other),
            Self::DeletePartition(disk, number) => partitions::delete(disk, *number),
            Self::Unmount(target) => unmount(target, UnmountFlags::NOFOLLOW)
                .or_else(|error| {
                    tracing::warn!(target = %target.display(), %error, "still in use; unmounting it lazily");
                    unmount(target, UnmountFlags::DETACH)
                })
                .map_err(io::Error::from),
            Self::RemoveDirectory(directory) => remove_directories(directory),
        };
        if let Err(error) = result {
            tracing::warn!(step = ?self, %error, "a step of detaching a container's disks has failed");
        }
    }
}

/// Removes a directory and the empty directories in it. Never removes a file, in case a file system is still mounted
/// there.
fn remove_directories(directory: &PathBuf) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        fs::remove_dir(entry?.path())?;
    }
    fs::remove_dir(directory)
}

/// The disks of one container, attached to the guest.
#[derive(Debug, Default)]
pub struct ContainerDisks(Mutex<Vec<UndoStep>>);

impl ContainerDisks {
    /// Attaches the disks and changes the container's spec to use them. Adds the guest's devices to the spec of a
    /// privileged container. If a step fails, all steps before it are undone.
    pub async fn attach(mut spec: Spec, disks: Vec<Disk>) -> Result<(Self, Spec), DeviceError> {
        if disks.is_empty() {
            guest_devices::add(&mut spec)?;
            return Ok((Self::default(), spec));
        }
        // On another thread, because this waits for the disks.
        let attached = tokio::task::spawn_blocking(move || {
            let mut undo = Vec::new();
            // The guest's devices come last, so that none takes the path of one of the container's own.
            match attach(&mut spec, &disks, &mut undo).and_then(|()| guest_devices::add(&mut spec)) {
                Ok(()) => Ok((Self(Mutex::new(undo)), spec)),
                Err(error) => {
                    undo_all(undo);
                    Err(error)
                }
            }
        });
        attached.await.unwrap_or(Err(DeviceError::Lost))
    }

    /// Detaches the disks. Does nothing when it is called again.
    pub async fn detach(&self) {
        let undo = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !undo.is_empty() && tokio::task::spawn_blocking(move || undo_all(undo)).await.is_err() {
            tracing::warn!("a container's disks are not detached");
        }
    }
}

fn undo_all(undo: Vec<UndoStep>) {
    undo.into_iter().rev().for_each(UndoStep::run);
}

fn attach(spec: &mut Spec, disks: &[Disk], undo: &mut Vec<UndoStep>) -> Result<(), DeviceError> {
    let mut lower = Vec::new();
    let mut layers: Option<&Layers> = None;
    for disk in disks {
        slot::bind(disk.device)?;
        undo.push(UndoStep::Unbind(disk.device));
        let device = BlockDevice::of_slot(disk.device)?;
        match &disk.use_ {
            Some(Use::Layers(found)) => {
                layers = layers.or(Some(found));
                lower.extend(layer_nodes(disk, &device, undo)?);
            }
            Some(Use::Node(node)) => {
                let numbers =
                    device.numbers().map_err(|source| DeviceError::NoDisk { slot: disk.device, source })?;
                node::set_numbers(spec, &node.path, numbers)?;
            }
            // A newer controller may know other uses. The agent ignores them.
            Some(_) | None => {}
        }
    }
    match layers {
        Some(layers) => set_layered_root(spec, layers, &lower, undo),
        None => Ok(()),
    }
}

/// The block devices of a disk's layers.
fn layer_nodes(
    disk: &Disk,
    device: &BlockDevice,
    undo: &mut Vec<UndoStep>,
) -> Result<Vec<PathBuf>, DeviceError> {
    if disk.parts.is_empty() {
        return Ok(vec![device.node()]);
    }
    let mut nodes = Vec::with_capacity(disk.parts.len());
    for (number, part) in (1..).zip(&disk.parts) {
        partitions::add(&device.node(), number, part).map_err(|source| DeviceError::Part {
            slot: disk.device,
            number,
            source,
        })?;
        undo.push(UndoStep::DeletePartition(device.node(), number));
        nodes.push(device.partition_node(number));
    }
    Ok(nodes)
}

/// Mounts the layers and makes them the spec's root.
fn set_layered_root(
    spec: &mut Spec,
    layers: &Layers,
    lower: &[PathBuf],
    undo: &mut Vec<UndoStep>,
) -> Result<(), DeviceError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let writable = match (layers.upper.as_str(), layers.work.as_str()) {
        ("", "") => None,
        ("", _) | (_, "") => return Err(DeviceError::HalfWritable),
        (upper, work) => Some(WritableLayer { upper, work }),
    };
    let root = spec.root_mut().as_mut().ok_or(DeviceError::NoRoot)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let user_namespace = layers.map_ids.then(|| File::open(USER_NAMESPACE)).transpose();
    let user_namespace = user_namespace.map_err(|source| DeviceError::NoUserNamespace { source })?;
    let lower = Lower { layers: lower, user_namespace: user_namespace.as_ref() };
    root.set_path(layers::mount_root(number, &lower, writable.as_ref(), undo)?);
    Ok(())
}

/// Brings processors and memory online or takes them offline, as `Agent.Resize` requests.
pub async fn resize(request: ResizeRequest) -> Result<ResizeResponse, DeviceError> {
    let resized = tokio::task::spawn_blocking(move || {
        if let Some(slot) = request.memory_device {
            slot::bind(slot)?;
        }
        let mut response = ResizeResponse::new();
        response.vcpus = match request.vcpus {
            0 => processors::count_online()?,
            count => processors::set_online(count)?,
        };
        Ok(response)
    });
    resized.await.unwrap_or(Err(DeviceError::Lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_container_without_disks_keeps_its_spec() {
        let spec = Spec::default();
        let (disks, same) = ContainerDisks::attach(spec.clone(), Vec::new()).await.unwrap();
        assert_eq!(same, spec);
        disks.detach().await;
    }

    #[tokio::test]
    async fn a_slot_that_cannot_be_bound_is_named() {
        let mut disk = Disk::new();
        disk.device = 4_000_000;
        let error = ContainerDisks::attach(Spec::default(), vec![disk]).await.unwrap_err();
        assert!(error.to_string().contains("4000000"), "{error}");
    }

    #[test]
    fn a_directory_is_removed_only_if_it_holds_nothing_but_directories() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("7");
        fs::create_dir_all(path.join("root")).unwrap();
        fs::create_dir_all(path.join("0")).unwrap();
        remove_directories(&path).unwrap();
        assert!(!path.exists());
        fs::create_dir_all(path.join("root/file")).unwrap();
        assert!(remove_directories(&path).is_err());
        assert!(path.join("root/file").exists());
    }
}
