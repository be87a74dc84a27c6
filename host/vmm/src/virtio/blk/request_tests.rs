use std::io::Write as _;

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::virtio::testing::{Buffer, Ring, guest_memory};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;
const SERIAL: &[u8; SERIAL_SIZE] = b"layer-1\0\0\0\0\0\0\0\0\0\0\0\0\0";

struct Guest {
    memory: GuestMemory,
    disk: Disk,
    file: tempfile::NamedTempFile,
    counters: Counters,
}

impl Guest {
    /// A disk of 8 KiB: sector n is full of n.
    fn new(read_only: bool) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for sector in 0..16u8 {
            file.write_all(&[sector; 512]).unwrap();
        }
        let disk = Disk::new(vec![file.reopen().unwrap().into()], read_only).unwrap();
        Self { memory: guest_memory(), disk, file, counters: Counters::default() }
    }

    /// Makes a request. Returns the number of bytes written to it, and its status byte.
    fn request(&self, chain: &[Buffer]) -> (u32, u8) {
        self.memory.write_obj(0xaau8, GuestAddress(STATUS)).unwrap();
        let (mut ring, mut queue) = Ring::new(&self.memory, 0x8000, 16);
        ring.add(chain);
        let chain = queue.pop(&self.memory).unwrap().unwrap();
        let before = self.moved_since(0);
        let served = serve(&self.memory, chain, &self.disk, SERIAL, &self.counters);
        assert_eq!(served.moved, self.moved_since(before));
        (served.written, self.memory.read_obj(GuestAddress(STATUS)).unwrap())
    }

    /// Bytes that have been read and written, less an earlier number of them.
    fn moved_since(&self, before: u64) -> u64 {
        self.counters.read_bytes.get() + self.counters.write_bytes.get() - before
    }

    fn header(&self, kind: u32, sector: u64) -> Buffer {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        readable(HEADER, 16)
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }
}

fn readable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: false }
}

fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

#[test]
fn a_sector_is_read_to_where_the_guest_wants_it() {
    let guest = Guest::new(true);
    let header = guest.header(VIRTIO_BLK_T_IN, 3);
    let answer = guest.request(&[header, writable(DATA, 1024), writable(STATUS, 1)]);
    assert_eq!(answer, (1025, 0));
    assert_eq!(guest.data(1024), [[3; 512], [4; 512]].concat());
    assert_eq!((guest.counters.reads.get(), guest.counters.read_bytes.get()), (1, 1024));
}

#[test]
fn a_request_may_be_laid_out_in_any_way() {
    let guest = Guest::new(true);
    guest.header(VIRTIO_BLK_T_IN, 5);
    // The header in two buffers; the answer in the same buffer as the end of the data.
    guest.memory.write_obj(0xaau8, GuestAddress(DATA + 512)).unwrap();
    let chain = [readable(HEADER, 5), readable(HEADER + 5, 11), writable(DATA, 1), writable(DATA + 1, 512)];
    let (written, _) = guest.request(&chain);
    assert_eq!(written, 513);
    assert_eq!(guest.data(513), [vec![5; 512], vec![0]].concat());
}

