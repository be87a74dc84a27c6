use std::{
    io::Write as _,
    num::NonZeroU64,
    time::{Duration, Instant},
};

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::{
    memory::GuestMemory,
    virtio::{
        ActiveQueue, F_VERSION_1,
        testing::{Buffer, Ring, guest_memory, threads},
    },
};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

fn open(file: &tempfile::NamedTempFile) -> Vec<OwnedFd> {
    vec![file.reopen().unwrap().into()]
}

fn disk(read_only: bool) -> (Blk, tempfile::NamedTempFile) {
    disk_with_limit(read_only, &RateLimit::default())
}

fn disk_with_limit(read_only: bool, limit: &RateLimit) -> (Blk, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[9; 4096]).unwrap();
    (Blk::new(5, open(&file), read_only, "serial", limit).unwrap(), file)
}

fn activate(disk: &mut Blk, memory: &GuestMemory, queue: ActiveQueue) {
    let (memory, threads) = (memory.clone(), threads());
    let queues = vec![Some(queue)];
    disk.activate(Activation { memory, features: F_VERSION_1, queues, threads }).unwrap();
}

/// A read of the first sector, laid out as Linux's driver does.
fn chain() -> [Buffer; 3] {
    [(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)].map(|(address, length, writable)| Buffer {
        address,
        length,
        writable,
    })
}

fn wait_until(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "it has not happened");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_configuration_tells_size_limits_and_what_can_be_done() {
    let (disk, _file) = disk(true);
    let mut config = [0xff; 32];
    disk.read_config(0, &mut config);
    assert_eq!(config[0..8], 8u64.to_le_bytes());
    assert_eq!(config[8..12], (1u32 << 20).to_le_bytes());
    assert_eq!(config[12..16], 126u32.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!((disk.features() & F_RO, disk.features() & F_FLUSH), (F_RO, 0));
    assert_eq!(self::disk(false).0.features() & (F_RO | F_FLUSH), F_FLUSH);
}

#[test]
fn a_serial_number_that_is_too_long_is_refused() {
    let (_, file) = disk(true);
    let new = |serial| Blk::new(0, open(&file), true, serial, &RateLimit::default()).map(drop);
    assert!(new("12345678901234567890").is_ok());
    let error = new("123456789012345678901").unwrap_err();
    assert!(error.to_string().contains("123456789012345678901"), "{error}");
}

#[test]
fn requests_are_served_until_the_device_stops_and_then_the_file_is_closed() {
    let (mut disk, _file) = disk(true);
    let memory = guest_memory();
    let (mut ring, queue) = Ring::new(&memory, 0x8000, 128);
    let (notify, interrupt) = (queue.notified.try_clone().unwrap(), queue.interrupt.clone());
    activate(&mut disk, &memory, queue);
    for _ in 0..3 {
        memory.write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
        let head = ring.add(&chain());
        notify.write(1).unwrap();
        let mut used = None;
        wait_until(|| {
            used = used.or_else(|| ring.used());
            used.is_some()
        });
        assert_eq!(used, Some((head, 513)));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 511)).unwrap(), 9);
    }
    assert!(interrupt.0.read().unwrap() >= 1);
    let weak = Arc::downgrade(&disk.disk);
    disk.stop();
    drop(disk);
    assert!(weak.upgrade().is_none(), "something still holds the disk's files");
}

#[test]
fn a_guest_that_never_stops_asking_cannot_keep_the_device() {
    let (mut disk, _file) = disk(true);
    let memory = guest_memory();
    let (mut ring, queue) = Ring::new(&memory, 0x8000, 128);
    let notify = queue.notified.try_clone().unwrap();
    activate(&mut disk, &memory, queue);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopping = stop.clone();
    let counters = disk.counters.clone();
    ring.add(&chain());
    notify.write(1).unwrap();
    let guest = std::thread::spawn(move || {
        let mut outstanding = 1;
        while !stopping.load(std::sync::atomic::Ordering::Relaxed) {
            while ring.used().is_some() {
                outstanding -= 1;
            }
            while outstanding < 100 {
                ring.offer(0);
                outstanding += 1;
            }
            notify.write(1).unwrap();
        }
    });
    wait_until(|| counters.reads.get() > 1000);
    let start = Instant::now();
    disk.stop();
    assert!(start.elapsed() < Duration::from_secs(5));
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    guest.join().unwrap();
}

#[test]
fn a_broken_queue_stops_the_worker_and_nothing_else() {
    let (mut disk, _file) = disk(true);
    let memory = guest_memory();
    let (mut ring, queue) = Ring::new(&memory, 0x8000, 128);
    let notify = queue.notified.try_clone().unwrap();
    activate(&mut disk, &memory, queue);
    // More than the ring has entries for.
    ring.set_available(1000);
    notify.write(1).unwrap();
    wait_until(|| disk.worker.as_ref().unwrap().0.is_finished());
    disk.stop();
}

/// Has so many requests served that are there all at once. Returns how long it took, the disk's start included.
fn time_of_reads(count: u16, limit: &RateLimit) -> Duration {
    let start = Instant::now();
    let (mut disk, _file) = disk_with_limit(true, limit);
    let memory = guest_memory();
    let (mut ring, queue) = Ring::new(&memory, 0x8000, 128);
    let notify = queue.notified.try_clone().unwrap();
    let head = ring.add(&chain());
    for _ in 1..count {
        ring.offer(head);
    }
    activate(&mut disk, &memory, queue);
    let mut served = 0;
    wait_until(|| {
        // What the guest notifies makes no difference.
        notify.write(1).unwrap();
        while ring.used().is_some() {
            served += 1;
        }
        served == count
    });
    let elapsed = start.elapsed();
    disk.stop();
    let throttled = disk.throttle.throttled().get();
    assert!((1..=u64::from(count)).contains(&throttled), "{throttled}");
    elapsed
}

#[test]
fn a_disk_serves_as_many_requests_as_its_limit_allows_and_all_of_them_in_the_end() {
    let limit = RateLimit { operations_per_second: NonZeroU64::new(100), ..RateLimit::default() };
    // The bucket holds ten.
    let elapsed = time_of_reads(40, &limit);
    assert!(elapsed >= Duration::from_millis(300), "{elapsed:?}");
}

#[test]
fn a_disk_moves_as_many_bytes_as_its_limit_allows_beyond_its_burst() {
    let rate = NonZeroU64::new(51_200);
    let limit = RateLimit { bytes_per_second: rate, bytes_burst: Some(10_240), ..RateLimit::default() };
    // The bucket holds the bytes of ten requests, and the burst those of twenty. The last one may overdraw it.
    let elapsed = time_of_reads(61, &limit);
    assert!(elapsed >= Duration::from_millis(300), "{elapsed:?}");
}

#[test]
fn a_disk_that_waits_for_its_limit_stops_at_once() {
    let limit = RateLimit { bytes_per_second: NonZeroU64::new(1), ..RateLimit::default() };
    let (mut disk, _file) = disk_with_limit(true, &limit);
    let memory = guest_memory();
    let (mut ring, queue) = Ring::new(&memory, 0x8000, 128);
    let head = ring.add(&chain());
    ring.offer(head);
    activate(&mut disk, &memory, queue);
    wait_until(|| disk.throttle.throttled().get() == 1);
    // The next request would be served in 512 s.
    disk.stop();
    assert_eq!(ring.used(), Some((head, 513)));
    assert_eq!(ring.used(), None);
}
