//! The device against a driver that is right, unlucky or hostile, and a stand-in for a tap.

use std::os::unix::net::UnixDatagram;

use super::*;
use crate::virtio::{
    net::tap,
    testing::{Buffer as Descriptor, RING_SIZE, Ring, guest_memory},
};

const DATA: u64 = 0x10_0000;

struct Guest {
    memory: GuestMemory,
    receive: Ring,
    transmit: Ring,
    worker: Worker,
    peer: UnixDatagram,
    counters: Counters,
    stop: EventFd,
}

impl Guest {
    fn new(features: u64) -> Guest {
        let memory = guest_memory();
        let (receive, receive_queue) = Ring::new(&memory, RING_SIZE, 64);
        let (transmit, transmit_queue) = Ring::new(&memory, 3 * RING_SIZE, 64);
        let (tap, peer) = tap::pair();
        let (counters, stop) = (Counters::default(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let active = Active { memory: memory.clone(), queues: vec![receive_queue, transmit_queue], features };
        let worker = Worker::new(active, tap, counters.clone(), &stop).unwrap();
        Guest { memory, receive, transmit, worker, peer, counters, stop }
    }

    fn give(&mut self, address: u64, length: u32) -> u16 {
        self.receive.add(&[Descriptor { address, length, writable: true }])
    }

    fn send(&mut self, parts: &[(u64, &[u8])]) {
        let mut chain = Vec::new();
        for (address, bytes) in parts {
            let _ = self.memory.write_slice(bytes, GuestAddress(*address));
            let length = u32::try_from(bytes.len()).unwrap();
            chain.push(Descriptor { address: *address, length, writable: false });
        }
        self.transmit.add(&chain);
    }

    fn settle(&mut self) {
        for _ in 0..100 {
            if !self.worker.move_frames().unwrap() {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn memory_at(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..HEADER_SIZE + length).map(|n| u8::try_from(n % 251).unwrap()).collect();
    frame[..HEADER_SIZE].fill(0);
    frame
}

#[test]
fn a_frame_of_the_guests_arrives_whole_however_it_is_cut() {
    let mut guest = Guest::new(0);
    let frame = frame(100);
    let (a, rest) = frame.split_at(3);
    let (b, c) = rest.split_at(40);
    guest.send(&[(DATA, a), (DATA + 0x1000, b), (DATA + 0x2000, c)]);
    guest.settle();
    let mut buffer = [0; 200];
    let length = guest.peer.recv(&mut buffer).unwrap();
    assert_eq!(buffer[..length], frame);
    assert!(guest.transmit.used().is_some());
    assert_eq!((guest.counters.tx_packets.get(), guest.counters.tx_bytes.get()), (1, 100));
}

#[test]
fn frames_that_are_none_are_dropped_and_given_back() {
    let mut guest = Guest::new(0);
    guest.send(&[]);
    guest.send(&[(DATA, &[0; HEADER_SIZE])]);
    guest.send(&[(DATA, &vec![0; FRAME_MAX + 1])]);
    // Beyond the end of memory.
    guest.transmit.add(&[Descriptor { address: (16 << 20) - 4, length: 100, writable: false }]);
    guest.transmit.add(&[Descriptor { address: u64::MAX - 4, length: 100, writable: false }]);
    guest.settle();
    let given_back = std::iter::from_fn(|| guest.transmit.used()).count();
    assert!(given_back >= 4, "{given_back}");
    assert!(guest.counters.tx_dropped.get() >= 4);
    assert!(guest.peer.recv(&mut [0; 100]).is_err());
}

#[test]
fn a_frame_goes_straight_into_the_guests_buffer() {
    let mut guest = Guest::new(0);
    let head = guest.give(DATA, 2048);
    guest.peer.send(&frame(60)).unwrap();
    guest.settle();
    assert_eq!(guest.receive.used(), Some((head, 72)));
    let seen = guest.memory_at(DATA, 72);
    assert_eq!(seen[HEADER_SIZE..], frame(60)[HEADER_SIZE..]);
    assert_eq!(seen[10..12], [1, 0], "one buffer");
    assert_eq!((guest.counters.rx_packets.get(), guest.counters.rx_bytes.get()), (1, 60));
}

#[test]
fn a_large_frame_fills_several_buffers_if_the_driver_merges_them() {
    let mut guest = Guest::new(feature::MRG_RXBUF);
    let heads: Vec<u16> = (0..50).map(|n| guest.give(DATA + n * 0x1000, 1536)).collect();
    let sent = frame(4000);
    guest.peer.send(&sent).unwrap();
    guest.peer.send(&frame(60)).unwrap();
    guest.settle();
    let used: Vec<_> = std::iter::from_fn(|| guest.receive.used()).collect();
    assert_eq!(used, [(heads[0], 1536), (heads[1], 1536), (heads[2], 940), (heads[3], 72)]);
    assert_eq!(guest.memory_at(DATA + 10, 2), [3, 0]);
    assert_eq!(guest.memory_at(DATA + 0x3000 + 10, 2), [1, 0]);
    let mut seen = guest.memory_at(DATA, 1536);
    seen.extend(guest.memory_at(DATA + 0x1000, 1536));
    seen.extend(guest.memory_at(DATA + 0x2000, 940));
    assert_eq!(seen[HEADER_SIZE..], sent[HEADER_SIZE..]);
}

#[test]
fn without_buffers_frames_wait_on_the_host_and_the_device_rests() {
    let mut guest = Guest::new(feature::MRG_RXBUF);
    guest.peer.send(&frame(60)).unwrap();
    guest.settle();
    assert!(guest.worker.readable, "the tap still has it");
    guest.worker.watch_tap().unwrap();
    assert_eq!(guest.worker.interest, EventSet::empty(), "the tap would wake the thread for nothing");
    let head = guest.give(DATA, 2048);
    guest.settle();
    assert_eq!(guest.receive.used(), Some((head, 72)));
}

#[test]
fn buffers_that_are_none_are_given_back_empty() {
    let mut guest = Guest::new(0);
    let outside = guest.give((16 << 20) - 8, 100);
    let tiny = guest.give(DATA, 4);
    let good = guest.give(DATA, 2048);
    guest.peer.send(&frame(60)).unwrap();
    guest.settle();
    let used: Vec<_> = std::iter::from_fn(|| guest.receive.used()).collect();
    assert_eq!(used, [(outside, 0), (tiny, 0), (good, 72)]);
}

#[test]
fn a_queue_that_makes_no_sense_stops_the_device() {
    let mut guest = Guest::new(0);
    guest.transmit.set_available(1000);
    assert!(guest.worker.move_frames().is_err());
}

#[test]
fn the_thread_ends_when_it_is_told_to() {
    let guest = Guest::new(0);
    let (worker, stop) = (guest.worker, guest.stop);
    let thread = std::thread::spawn(move || worker.run());
    stop.write(1).unwrap();
    thread.join().unwrap();
}
