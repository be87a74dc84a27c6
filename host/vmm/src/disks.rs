//! Disks that come and go while the machine runs: which slots they have.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    taken: Mutex<BTreeMap<u32, Place>>,
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
        Disks { bus, slots, taken: Mutex::default() }
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

    /// Takes a disk out of its slot, whether or not the guest has let go of it. Answers whether there was
    /// one.
    pub fn remove(&self, slot: u32) -> bool {
        match self.taken().entry(slot) {
            Entry::Occupied(mut place) if matches!(place.get(), Place::Disk(_)) => {
                place.insert(Place::Changing);
            }
            _ => return false,
        }
        // Closes the disk's files when it is dropped, here.
        drop(self.bus.slot(slot).and_then(|mut slot| slot.remove()));
        self.taken().remove(&slot);
        true
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
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
