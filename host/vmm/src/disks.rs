//! Disks that come and go while the machine runs: which slots they have.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    ops::Range,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use thiserror::Error;

use crate::{
    bus::Bus,
    virtio::{
        Counter, Device as _,
        blk::{Blk, DiskError, Extent},
        slot::SlotError,
    },
};

/// A disk cannot be put into the machine.
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
    /// The slots that they may have.
    slots: Range<u32>,
    taken: Arc<Taken>,
}

/// The slots that are not free.
#[derive(Default)]
struct Taken {
    places: Mutex<BTreeMap<u32, Place>>,
    /// A disk has gone.
    changed: Condvar,
}

/// What came of taking a disk out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Its files are closed.
    Closed,
    /// There is none in that slot.
    NoDisk,
    /// They are not closed yet. The slot stays taken until they are.
    StillOpen,
}

/// A slot that is not free.
enum Place {
    /// Its disk comes or goes at this moment.
    Changing,
    Disk(NamedCounters),
}

impl Disks {
    /// None yet.
    pub fn new(bus: Arc<Bus>, slots: Range<u32>) -> Disks {
        Disks { bus, slots, taken: Arc::default() }
    }

    /// Puts a disk into a free slot; answers with the slot and where on the disk the segments are.
    pub fn insert(
        &self,
        paths: &[PathBuf],
        read_only: bool,
        serial: &str,
    ) -> Result<(u32, Vec<Extent>), InsertError> {
        let slot = self.reserve().ok_or(InsertError::NoSlot(self.slots.len()))?;
        match self.fill(slot, paths, read_only, serial) {
            Ok((extents, counters)) => {
                self.taken().insert(slot, Place::Disk(counters));
                Ok((slot, extents))
            }
            Err(error) => {
                self.taken().remove(&slot);
                Err(error)
            }
        }
    }

    fn reserve(&self) -> Option<u32> {
        let mut taken = self.taken();
        let slot = self.slots.clone().find(|slot| !taken.contains_key(slot))?;
        taken.insert(slot, Place::Changing);
        Some(slot)
    }

    fn fill(
        &self,
        slot: u32,
        paths: &[PathBuf],
        read_only: bool,
        serial: &str,
    ) -> Result<(Vec<Extent>, NamedCounters), InsertError> {
        let disk = Blk::new(slot, paths, read_only, serial)?;
        let extents = disk.extents();
        let counters = (disk.name().to_owned(), disk.counters());
        if let Some(mut place) = self.bus.slot(slot) {
            place.insert(Box::new(disk))?;
        }
        Ok((extents, counters))
    }

    /// Takes a disk out of its slot, whether or not the guest has let go of it, and waits at most `limit` for its files
    /// to be closed. A request that the host's storage does not finish delays that, and nothing else of the machine's.
    pub fn remove(&self, slot: u32, limit: Duration) -> Removal {
        let mut places = self.taken();
        match places.entry(slot) {
            Entry::Vacant(_) => return Removal::NoDisk,
            Entry::Occupied(mut place) => {
                if let Place::Disk(counters) = place.insert(Place::Changing)
                    && let Err(error) = self.start_removal(slot)
                {
                    tracing::error!(slot, %error, "cannot start a thread that closes a disk");
                    place.insert(Place::Disk(counters));
                    return Removal::StillOpen;
                }
            }
        }
        let changing = |places: &mut BTreeMap<_, _>| matches!(places.get(&slot), Some(Place::Changing));
        let waited = self.taken.changed.wait_timeout_while(places, limit, changing);
        let (places, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // One that was put in meanwhile is open as well.
        if places.contains_key(&slot) { Removal::StillOpen } else { Removal::Closed }
    }

    fn start_removal(&self, slot: u32) -> io::Result<()> {
        let (bus, taken) = (self.bus.clone(), self.taken.clone());
        let remove = move || {
            // Closes the disk's files when it is dropped, here.
            drop(bus.slot(slot).and_then(|mut slot| slot.remove()));
            taken.places.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
            taken.changed.notify_all();
        };
        std::thread::Builder::new().name(format!("close{slot}")).spawn(remove).map(drop)
    }

    /// Those of every disk. Reading them waits for no device.
    pub fn counters(&self) -> Vec<NamedCounters> {
        let taken = self.taken();
        let disks = taken.values().filter_map(|place| match place {
            Place::Disk(counters) => Some(counters.clone()),
            Place::Changing => None,
        });
        disks.collect()
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<u32, Place>> {
        self.taken.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::{
        bus::Exits,
        config::ConsoleConfig,
        console::Console,
        virtio::{
            page::{self, Page},
            slot::{Lines, Slot, Wires},
            testing::guest_memory,
        },
    };

    struct Unconnected;

    impl Wires for Unconnected {
        fn connect(&self, _: u32, _: &Lines<'_>) -> Result<(), SlotError> {
            Ok(())
        }

        fn disconnect(&self, _: u32, _: &Lines<'_>) {}
    }

    /// A machine with one slot.
    fn bus(directory: &Path) -> Arc<Bus> {
        let config = ConsoleConfig { path: directory.join("console"), limit_bytes: 100 };
        let page = Page::new(page::allocate(1).unwrap(), 0);
        let slot = Slot::new(0, page, guest_memory(), Arc::new(Unconnected));
        Arc::new(Bus {
            slots: vec![Mutex::new(slot)],
            console: Mutex::new(Console::open(&config, EventFd::new(0).unwrap()).unwrap()),
            exits: Exits::default(),
        })
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
        let bus = bus(directory.path());
        let disks = Disks::new(bus.clone(), 0..1);
        let (slot, _) = disks.insert(std::slice::from_ref(&file), true, "d").unwrap();
        // What keeps its device busy: the guest, or a request that takes long.
        let busy = bus.slot(slot).unwrap();
        for _ in 0..2 {
            assert_eq!(disks.remove(slot, SHORT), Removal::StillOpen);
            assert!(is_open(&file));
            let error = disks.insert(std::slice::from_ref(&file), true, "e").unwrap_err();
            assert!(matches!(error, InsertError::NoSlot(1)), "{error}");
        }
        drop(busy);
        // The first answer may come from the removal that has been at work all the time.
        assert_ne!(disks.remove(slot, Duration::MAX), Removal::StillOpen);
        assert!(!is_open(&file));
        assert_eq!(disks.remove(slot, SHORT), Removal::NoDisk);
        let (slot, _) = disks.insert(std::slice::from_ref(&file), true, "f").unwrap();
        assert_eq!(disks.remove(slot, Duration::MAX), Removal::Closed);
        assert!(!is_open(&file));
    }
}
