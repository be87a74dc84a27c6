//! The machine's slots: platform devices "virtio-mmio.<n>" that are nothing until the machine has put a
//! device there and the driver has been told to look again.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use super::DeviceError;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// Has the driver look at a slot again, in which there is a device now.
pub fn bind(slot: u32) -> Result<(), DeviceError> {
    tell_driver("bind", slot)
}

/// Has the driver let go of a slot's device.
pub fn unbind(slot: u32) -> Result<(), DeviceError> {
    tell_driver("unbind", slot)
}

fn tell_driver(what: &'static str, slot: u32) -> Result<(), DeviceError> {
    fs::write(Path::new(DRIVER).join(what), device_name(slot)).map_err(|source| DeviceError::Driver {
        what,
        slot,
        source,
    })
}

fn device_name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// The block device that a bound slot has become.
#[derive(Clone, Debug)]
pub struct BlockDevice {
    /// As the kernel calls it: "vda".
    pub name: String,
}

impl BlockDevice {
    /// Finds it.
    pub fn of_slot(slot: u32) -> Result<BlockDevice, DeviceError> {
        let found = find(&Path::new(DEVICES).join(device_name(slot)));
        found
            .and_then(|name| name.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map(|name| BlockDevice { name })
            .map_err(|source| DeviceError::NoDisk { slot, source })
    }

    /// Its node in the guest's `/dev`.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// The node of one of its parts, which count from 1. (The kernel puts a "p" between only after a digit.)
    pub fn part_node(&self, part: u32) -> PathBuf {
        Path::new("/dev").join(format!("{}{part}", self.name))
    }

    /// Its major and minor number.
    pub fn numbers(&self) -> io::Result<(u32, u32)> {
        let metadata = fs::metadata(self.node())?;
        if !metadata.file_type().is_block_device() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok((rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())))
    }
}

/// `<platform device>/virtio<m>/block/<name>`
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
        assert_eq!(disk.part_node(12), Path::new("/dev/vdb12"));
    }
}
