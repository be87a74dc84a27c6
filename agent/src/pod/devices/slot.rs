//! The machine's slots: platform devices `virtio-mmio.<n>` that are empty until the machine has put a device there and
//! the driver has probed the slot again.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::DeviceError;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// Has the driver probe a slot into which the machine has put a device.
pub fn bind(slot: u32) -> Result<(), DeviceError> {
    write_to_driver("bind", slot)
}

/// Has the driver release the device in a slot.
pub fn unbind(slot: u32) -> Result<(), DeviceError> {
    write_to_driver("unbind", slot)
}

fn write_to_driver(what: &'static str, slot: u32) -> Result<(), DeviceError> {
    fs::write(Path::new(DRIVER).join(what), device_name(slot)).map_err(|source| DeviceError::Driver {
        what,
        slot,
        source,
    })
}

fn device_name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// The block device in a slot.
#[derive(Clone, Debug)]
pub struct BlockDevice {
    /// The kernel's name for it, such as "vda".
    pub name: String,
}

impl BlockDevice {
    /// The block device in a bound slot.
    pub fn of_slot(slot: u32) -> Result<Self, DeviceError> {
        let found = find(&Path::new(DEVICES).join(device_name(slot)));
        found
            .and_then(|name| name.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map(|name| Self { name })
            .map_err(|source| DeviceError::NoDisk { slot, source })
    }

    /// Its node in the guest's `/dev`.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// The node of one of its partitions, which are numbered from 1. (The kernel inserts a "p" only if the disk's name
    /// ends with a digit.)
    pub fn partition_node(&self, number: u32) -> PathBuf {
        Path::new("/dev").join(format!("{}{number}", self.name))
    }

    /// Its major and minor numbers.
    pub fn numbers(&self) -> io::Result<(u32, u32)> {
        let metadata = fs::metadata(self.node())?;
        if !metadata.file_type().is_block_device() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())))
    }
}

/// Finds the name of the block device below a platform device: `<platform device>/virtio<m>/block/<name>`.
fn find(device: &Path) -> io::Result<Option<String>> {
    for entry in fs::read_dir(device)? {
        let block = entry?.path().join("block");
        let Ok(mut disks) = fs::read_dir(block) else { continue };
        if let Some(disk) = disks.next() {
            return Ok(disk?.file_name().into_string().ok());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slots_disk_is_found_below_its_platform_device() {
        let sys = tempfile::tempdir().unwrap();
        let device = sys.path().join("virtio-mmio.7");
        fs::create_dir_all(device.join("power")).unwrap();
        assert_eq!(find(&device).unwrap(), None);
        fs::create_dir_all(device.join("virtio5/block/vdc")).unwrap();
        assert_eq!(find(&device).unwrap().as_deref(), Some("vdc"));
        assert!(find(&sys.path().join("virtio-mmio.8")).is_err());
    }

    #[test]
    fn a_part_has_the_disks_name_and_its_number() {
        let disk = BlockDevice { name: "vdb".into() };
        assert_eq!(disk.partition_node(12), Path::new("/dev/vdb12"));
    }
}
