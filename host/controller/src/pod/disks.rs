//! Disks of containers: image layers that are images already, and the host's block devices.
//!
//! Which disks are whose is on record in the pod's directory, so that another controller can take them out.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::FileTypeExt as _},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use pericarp_jail::{Access, open_sealed};
use pericarp_protos::{
    descriptors,
    guest::SHARE_DIR,
    host::{Disk, Layers, Node, Part, disk::Use},
    id::ContainerId,
    ttrpc,
    vmm::InsertDiskResponse,
};
use pericarp_vmm::MachineConfig;
use thiserror::Error;

use super::Pod;
use crate::{
    fault::FaultPoint,
    guest::translate::BlockVolume,
    host::{
        replace::{Durability, replace},
        rootfs::ImageLayers,
        share::{WRITABLE, writable},
    },
};

/// Characters of a container's id that a disk's serial number shows; it has 20 in all.
const SERIAL_ID: usize = 16;

/// A container cannot have its disks.
#[derive(Debug, Error)]
pub enum DiskError {
    #[error("cannot open {path} for {what}")]
    Open {
        path: PathBuf,
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("the machine cannot be given the files of the disk for {what}")]
    Give {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the machine of this pod is of an earlier version, which cannot be given the disk for {what}; replace the pod"
    )]
    OlderMachine { what: String },
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
    /// mounted on the host. `can_be_mounted`: whether they can.
    pub(super) async fn insert_layers(
        &self,
        container: &ContainerId,
        layers: &ImageLayers,
        can_be_mounted: bool,
    ) -> Result<Option<Disk>, DiskError> {
        let inserted = match self.insert(container, 0, &layers.images, true, "its image layers").await {
            Err(DiskError::OlderMachine { .. }) if can_be_mounted => return Ok(None),
            inserted => inserted?,
        };
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
            use_: Some(Use::Layers(Layers { upper, work, map_ids: layers.map_ids, ..Layers::default() })),
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
        let (files, socket) = (files.to_owned(), self.files.descriptors());
        let (ticket, of) = (next_ticket(), what.to_owned());
        // Opening may wait for a server.
        self.blocking.run(move || give(&socket, ticket, &files, read_only, of)).await?;
        match self.control.insert_disk(ticket, read_only, serial(container, number)).await {
            Ok(inserted) => {
                FaultPoint::DiskInserted.reached();
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
        let devices = match devices_on_record(&record) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            devices => devices.map_err(DiskError::Record)?,
        };
        for device in devices {
            self.control.remove_disk(device).await.map_err(DiskError::Machine)?;
        }
        fs::remove_file(record).map_err(DiskError::Record)
    }

    /// Takes the disks out of the machine that are on record of no container: an earlier controller has been killed
    /// between inserting a disk and putting it on record.
    pub(super) async fn remove_unrecorded_disks(&self) -> Result<(), DiskError> {
        let mut inserted = self.control.status().await.map_err(DiskError::Machine)?.disks;
        // A machine may have been captured.
        inserted.truncate(MachineConfig::DISK_SLOTS_MAX.into());
        let on_record = all_on_record(&self.files.disk_records()).map_err(DiskError::Record)?;
        for device in inserted.into_iter().filter(|device| !on_record.contains(device)) {
            self.caused_by_guest(|| {
                tracing::info!(pod = self.id(), device, "a disk that is no container's is taken out");
            });
            self.control.remove_disk(device).await.map_err(DiskError::Machine)?;
        }
        Ok(())
    }

    fn record_disk(&self, container: &ContainerId, device: u32) -> Result<(), DiskError> {
        add_to_record(&self.files.disk_records(), container, device).map_err(DiskError::Record)
    }
}

/// A number that no other set of files has which may still wait in a machine: an earlier controller may have left some.
fn next_ticket() -> u64 {
    static NEXT: OnceLock<AtomicU64> = OnceLock::new();
    NEXT.get_or_init(|| AtomicU64::new(pericarp_vmm::monotonic_ns())).fetch_add(1, Ordering::Relaxed)
}

/// Opens files for a machine and gives them to it. Blocks.
fn give(
    socket: &Path,
    ticket: u64,
    files: &[PathBuf],
    read_only: bool,
    what: String,
) -> Result<(), DiskError> {
    let mut opened = Vec::with_capacity(files.len());
    for path in files {
        match open(path, read_only) {
            Ok(file) => opened.push(file),
            Err(source) => return Err(DiskError::Open { path: path.clone(), what, source }),
        }
    }
    let opened: Vec<_> = opened.iter().map(AsFd::as_fd).collect();
    descriptors::give(socket, ticket, &opened).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::OlderMachine { what },
        _ => DiskError::Give { what, source },
    })
}