#[test]
fn a_sector_is_written_and_flushed() {
    let guest = Guest::new(false);
    guest.memory.write_slice(&[0x77; 512], GuestAddress(DATA)).unwrap();
    let header = guest.header(VIRTIO_BLK_T_OUT, 15);
    assert_eq!(guest.request(&[header, readable(DATA, 512), writable(STATUS, 1)]), (1, 0));
    let header = guest.header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(guest.request(&[header, writable(STATUS, 1)]), (1, 0));
    assert_eq!(std::fs::read(guest.file.path()).unwrap()[15 * 512..], [0x77; 512]);
    assert_eq!((guest.counters.writes.get(), guest.counters.flushes.get()), (1, 1));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let guest = Guest::new(true);
    let header = guest.header(VIRTIO_BLK_T_OUT, 0);
    assert_eq!(guest.request(&[header, readable(DATA, 512), writable(STATUS, 1)]), (1, 1));
    let header = guest.header(VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(guest.request(&[header, writable(STATUS, 1)]), (1, 2));
}

#[test]
fn the_serial_number_is_told() {
    let guest = Guest::new(true);
    let header = guest.header(VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(guest.request(&[header, writable(DATA, 20), writable(STATUS, 1)]), (21, 0));
    assert_eq!(guest.data(20), SERIAL);
    let header = guest.header(VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(guest.request(&[header, writable(DATA, 19), writable(STATUS, 1)]), (1, 1));
}

#[test]
fn requests_beyond_the_disk_or_in_parts_of_sectors_fail() {
    let guest = Guest::new(false);
    for (sector, length) in [(16, 512), (15, 1024), (u64::MAX, 512), (u64::MAX >> 9, 512), (0, 511), (0, 513)]
    {
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            let header = guest.header(kind, sector);
            let data = if kind == VIRTIO_BLK_T_IN { writable(DATA, length) } else { readable(DATA, length) };
            let answer = guest.request(&[header, data, writable(STATUS, 1)]);
            assert_eq!(answer, (1, 1), "sector {sector}, {length} bytes, type {kind}");
        }
    }
    assert_eq!(guest.file.as_file().metadata().unwrap().len(), 8192);
    assert_eq!(guest.counters.errors.get(), 12);
}

#[test]
fn unknown_requests_are_unsupported() {
    let guest = Guest::new(false);
    for kind in [2, 11, 13, u32::MAX] {
        let header = guest.header(kind, 0);
        assert_eq!(guest.request(&[header, writable(STATUS, 1)]), (1, 2));
    }
}

#[test]
fn a_header_that_is_too_short_fails() {
    let guest = Guest::new(true);
    guest.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!(guest.request(&[readable(HEADER, 15), writable(DATA, 512), writable(STATUS, 1)]), (1, 1));
    assert_eq!(guest.request(&[writable(DATA, 512), writable(STATUS, 1)]), (1, 1));
}

#[test]
fn without_room_for_an_answer_or_outside_memory_nothing_is_written() {
    let guest = Guest::new(true);
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    assert_eq!(guest.request(&[header]), (0, 0xaa));
    assert_eq!(guest.request(&[header, writable(STATUS, 0)]), (0, 0xaa));
    for address in [16 << 20, (16 << 20) - 100, u64::MAX - 3] {
        let answer = guest.request(&[header, writable(address, 512), writable(STATUS, 1)]);
        assert_eq!(answer, (0, 0xaa), "{address:#x}");
    }
    assert_eq!(guest.counters.errors.get(), 5);
}

#[test]
fn a_chain_that_is_a_loop_ends() {
    let guest = Guest::new(true);
    let header = guest.header(VIRTIO_BLK_T_IN, 0);
    let (mut ring, mut queue) = Ring::new(&guest.memory, 0x8000, 16);
    ring.add(&[header, writable(DATA, 512), writable(STATUS, 1)]);
    // The last descriptor goes on with the second.
    guest.memory.write_obj(3u16, GuestAddress(0x8000 + 2 * 16 + 12)).unwrap();
    guest.memory.write_obj(1u16, GuestAddress(0x8000 + 2 * 16 + 14)).unwrap();
    let chain = queue.pop(&guest.memory).unwrap().unwrap();
    serve(&guest.memory, chain, &guest.disk, SERIAL, &guest.counters);
}

#[test]
fn a_request_of_too_many_buffers_is_dropped() {
    let guest = Guest::new(true);
    let (mut ring, mut queue) = Ring::new(&guest.memory, 0x8000, 256);
    // The header and one buffer too many, through an indirect table.
    let table = 0x40_0000;
    let count = 300u64;
    for index in 0..count {
        let at = table + index * 16;
        guest.memory.write_obj(DATA, GuestAddress(at)).unwrap();
        guest.memory.write_obj(512u32, GuestAddress(at + 8)).unwrap();
        let flags = if index + 1 < count { 3u16 } else { 2 };
        guest.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        guest.memory.write_obj(u16::try_from(index + 1).unwrap(), GuestAddress(at + 14)).unwrap();
    }
    ring.add(&[readable(table, u32::try_from(count * 16).unwrap())]);
    guest.memory.write_obj(4u16, GuestAddress(0x8000 + 12)).unwrap();
    let chain = queue.pop(&guest.memory).unwrap().unwrap();
    assert_eq!(serve(&guest.memory, chain, &guest.disk, SERIAL, &guest.counters), Served::default());
    assert_eq!(guest.counters.errors.get(), 1);
}
