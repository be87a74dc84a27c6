//! virtio-blk (virtio 1.2, section 5.2): a disk made of the host's files and block devices, one after the other.
//!
//! [`disk`] is the disk's contents; [`request`] is what the guest asks for; [`iovecs`] are the buffers of a request.
//! One thread for each disk ([`worker`]) serves its single queue.
//!
//! Trust: the guest is hostile. A request cannot reach beyond the disk or outside guest memory, a disk that was opened
//! read-only cannot be written, and a guest that makes requests without end cannot keep the disk in the machine. What
//! is on the disk is passed on as it is: the guest's kernel has to cope with a file system that is damaged.

mod disk;
mod iovecs;
mod request;
mod worker;

use std::{os::fd::OwnedFd, sync::Arc};

pub use self::disk::{DiskError, Extent};
use self::{
    disk::{Disk, SECTOR},
    worker::Worker,
};
use super::{
    ActivateError, Activation, Counter, Device, F_EVENT_IDX, RunningWorker, all_queues, device_type,
    read_config_bytes, throttle::Throttle,
};
use crate::{config::RateLimit, thread_kind::ThreadKind};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
/// `VIRTIO_F_INDIRECT_DESC`: large requests take one entry of the ring.
const F_INDIRECT_DESC: u64 = 1 << 28;

const QUEUE_SIZES: [u16; 1] = [128];
/// Most buffers of data in a request. Together with those of header and status they are no more than a queue's size.
const SEGMENTS_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Bytes of the longest buffer of data.
const SEGMENT_SIZE_MAX: u32 = 1 << 20;
/// Bytes of a serial number. A shorter one is padded with zeroes.
const SERIAL_SIZE: usize = 20;
/// Bytes of the configuration space, up to the first field that belongs to a feature which this device does not offer.
const CONFIG_SIZE: usize = 24;

/// Counted by the worker, read by the control service.
#[derive(Clone, Debug, Default)]
struct Counters {
    reads: Counter,
    read_bytes: Counter,
    writes: Counter,
    write_bytes: Counter,
    flushes: Counter,
    errors: Counter,
}

/// A disk's device.
pub struct Blk {
    name: String,
    disk: Arc<Disk>,
    serial: [u8; SERIAL_SIZE],
    worker: Option<RunningWorker>,
    counters: Counters,
    throttle: Throttle,
}

impl Blk {
    /// Makes a disk of its segments. `index` distinguishes the machine's disks.
    pub fn new(
        index: u32,
        files: Vec<OwnedFd>,
        read_only: bool,
        serial: &str,
        limit: &RateLimit,
    ) -> Result<Self, DiskError> {
        let mut bytes = [0; SERIAL_SIZE];
        bytes
            .get_mut(..serial.len())
            .ok_or_else(|| DiskError::Serial(serial.to_owned()))?
            .copy_from_slice(serial.as_bytes());
        Ok(Self {
            name: format!("disk{index}"),
            disk: Arc::new(Disk::new(files, read_only)?),
            serial: bytes,
            worker: None,
            counters: Counters::default(),
            throttle: Throttle::new(limit),
        })
    }

    /// Where the segments are on the disk.
    pub fn extents(&self) -> Vec<Extent> {
        self.disk.extents()
    }
}

impl Device for Blk {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        device_type::BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let kind = if self.disk.is_read_only() { F_RO } else { F_FLUSH };
        kind | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_SIZE];
        config[0..8].copy_from_slice(&(self.disk.size() / SECTOR).to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&self.disk.block_size().to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let [queue] = all_queues(activation.queues)?;
        let (name, disk) = (self.name.clone(), self.disk.clone());
        let (serial, counters, throttle) = (self.serial, self.counters.clone(), self.throttle.clone());
        let worker = super::start_worker(&activation.threads, ThreadKind::Blk, &self.name, |stop| {
            let worker = Worker::new(name, activation.memory, queue, disk, serial, counters, stop)?;
            let worker = worker.limited_by(throttle);
            Ok(move || worker.run())
        });
        self.worker = Some(worker.map_err(ActivateError::Worker)?);
        Ok(())
    }

    fn stop(&mut self) {
        super::stop_worker(self.worker.take());
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        let counters = &self.counters;
        vec![
            ("reads", counters.reads.clone()),
            ("read_bytes", counters.read_bytes.clone()),
            ("writes", counters.writes.clone()),
            ("write_bytes", counters.write_bytes.clone()),
            ("flushes", counters.flushes.clone()),
            ("errors", counters.errors.clone()),
            ("throttled", self.throttle.throttled()),
        ]
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
