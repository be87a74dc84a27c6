//! Devices that come while the guest runs: disks for containers, processors, and memory.

mod cpus;
mod guest;
mod layers;
mod node;
mod parts;
mod slot;

use std::{
    fs, io,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;
use pericarp_protos::{
    agent::{ResizeRequest, ResizeResponse},
    host::{Disk, Layers, disk::Use},
};

use self::{layers::Writable, slot::BlockDevice};

/// Why a device is of no use.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver refuses a slot.
    #[error("cannot {what} the device in slot {slot}: {source}")]
    Driver {
        /// "bind" or "unbind".
        what: &'static str,
        /// The slot.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A bound slot has no block device.
    #[error("the device in slot {slot} is no disk: {source}")]
    NoDisk {
        /// The slot.
        slot: u32,
        /// What went wrong.
        source: io::Error,
    },
    /// The kernel refuses a part of a disk.
    #[error("cannot make part {number} of the disk in slot {slot}: {source}")]
    Part {
        /// The slot.
        slot: u32,
        /// The part's number, from 1.
        number: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A layer cannot be mounted.
    #[error("cannot mount the image layer on {layer:?}: {source}")]
    Image {
        /// Its block device.
        layer: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The layers cannot be put together.
    #[error("cannot mount the overlay of the container's layers: {source}")]
    Overlay {
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory cannot be made.
    #[error("cannot create {path:?}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// There is nothing in the spec that a disk could be put in the place of.
    #[error("the spec has no root")]
    NoRoot,
    /// The guest's devices cannot be listed.
    #[error("cannot list the guest's devices: {0}")]
    List(io::Error),
    /// Only one of upper and work directory.
    #[error("layers need both an upper and a work directory, or neither")]
    HalfWritable,
    /// There is no device in the spec that a disk could be put in the place of.
    #[error("the spec has no block device {0:?}")]
    NoNode(String),
    /// The processors cannot be listed.
    #[error("cannot list the guest's processors: {0}")]
    Processors(io::Error),
    /// A processor does not do what it is told.
    #[error("processor {number}: cannot {what}: {source}")]
    Processor {
        /// Its number.
        number: u32,
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread that does the work has failed.
    #[error("a device's work was not done")]
    Lost,
}

/// One thing that was done for a container.
#[derive(Debug)]
enum Undo {
    Unbind(u32),
    DeletePart(PathBuf, u32),
    Unmount(PathBuf),
    /// With what is in it, which is only directories.
    Remove(PathBuf),
}

impl Undo {
    fn run(self) {
        let result = match &self {
            Self::Unbind(slot) => slot::unbind(*slot).map_err(io::Error::other),
            Self::DeletePart(disk, number) => parts::delete(disk, *number),
            Self::Unmount(target) => umount2(target, MntFlags::UMOUNT_NOFOLLOW).or_else(|error| {
                tracing::warn!(target = %target.display(), %error, "still in use; unmounted for all but those who use it");
                umount2(target, MntFlags::MNT_DETACH)
            }).map_err(io::Error::from),
            Self::Remove(directory) => remove_directories(directory),
        };
        if let Err(error) = result {
            tracing::warn!(step = ?self, %error, "something of a container's disks stays behind");
        }
    }
}

/// Never removes a file: should something still be mounted there, it stays as it is.
fn remove_directories(directory: &PathBuf) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        fs::remove_dir(entry?.path())?;
    }
    fs::remove_dir(directory)
}

/// The disks of one container, in use.
#[derive(Debug, Default)]
pub struct Attached(Mutex<Vec<Undo>>);

impl Attached {
    /// Binds the disks and makes of them what the container needs, and changes its spec accordingly; gives it the guest's devices
    /// if it is privileged. Undoes everything if something fails.
    pub async fn new(mut spec: Spec, disks: Vec<Disk>) -> Result<(Self, Spec), DeviceError> {
        if disks.is_empty() {
            guest::give(&mut spec)?;
            return Ok((Self::default(), spec));
        }
        // Elsewhere, because it waits for the disks.
        let attaching = tokio::task::spawn_blocking(move || {
            let mut undo = Vec::new();
            // Last the guest's devices, with which no path of the container's own is to be taken.
            match attach(&mut spec, &disks, &mut undo).and_then(|()| guest::give(&mut spec)) {
                Ok(()) => Ok((Self(Mutex::new(undo)), spec)),
                Err(error) => {
                    run_all(undo);
                    Err(error)
                }
            }
        });
        attaching.await.unwrap_or(Err(DeviceError::Lost))
    }

    /// Undoes everything; does nothing the second time.
    pub async fn detach(&self) {
        let undo = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        if !undo.is_empty() && tokio::task::spawn_blocking(move || run_all(undo)).await.is_err() {
            tracing::warn!("a container's disks stay behind");
        }
    }
}

fn run_all(undo: Vec<Undo>) {
    undo.into_iter().rev().for_each(Undo::run);
}

fn attach(spec: &mut Spec, disks: &[Disk], undo: &mut Vec<Undo>) -> Result<(), DeviceError> {
    let mut lower = Vec::new();
    let mut layers: Option<&Layers> = None;
    for disk in disks {
        slot::bind(disk.device)?;
        undo.push(Undo::Unbind(disk.device));
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
            // From a newer controller. What it wants cannot be guessed, and does no harm.
            Some(_) | None => {}
        }
    }
    match layers {
        Some(layers) => put_root(spec, layers, &lower, undo),
        None => Ok(()),
    }
}

/// The block devices of a disk's layers.
fn layer_nodes(disk: &Disk, device: &BlockDevice, undo: &mut Vec<Undo>) -> Result<Vec<PathBuf>, DeviceError> {
    if disk.parts.is_empty() {
        return Ok(vec![device.node()]);
    }
    let mut nodes = Vec::with_capacity(disk.parts.len());
    for (number, part) in (1..).zip(&disk.parts) {
        parts::add(&device.node(), number, part).map_err(|source| DeviceError::Part {
            slot: disk.device,
            number,
            source,
        })?;
        undo.push(Undo::DeletePart(device.node(), number));
        nodes.push(device.part_node(number));
    }
    Ok(nodes)
}

fn put_root(
    spec: &mut Spec,
    layers: &Layers,
    lower: &[PathBuf],
    undo: &mut Vec<Undo>,
) -> Result<(), DeviceError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let writable = match (layers.upper.as_str(), layers.work.as_str()) {
        ("", "") => None,
        ("", _) | (_, "") => return Err(DeviceError::HalfWritable),
        (upper, work) => Some(Writable { upper, work }),
    };
    let root = spec.root_mut().as_mut().ok_or(DeviceError::NoRoot)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    root.set_path(layers::mount_root(number, lower, writable.as_ref(), undo)?);
    Ok(())
}

/// Does what `Agent.Resize` asks for.
pub async fn resize(request: ResizeRequest) -> Result<ResizeResponse, DeviceError> {
    let resizing = tokio::task::spawn_blocking(move || {
        if let Some(slot) = request.memory_device {
            slot::bind(slot)?;
        }
        let mut response = ResizeResponse::new();
        response.vcpus = match request.vcpus {
            0 => cpus::online()?,
            count => cpus::set_online(count)?,
        };
        Ok(response)
    });
    resizing.await.unwrap_or(Err(DeviceError::Lost))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_container_without_disks_keeps_its_spec() {
        let spec = Spec::default();
        let (attached, same) = Attached::new(spec.clone(), Vec::new()).await.unwrap();
        assert_eq!(same, spec);
        attached.detach().await;
    }

    #[tokio::test]
    async fn a_slot_that_cannot_be_bound_is_named() {
        let mut disk = Disk::new();
        disk.device = 4_000_000;
        let error = Attached::new(Spec::default(), vec![disk]).await.unwrap_err();
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
