//! Disks of containers: image layers that are images already, and the host's block devices.
//!
//! Which disks are whose is on record in the pod's directory, so that another controller can take them out.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use pericarp_protos::{
    guest::SHARE_DIR,
    host::{Disk, Layers, Node, Part, disk::Use},
    id::ContainerId,
    ttrpc,
    vmm::InsertDiskResponse,
};
use thiserror::Error;

use super::Pod;
use crate::{
    guest::translate::BlockVolume,
    host::{
        rootfs::ImageLayers,
        share::{WRITABLE, writable},
    },
};

/// Characters of a container's id that a disk's serial number shows; it has 20 in all.
const SERIAL_ID: usize = 16;

/// A container cannot have its disks.
#[derive(Debug, Error)]
pub enum DiskError {
    #[error("the machine cannot be given the disk for {what}")]
    Insert {
        what: String,
        #[source]
        source: ttrpc::Error,
    },
    #[error("the machine has no free slot for the volume at {path}; use fewer raw block volumes")]
    NoSlot { path: String },
    #[error("the block device {major}:{minor} of the volume at {path} cannot be found on this host")]
    Device {
        path: String,
        major: u32,
        minor: u32,
        #[source]
        source: io::Error,
    },
    #[error("the machine cannot be reached")]
    Machine(#[source] ttrpc::Error),
    #[error("cannot keep a record of the container's disks")]
    Record(#[source] io::Error),
}

impl Pod {
    /// Puts image layers into the machine as one disk. `None`: there is no room for it, and the layers have to be
    /// mounted on the host.
    pub(super) async fn insert_layers(
        &self,
        container: &ContainerId,
        layers: &ImageLayers,
    ) -> Result<Option<Disk>, DiskError> {
        let inserted = self.insert(container, 0, &layers.images, true, "its image layers").await?;
        let Some(InsertDiskResponse { device, extents, .. }) = inserted else {
            self.caused_by_guest(|| {
                tracing::info!(pod = self.id(), %container, "no free slot for the layers; they go through the share");
            });
            return Ok(None);
        };
        let place = |name| format!("{SHARE_DIR}/{container}/{WRITABLE}/{name}");
        let (upper, work) = match &layers.writable {
            Some(_) => (place(writable::UPPER), place(writable::WORK)),
            None => (String::new(), String::new()),
        };
        let part = |offset, length| Part { offset, length, ..Part::default() };
        Ok(Some(Disk {
            device,
            parts: extents.into_iter().map(|extent| part(extent.offset, extent.length)).collect(),
            use_: Some(Use::Layers(Layers { upper, work, ..Layers::default() })),
            ..Disk::default()
        }))
    }

    /// Puts a block device of the host into the machine.
    pub(super) async fn insert_volume(
        &self,
        container: &ContainerId,
        number: usize,
        volume: &BlockVolume,
    ) -> Result<Disk, DiskError> {
        let node = device_node(Path::new("/sys/dev/block"), volume).map_err(|source| DiskError::Device {
            path: volume.path.clone(),
            major: volume.major,
            minor: volume.minor,
            source,
        })?;
        let what = format!("the volume at {}", volume.path);
        let inserted = self.insert(container, number, &[node], volume.read_only, &what).await?;
        let device = inserted.ok_or_else(|| DiskError::NoSlot { path: volume.path.clone() })?.device;
        let node = Node { path: volume.path.clone(), ..Node::default() };
        Ok(Disk { device, use_: Some(Use::Node(node)), ..Disk::default() })
    }

    /// Puts files into the machine as one disk, on record as the container's. `None`: there is no free slot.
    async fn insert(
        &self,
        container: &ContainerId,
        number: usize,
        files: &[PathBuf],
        read_only: bool,
        what: &str,
    ) -> Result<Option<InsertDiskResponse>, DiskError> {
        match self.control.insert_disk(files, read_only, serial(container, number)).await {
            Ok(inserted) => {
                self.record_disk(container, inserted.device)?;
                Ok(Some(inserted))
            }
            Err(error) if is_full(&error) => Ok(None),
            Err(source) => Err(DiskError::Insert { what: what.to_owned(), source }),
        }
    }

    /// Takes a container's disks out of the machine. A container may have none.
    pub(super) async fn remove_disks(&self, container: &ContainerId) -> Result<(), DiskError> {
        let record = self.files.disk_records().join(container);
        let text = match fs::read_to_string(&record) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(DiskError::Record)?,
        };
        for device in text.lines().filter_map(|line| line.parse().ok()) {
            self.control.remove_disk(device).await.map_err(DiskError::Machine)?;
        }
        fs::remove_file(record).map_err(DiskError::Record)
    }

    fn record_disk(&self, container: &ContainerId, device: u32) -> Result<(), DiskError> {
        use std::io::Write as _;
        let record = self.files.disk_records().join(container);
        let written = || -> io::Result<()> {
            fs::create_dir_all(self.files.disk_records())?;
            writeln!(fs::OpenOptions::new().create(true).append(true).open(record)?, "{device}")
        };
        written().map_err(DiskError::Record)
    }
}

fn is_full(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::RESOURCE_EXHAUSTED)
}

fn serial(container: &ContainerId, number: usize) -> String {
    let id: String = container.as_str().chars().take(SERIAL_ID).collect();
    format!("{id}-{}", number % 100)
}

/// Where the host has a block device, by its numbers; `directory` is /sys/dev/block.
fn device_node(directory: &Path, volume: &BlockVolume) -> io::Result<PathBuf> {
    let numbers = format!("{}:{}", volume.major, volume.minor);
    let uevent = fs::read_to_string(directory.join(numbers).join("uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(|name| Path::new("/dev").join(name)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_device_is_found_by_its_numbers() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("253:7")).unwrap();
        fs::write(
            directory.path().join("253:7/uevent"),
            "MAJOR=253\nMINOR=7\nDEVNAME=mapper/data\nDEVTYPE=disk\n",
        )
        .unwrap();
        let volume = |minor| BlockVolume { path: "/dev/x".into(), major: 253, minor, read_only: false };
        assert_eq!(device_node(directory.path(), &volume(7)).unwrap(), Path::new("/dev/mapper/data"));
        assert_eq!(device_node(directory.path(), &volume(8)).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_serial_number_fits_whatever_the_containers_id() {
        assert_eq!(serial(&"c1".parse().unwrap(), 0), "c1-0");
        assert!(serial(&"f".repeat(64).parse().unwrap(), 12345).len() <= 20);
    }
}