/// Opens a regular file or a block device.
fn open(path: &Path, read_only: bool) -> io::Result<File> {
    let check = |kind: fs::FileType| {
        let error = || io::Error::other("it is neither a regular file nor a block device");
        (kind.is_file() || kind.is_block_device()).then_some(()).ok_or_else(error)
    };
    // This is checked before the file is opened, because opening might wait (a FIFO) or have an effect (a device).
    let kind = path.metadata()?.file_type();
    check(kind)?;
    // Layers are shared by pods, and a device by all who may use it. What a machine has of them it can read, or read
    // and write, and not open again for more.
    let file = match (read_only, kind.is_file()) {
        (false, true) => fs::OpenOptions::new().read(true).write(true).open(path)?,
        (false, false) => open_sealed(path, Access::ReadAndWrite, libc::O_NOCTTY)?,
        (true, _) => open_sealed(path, Access::Read, libc::O_NOCTTY)?,
    };
    check(file.metadata()?.file_type())?;
    Ok(file)
}

/// Puts a disk that has just been inserted on record as a container's.
fn add_to_record(records: &Path, container: &ContainerId, device: u32) -> io::Result<()> {
    use std::io::Write as _;
    fs::create_dir_all(records)?;
    // A record may still name a disk that has been taken out. Its container must not take this one with it.
    for entry in fs::read_dir(records)? {
        let record = entry?.path();
        let devices = devices_on_record(&record)?;
        if devices.contains(&device) {
            let others = devices.iter().filter(|other| **other != device);
            let lines: Vec<String> = others.map(u32::to_string).collect();
            replace(&record, lines.join("\n").as_bytes(), Durability::Process)?;
        }
    }
    let record = records.join(container);
    // A line of its own, whatever the record ends with.
    write!(fs::OpenOptions::new().create(true).append(true).open(record)?, "\n{device}")
}

/// The disks in a container's record.
fn devices_on_record(record: &Path) -> io::Result<Vec<u32>> {
    Ok(fs::read_to_string(record)?.lines().filter_map(|line| line.parse().ok()).collect())
}

/// The disks of all containers; `records` may not exist.
fn all_on_record(records: &Path) -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir(records) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut devices = Vec::new();
    for entry in entries {
        devices.extend(devices_on_record(&entry?.path())?);
    }
    Ok(devices)
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
    fn only_files_and_block_devices_are_opened_for_a_machine() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "content").unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        for read_only in [true, false] {
            let file = open(&at("file"), read_only).unwrap();
            let flags = rustix::fs::fcntl_getfl(&file).unwrap();
            assert_eq!(flags.contains(rustix::fs::OFlags::RDWR), !read_only);
        }
        for path in [directory.path().to_owned(), at("fifo"), "/dev/null".into(), at("missing")] {
            let given = give(&at("socket"), 1, std::slice::from_ref(&path), true, "its image layers".into());
            let error = given.unwrap_err();
            assert!(matches!(error, DiskError::Open { .. }), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        let error = give(&at("socket"), 1, &[at("file")], true, "its image layers".into()).unwrap_err();
        assert!(matches!(error, DiskError::OlderMachine { .. }), "{error}");
    }

    #[test]
    fn the_disks_on_record_are_those_of_all_containers() {
        let directory = tempfile::tempdir().unwrap();
        let records = directory.path().join("disks");
        assert_eq!(all_on_record(&records).unwrap(), [0; 0]);
        fs::create_dir(&records).unwrap();
        fs::write(records.join("a"), "7\n9\n").unwrap();
        fs::write(records.join("b"), "8\n").unwrap();
        let mut devices = all_on_record(&records).unwrap();
        devices.sort_unstable();
        assert_eq!(devices, [7, 8, 9]);
    }

    #[test]
    fn a_disk_that_was_inserted_again_is_on_record_of_its_last_container_alone() {
        let directory = tempfile::tempdir().unwrap();
        let records = directory.path().join("disks");
        let [first, second] = ["a", "b"].map(|id| ContainerId::try_from(id.to_owned()).unwrap());
        for device in [7, 8] {
            add_to_record(&records, &first, device).unwrap();
        }
        add_to_record(&records, &second, 7).unwrap();
        assert_eq!(devices_on_record(&records.join("a")).unwrap(), [8]);
        assert_eq!(devices_on_record(&records.join("b")).unwrap(), [7]);
        assert_eq!(fs::read_dir(&records).unwrap().count(), 2);
    }

    #[test]
    fn a_serial_number_fits_whatever_the_containers_id() {
        assert_eq!(serial(&"c1".parse().unwrap(), 0), "c1-0");
        assert!(serial(&"f".repeat(64).parse().unwrap(), 12345).len() <= 20);
    }
}
