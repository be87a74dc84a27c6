//! Disks that are inserted and removed while the machine runs, and their slots.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    ops::Range,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use thiserror::Error;

use crate::{
    bus::Bus,
    config::RateLimit,
    lock::unpoisoned,
    thread_kind::ThreadKind,
    threads::ThreadSpawner,
    virtio::{
        Counter, Device as _,
        blk::{Blk, DiskError, Extent},
        device_slot::SlotError,
    },
};

/// A disk cannot be inserted.
#[derive(Debug, Error)]
pub enum InsertError {
    #[error("all {0} slots for disks are taken; remove a disk, or give the machine more slots (disk_slots)")]
    NoSlot(usize),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Slot(#[from] SlotError),
}

/// A device's name and counters.
pub type NamedCounters = (String, Vec<(&'static str, Counter)>);

/// The disks of a machine.
pub struct Disks {
    bus: Arc<Bus>,
    threads: ThreadSpawner,
    /// The numbers of the slots for disks.
    slots: Range<u32>,
    /// What each disk may do.
    limit: RateLimit,
    occupied: Arc<OccupiedSlots>,
}

/// The slots that are not free.
#[derive(Default)]
struct OccupiedSlots {
    by_slot: Mutex<BTreeMap<u32, SlotState>>,
    /// Notified when a disk has been removed.
    removed: Condvar,
}

/// The outcome of removing a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The disk's files are closed.
    Closed,
    /// There is no disk in the slot.
    NoDisk,
    /// The disk's files are not closed yet. The slot is not free until they are.
    StillOpen,
}

/// The state of a slot that is not free.
enum SlotState {
    /// A disk is being inserted or removed.
    Changing,
    /// There is a disk, with these counters.
    Disk(NamedCounters),
}

impl Disks {
    /// A machine without disks, which may be inserted into `slots` of the bus. Each of them has a limit of its own.
    pub fn new(bus: Arc<Bus>, threads: ThreadSpawner, slots: Range<u32>, limit: RateLimit) -> Self {
        Self { bus, threads, slots, limit, occupied: Arc::default() }
    }

    /// Inserts a disk into a free slot. Returns the slot's number and where on the disk the segments are.
    pub fn insert(
        &self,
        files: Vec<OwnedFd>,
        read_only: bool,
        serial: &str,
    ) -> Result<(u32, Vec<Extent>), InsertError> {
        let slot = self.reserve().ok_or(InsertError::NoSlot(self.slots.len()))?;
        match self.insert_into(slot, files, read_only, serial) {
            Ok((extents, counters)) => {
                self.occupied_slots().insert(slot, SlotState::Disk(counters));
                Ok((slot, extents))
            }
            Err(error) => {
                self.occupied_slots().remove(&slot);
                Err(error)
            }
        }
    }

    /// Finds a free slot, which is no longer free afterwards.
    fn reserve(&self) -> Option<u32> {
        let mut occupied = self.occupied_slots();
        let slot = self.slots.clone().find(|slot| !occupied.contains_key(slot))?;
        occupied.insert(slot, SlotState::Changing);
        Some(slot)
    }

    fn insert_into(
        &self,
        slot: u32,
        files: Vec<OwnedFd>,
        read_only: bool,
        serial: &str,
    ) -> Result<(Vec<Extent>, NamedCounters), InsertError> {
        let disk = Blk::new(slot, files, read_only, serial, &self.limit)?;
        let extents = disk.extents();
        let counters = (disk.name().to_owned(), disk.counters());
        self.bus.slot(slot).insert(Box::new(disk))?;
        Ok((extents, counters))
    }

    /// Takes a disk out of its slot, whether or not the guest still uses it, and waits at most `limit` for its files to
    /// be closed. A request that the host's storage does not finish delays that, but nothing else in the machine.
    pub fn remove(&self, slot: u32, limit: Duration) -> Removal {
        let mut occupied = self.occupied_slots();
        match occupied.entry(slot) {
            Entry::Vacant(_) => return Removal::NoDisk,
            Entry::Occupied(mut entry) => {
                if let SlotState::Disk(counters) = entry.insert(SlotState::Changing)
                    && let Err(error) = self.start_removal(slot)
                {
                    tracing::error!(slot, %error, "cannot start a thread that closes a disk");
                    entry.insert(SlotState::Disk(counters));
                    return Removal::StillOpen;
                }
            }
        }
        let is_changing =
            |occupied: &mut BTreeMap<_, _>| matches!(occupied.get(&slot), Some(SlotState::Changing));
        let waited = self.occupied.removed.wait_timeout_while(occupied, limit, is_changing);
        let (occupied, _) = unpoisoned(waited);
        // Another disk that was inserted meanwhile is open as well.
        if occupied.contains_key(&slot) { Removal::StillOpen } else { Removal::Closed }
    }

    fn start_removal(&self, slot: u32) -> io::Result<()> {
        let (bus, occupied) = (self.bus.clone(), self.occupied.clone());
        let remove = move || {
            let disk = bus.slot(slot).remove();
            // Closes the disk's files.
            drop(disk);
            unpoisoned(occupied.by_slot.lock()).remove(&slot);
            occupied.removed.notify_all();
        };
        self.threads.spawn(ThreadKind::DiskRemoval, &format!("close{slot}"), remove).map(drop)
    }

    /// The counters of all disks. Reading them waits for no device.
    pub fn counters(&self) -> Vec<NamedCounters> {
        let occupied = self.occupied_slots();
        let disks = occupied.values().filter_map(|state| match state {
            SlotState::Disk(counters) => Some(counters.clone()),
            SlotState::Changing => None,
        });
        disks.collect()
    }

    /// The numbers of the slots that are not free.
    pub fn devices(&self) -> Vec<u32> {
        self.occupied_slots().keys().copied().collect()
    }

    fn occupied_slots(&self) -> MutexGuard<'_, BTreeMap<u32, SlotState>> {
        unpoisoned(self.occupied.by_slot.lock())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::{
        bus::VmExitCounters,
        config::ConsoleConfig,
        console::{self, Console},
        virtio::{
            device_slot::{DeviceEventRegistrar, DeviceEvents, DeviceSlot},
            register_page::{self, RegisterPage},
            testing::{guest_memory, threads},
        },
    };

    struct NoRegistrar;

    impl DeviceEventRegistrar for NoRegistrar {
        fn register(&self, _: u32, _: &DeviceEvents<'_>) -> Result<(), SlotError> {
            Ok(())
        }

        fn unregister(&self, _: u32, _: &DeviceEvents<'_>) {}
    }

    /// A machine with one slot.
    fn bus(directory: &Path, threads: &ThreadSpawner) -> Arc<Bus> {
        let config = ConsoleConfig { path: directory.join("console"), limit_bytes: 100 };
        let page = RegisterPage::new(register_page::allocate(1).unwrap(), 0);
        let slot = DeviceSlot::new(0, page, guest_memory(), threads.clone(), Arc::new(NoRegistrar));
        Arc::new(Bus {
            slots: vec![Mutex::new(slot)],
            console: Mutex::new(Console::new(
                console::open_log(&config).unwrap(),
                &RateLimit::default(),
                EventFd::new(0).unwrap(),
            )),
            exits: VmExitCounters::default(),
        })
    }

    fn open(file: &Path) -> Vec<OwnedFd> {
        vec![fs::File::open(file).unwrap().into()]
    }

    fn is_open(file: &Path) -> bool {
        let descriptors = fs::read_dir("/proc/self/fd").unwrap();
        descriptors.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file))
    }

    #[test]
    fn a_disk_is_not_called_closed_while_its_files_are_open() {
        const SHORT: Duration = Duration::from_millis(1);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().canonicalize().unwrap().join("disk");
        fs::write(&file, vec![0; 4096]).unwrap();
        let threads = threads();
        let bus = bus(directory.path(), &threads);
        let disks = Disks::new(bus.clone(), threads, 0..1, RateLimit::default());
        let (slot, _) = disks.insert(open(&file), true, "d").unwrap();
        assert_eq!(disks.devices(), [slot]);
        // As when the guest, or a request that takes long, keeps the device busy.
        let busy = bus.slot(slot);
        for _ in 0..2 {
            assert_eq!(disks.remove(slot, SHORT), Removal::StillOpen);
            assert!(is_open(&file));
            assert_eq!(disks.devices(), [slot]);
            let error = disks.insert(open(&file), true, "e").unwrap_err();
            assert!(matches!(error, InsertError::NoSlot(1)), "{error}");
        }
        drop(busy);
        // The first removal may have closed it by now.
        assert_ne!(disks.remove(slot, Duration::MAX), Removal::StillOpen);
        assert!(!is_open(&file));
        assert_eq!(disks.remove(slot, SHORT), Removal::NoDisk);
        assert_eq!(disks.devices(), [0; 0]);
        let (slot, _) = disks.insert(open(&file), true, "f").unwrap();
        assert_eq!(disks.remove(slot, Duration::MAX), Removal::Closed);
        assert!(!is_open(&file));
    }
}
