//! The device between a socket that stands for the tap and a guest that the tests play.

use std::{num::NonZeroU64, os::fd::OwnedFd, time::Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::{
    config::RateLimit,
    memory::GuestMemory,
    virtio::{
        net::{Counters, FRAME_MAX, Throttles, feature},
        testing::{Buffer, RING_SIZE, Ring, guest_memory},
        throttle::Throttle,
    },
};

const QUEUE: u16 = 256;
const RECEIVE_RING: u64 = RING_SIZE;
const TRANSMIT_RING: u64 = 2 * RING_SIZE;
const RECEIVE_BUFFERS: u64 = 0x10_0000;
const TRANSMIT_BUFFER: u64 = 0x80_0000;
const OUTSIDE: u64 = 0xf000_0000;

struct Harness {
    worker: Worker,
    memory: GuestMemory,
    receive: Ring,
    transmit: Ring,
    counters: Counters,
    receive_interrupt: crate::virtio::Interrupt,
    /// The other end of the tap.
    host: Option<OwnedFd>,
    next_buffer: u64,
}

impl Harness {
    fn merging() -> Self {
        Self::new(feature::MRG_RXBUF)
    }

    fn new(features: u64) -> Self {
        Self::with_limits(features, &Throttles::default())
    }

    fn with_limits(features: u64, throttles: &Throttles) -> Self {
        let memory = guest_memory();
        let (receive, mut receive_queue) = Ring::new(&memory, RECEIVE_RING, QUEUE);
        let (transmit, transmit_queue) = Ring::new(&memory, TRANSMIT_RING, QUEUE);
        receive_queue.queue.set_event_idx(features & crate::virtio::F_EVENT_IDX != 0);
        let receive_interrupt = receive_queue.interrupt.clone();
        let (tap, host) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        let counters = Counters::default();
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let receiver =
            Receiver::new(receive_queue, &memory, features, counters.clone(), throttles.receive.clone());
        let transmitter =
            Transmitter::new(transmit_queue, &memory, counters.clone(), throttles.transmit.clone());
        let tap = Arc::new(Tap::from_fd(tap));
        let worker = Worker::new("net0".into(), receiver, transmitter, tap, &stop).unwrap();
        Self {
            worker,
            memory,
            receive,
            transmit,
            counters,
            receive_interrupt,
            host: Some(host),
            next_buffer: RECEIVE_BUFFERS,
        }
    }

    /// Makes a receive buffer available. Returns its address.
    fn give(&mut self, length: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(length);
        self.receive.add(&[Buffer { address, length, writable: true }]);
        address
    }

    fn host_sends(&self, payload: &[u8]) {
        let frame = [&[0xff; 12][..], payload].concat();
        rustix::io::write(self.host.as_ref().unwrap(), &frame).unwrap();
    }

    /// The next frame that the tap has been given, with its header.
    fn host_gets(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 2 * FRAME_MAX];
        let length = rustix::io::read(self.host.as_ref().unwrap(), &mut frame).ok()?;
        frame.truncate(length);
        Some(frame)
    }

    /// Sends a frame with an empty header from the guest, cut into pieces of the given lengths.
    fn guest_sends(&mut self, payload: &[u8], pieces: &[usize]) {
        let frame = [&[0; 12][..], payload].concat();
        assert_eq!(pieces.iter().sum::<usize>(), frame.len());
        self.memory.write_slice(&frame, GuestAddress(TRANSMIT_BUFFER)).unwrap();
        let mut address = TRANSMIT_BUFFER;
        let chain: Vec<_> = pieces
            .iter()
            .map(|piece| {
                let length = u32::try_from(*piece).unwrap();
                let buffer = Buffer { address, length, writable: false };
                address += u64::from(length);
                buffer
            })
            .collect();
        self.transmit.add(&chain);
    }

    fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Lets the worker work until it would wait.
    fn run_until_idle(&mut self) {
        for _ in 0..100 {
            assert_eq!(self.worker.handle_events(Some(Duration::ZERO)).unwrap(), ControlFlow::Continue(()));
            if self.worker.move_frames().unwrap() != NextTurn::Now {
                return;
            }
        }
        panic!("the worker spins");
    }
}

fn payload(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

#[test]
fn a_frame_that_fits_one_buffer_has_one_in_its_header() {
    let mut harness = Harness::merging();
    let address = harness.give(2048);
    harness.host_sends(&payload(100));
    harness.run_until_idle();
    assert_eq!(harness.receive.used(), Some((0, 112)));
    assert_eq!(harness.read(address, 12), [255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0]);
    assert_eq!(harness.read(address + 12, 100), payload(100));
    assert_eq!((harness.counters.rx_packets.get(), harness.counters.rx_bytes.get()), (1, 100));
}

#[test]
fn a_large_frame_is_merged_from_as_many_buffers_as_it_fills() {
    let mut harness = Harness::merging();
    let addresses: Vec<_> = (0..100).map(|_| harness.give(1500)).collect();
    harness.host_sends(&payload(65550));
    harness.host_sends(&payload(60));
    harness.run_until_idle();
    // 43 full buffers and 1062 bytes.
    let used: Vec<_> = std::iter::from_fn(|| harness.receive.used()).collect();
    assert_eq!(used.len(), 45);
    assert!(used[..43].iter().all(|(_, length)| *length == 1500));
    assert_eq!(used[43].1 as usize, FRAME_MAX - 43 * 1500);
    assert_eq!(used[44], (44, 72));
    // The buffers follow one another in memory.
    assert_eq!(harness.read(addresses[0] + 10, 2), [44, 0]);
    assert_eq!(harness.read(addresses[0] + 12, 65550), payload(65550));
    assert_eq!(harness.read(addresses[44] + 10, 2), [1, 0]);
    assert_eq!(harness.read(addresses[44] + 12, 60), payload(60));
}

#[test]
fn the_number_of_buffers_is_written_wherever_the_guest_has_cut_the_header() {
    let mut harness = Harness::merging();
    let piece = |address, length| Buffer { address, length, writable: true };
    let other = RECEIVE_BUFFERS + 0x1000;
    harness.receive.add(&[piece(RECEIVE_BUFFERS, 11), piece(other, 1), piece(other + 0x1000, 500)]);
    harness.host_sends(&payload(20));
    harness.run_until_idle();
    assert_eq!(harness.receive.used(), Some((0, 32)));
    assert_eq!((harness.read(RECEIVE_BUFFERS + 10, 1), harness.read(other, 1)), (vec![1], vec![0]));
    assert_eq!(harness.read(other + 0x1000, 20), payload(20));
}

#[test]
fn a_guest_that_waits_for_a_buffer_in_the_middle_of_a_frame_is_interrupted() {
    let mut harness = Harness::new(feature::MRG_RXBUF | crate::virtio::F_EVENT_IDX);
    for _ in 0..100 {
        harness.give(100);
    }
    let used_event = RECEIVE_RING + 0x1000 + 4 + 2 * u64::from(QUEUE);
    let interrupted = |harness: &Harness| harness.receive_interrupt.0.read().is_ok();

    harness.memory.write_obj(3u16, GuestAddress(used_event)).unwrap();
    harness.host_sends(&payload(88));
    harness.run_until_idle();
    assert!(!interrupted(&harness));
    harness.host_sends(&payload(900));
    harness.run_until_idle();
    assert!(interrupted(&harness));
    harness.host_sends(&payload(900));
    harness.run_until_idle();
    assert!(!interrupted(&harness));
}

#[test]
fn without_merging_a_frame_takes_one_chain_and_is_dropped_if_it_does_not_fit() {
    let mut harness = Harness::new(0);
    let first = harness.give(1526);
    harness.give(1526);
    harness.host_sends(&payload(1515));
    harness.host_sends(&payload(1514));
    harness.run_until_idle();
    assert_eq!(harness.receive.used(), Some((0, 1526)));
    assert_eq!(harness.receive.used(), None);
    assert_eq!(harness.read(first + 10, 2), [1, 0]);
    assert_eq!(harness.read(first + 12, 1514), payload(1514));
    assert_eq!((harness.counters.rx_packets.get(), harness.counters.rx_dropped.get()), (1, 1));
}

#[test]
fn a_frame_larger_than_all_buffers_is_dropped_and_the_buffers_stay() {
    let mut harness = Harness::merging();
    harness.give(1000);
    harness.give(1000);
    harness.host_sends(&payload(5000));
    harness.host_sends(&payload(1200));
    harness.run_until_idle();
    assert_eq!((harness.receive.used(), harness.receive.used()), (Some((0, 1000)), Some((1, 212))));
    assert_eq!(harness.counters.rx_dropped.get(), 1);
}

#[test]
fn a_guest_without_buffers_lets_the_worker_sleep_and_gets_its_frames_later() {
    let mut harness = Harness::merging();
    harness.host_sends(&payload(100));
    harness.run_until_idle();
    // The frame in the tap is not reported again: a wait without a time limit would not return.
    assert_eq!(harness.worker.wait_context.wait::<4>(Some(Duration::ZERO)).unwrap().count(), 0);
    harness.give(2048);
    harness.worker.receiver.queue.notified.write(1).unwrap();
    harness.run_until_idle();
    assert_eq!(harness.receive.used(), Some((0, 112)));
}

#[test]
fn hostile_receive_buffers_are_returned_empty_and_the_next_good_one_is_used() {
    let mut harness = Harness::merging();
    let buffer = |address, length| Buffer { address, length, writable: true };
    harness.receive.add(&[buffer(OUTSIDE, 2048)]);
    harness.receive.add(&[buffer(RECEIVE_BUFFERS, 0)]);
    harness.receive.add(&[buffer(RECEIVE_BUFFERS, 11)]);
    harness.receive.add(&[buffer(RECEIVE_BUFFERS, u32::MAX)]);
    harness.receive.add(&[buffer(u64::MAX, 2048)]);
    harness.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 2048, writable: false }]);
    harness.receive.add(&[buffer(RECEIVE_BUFFERS, 100), buffer(OUTSIDE, 100)]);
    let good = harness.give(2048);
    harness.host_sends(&payload(300));
    harness.run_until_idle();
    for head in [0, 1, 2, 3, 4, 5, 6] {
        assert_eq!(harness.receive.used(), Some((head, 0)));
    }
    assert_eq!(harness.receive.used(), Some((8, 312)));
    assert_eq!(harness.read(good + 12, 300), payload(300));
    assert_eq!(harness.counters.rx_dropped.get(), 7);
}

#[test]
fn a_frame_cut_into_odd_pieces_arrives_whole() {
    let mut harness = Harness::merging();
    harness.guest_sends(&payload(1000), &[1, 10, 3, 13, 0, 985]);
    harness.run_until_idle();
    assert_eq!(harness.host_gets().unwrap(), [&[0; 12][..], &payload(1000)].concat());
    assert_eq!(harness.transmit.used(), Some((0, 0)));
    assert_eq!((harness.counters.tx_packets.get(), harness.counters.tx_bytes.get()), (1, 1000));
}

#[test]
fn the_largest_frame_is_sent_and_a_larger_one_is_not() {
    let mut harness = Harness::merging();
    harness.guest_sends(&payload(65551), &[FRAME_MAX + 1]);
    harness.guest_sends(&payload(65550), &[12, 65550]);
    harness.run_until_idle();
    assert_eq!(harness.host_gets().unwrap().len(), FRAME_MAX);
    assert!(harness.host_gets().is_none());
    assert_eq!((harness.counters.tx_packets.get(), harness.counters.tx_dropped.get()), (1, 1));
}

#[test]
fn hostile_frames_are_dropped_and_the_next_good_one_is_sent() {
    let mut harness = Harness::merging();
    let buffer = |address, length| Buffer { address, length, writable: false };
    harness.transmit.add(&[buffer(OUTSIDE, 100)]);
    harness.transmit.add(&[buffer(TRANSMIT_BUFFER, 0)]);
    harness.transmit.add(&[buffer(TRANSMIT_BUFFER, 25)]);
    harness.transmit.add(&[buffer(TRANSMIT_BUFFER, u32::MAX)]);
    harness.transmit.add(&[buffer(TRANSMIT_BUFFER, 50), buffer(u64::MAX - 5, 50)]);
    harness.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length: 100, writable: true }]);
    harness.guest_sends(&payload(60), &[72]);
    harness.run_until_idle();
    assert_eq!(harness.host_gets().unwrap().len(), 72);
    assert!(harness.host_gets().is_none());
    assert_eq!(std::iter::from_fn(|| harness.transmit.used()).count(), 7);
    assert_eq!((harness.counters.tx_packets.get(), harness.counters.tx_dropped.get()), (1, 6));
}

#[test]
fn a_loop_of_descriptors_ends() {
    let mut harness = Harness::merging();
    let piece = Buffer { address: TRANSMIT_BUFFER, length: 300, writable: false };
    harness.transmit.add(&[piece; 2]);
    // The second descriptor leads back to the first: as many bytes as the queue allows are too many.
    let second = TRANSMIT_RING + 16;
    harness.memory.write_obj(1u16, GuestAddress(second + 12)).unwrap();
    harness.memory.write_obj(0u16, GuestAddress(second + 14)).unwrap();
    harness.run_until_idle();
    assert!(harness.host_gets().is_none());
    assert_eq!(harness.counters.tx_dropped.get(), 1);
}

#[test]
fn a_ring_that_claims_too_much_stops_the_device() {
    let mut harness = Harness::merging();
    harness.transmit.set_available(QUEUE + 1);
    assert!(harness.worker.move_frames().is_err());
    let mut harness = Harness::merging();
    harness.receive.set_available(QUEUE + 1);
    assert!(harness.worker.move_frames().is_err());
}

#[test]
fn heads_beyond_the_queue_stop_the_device() {
    let mut harness = Harness::merging();
    harness.transmit.offer(QUEUE);
    assert!(harness.worker.move_frames().is_err());
}

#[test]
fn frames_that_the_tap_does_not_take_wait_without_spinning_and_arrive_in_order() {
    let mut harness = Harness::merging();
    for number in 0..40 {
        harness.transmit.add(&[Buffer {
            address: TRANSMIT_BUFFER + number * 16,
            length: 40_000,
            writable: false,
        }]);
        harness.memory.write_obj(number, GuestAddress(TRANSMIT_BUFFER + number * 16)).unwrap();
    }
    harness.run_until_idle();
    assert!(!harness.worker.writable);
    assert!(harness.counters.tx_packets.get() < 40);
    let mut got = 0u64;
    while let Some(frame) = harness.host_gets() {
        assert_eq!(frame[..8], got.to_le_bytes());
        got += 1;
        harness.run_until_idle();
    }
    assert_eq!(got, 40);
    assert_eq!((harness.counters.tx_packets.get(), harness.counters.tx_dropped.get()), (40, 0));
}

#[test]
fn frames_from_both_sides_take_turns() {
    let mut harness = Harness::merging();
    for _ in 0..BATCH + 5 {
        harness.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length: 60, writable: false }]);
        harness.give(100);
        harness.host_sends(&payload(60));
    }
    assert_eq!(harness.worker.move_frames().unwrap(), NextTurn::Now);
    let batch = BATCH as u64;
    assert_eq!((harness.counters.tx_packets.get(), harness.counters.rx_packets.get()), (batch, batch));
    harness.run_until_idle();
    assert_eq!(
        (harness.counters.tx_packets.get(), harness.counters.rx_packets.get()),
        (batch + 5, batch + 5)
    );
}

#[test]
fn without_the_tap_nothing_is_received_and_what_is_sent_is_dropped() {
    let mut harness = Harness::merging();
    harness.give(2048);
    harness.host = None;
    harness.run_until_idle();
    assert!(harness.worker.tap.is_none());
    harness.guest_sends(&payload(60), &[72]);
    harness.run_until_idle();
    assert_eq!(harness.transmit.used(), Some((0, 0)));
    assert_eq!(harness.receive.used(), None);
    assert_eq!(harness.counters.tx_dropped.get(), 1);
}

/// Frames of 60 bytes in a second, by operations and by bytes.
fn limits(frames_per_second: u64) -> [RateLimit; 2] {
    let rate = NonZeroU64::new;
    [
        RateLimit { operations_per_second: rate(frames_per_second), ..RateLimit::default() },
        RateLimit { bytes_per_second: rate(60 * frames_per_second), ..RateLimit::default() },
    ]
}

/// The frames that a limit allows in the time since `start`: those that the bucket holds, one that overdraws it, and
/// what comes in that time.
fn allowed(frames_per_second: u64, start: Instant) -> u64 {
    let bucket = (frames_per_second / 10).max(2);
    let come = u128::from(frames_per_second) * start.elapsed().as_nanos() / 1_000_000_000;
    bucket + 1 + u64::try_from(come).unwrap()
}

#[test]
fn frames_beyond_a_directions_limit_wait_and_those_of_the_other_direction_do_not() {
    for limit in limits(1) {
        for is_receive_limited in [true, false] {
            let start = Instant::now();
            let (limited, free) = (Throttle::new(&limit), Throttle::default());
            let throttles = if is_receive_limited {
                Throttles { receive: limited.clone(), transmit: free.clone() }
            } else {
                Throttles { receive: free.clone(), transmit: limited.clone() }
            };
            let mut harness = Harness::with_limits(feature::MRG_RXBUF, &throttles);
            for _ in 0..50 {
                harness.give(100);
                harness.host_sends(&payload(60));
                harness.guest_sends(&payload(60), &[72]);
            }
            for _ in 0..10 {
                harness.run_until_idle();
            }
            let moved = (harness.counters.rx_packets.get(), harness.counters.tx_packets.get());
            let (held_back, others) = if is_receive_limited { moved } else { (moved.1, moved.0) };
            assert_eq!(others, 50);
            assert!((1..=allowed(1, start)).contains(&held_back), "{held_back} frames");
            let dropped = (harness.counters.rx_dropped.get(), harness.counters.tx_dropped.get());
            assert_eq!(dropped, (0, 0));
            assert!(limited.throttled().get() > 0);
            assert_eq!(free.throttled().get(), 0);
        }
    }
}

#[test]
fn frames_that_had_to_wait_are_moved_when_it_is_their_time() {
    for limit in limits(100) {
        let start = Instant::now();
        let throttles = Throttles { receive: Throttle::new(&limit), transmit: Throttle::new(&limit) };
        let mut harness = Harness::with_limits(feature::MRG_RXBUF, &throttles);
        for _ in 0..30 {
            harness.give(100);
            harness.host_sends(&payload(60));
            harness.guest_sends(&payload(60), &[72]);
        }
        let mut turn = NextTurn::Now;
        while harness.counters.rx_packets.get() < 30 || harness.counters.tx_packets.get() < 30 {
            assert_ne!(turn, NextTurn::OnEvent, "nobody would wake the worker");
            assert!(harness.worker.handle_events(turn.timeout()).unwrap().is_continue());
            turn = harness.worker.move_frames().unwrap();
            for moved in [&harness.counters.rx_packets, &harness.counters.tx_packets] {
                assert!(moved.get() <= allowed(100, start), "{} frames", moved.get());
            }
        }
        assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
    }
}

#[test]
fn frames_that_arrive_while_the_limit_holds_them_back_do_not_wake_the_worker() {
    let limit = RateLimit { bytes_per_second: NonZeroU64::new(1), ..RateLimit::default() };
    let throttles = Throttles { receive: Throttle::new(&limit), transmit: Throttle::default() };
    let mut harness = Harness::with_limits(feature::MRG_RXBUF, &throttles);
    harness.give(100);
    harness.give(100);
    harness.host_sends(&payload(60));
    harness.run_until_idle();
    assert_eq!(harness.counters.rx_packets.get(), 1);
    let wakes =
        |harness: &Harness| harness.worker.wait_context.wait::<4>(Some(Duration::ZERO)).unwrap().count();
    harness.host_sends(&payload(60));
    assert_eq!(wakes(&harness), 0);
    // When there is no limit any more, as if its time had come, the tap is heard again.
    harness.worker.receiver.throttle = Throttle::default();
    harness.worker.receive_turn = NextTurn::Now;
    harness.run_until_idle();
    assert_eq!(harness.counters.rx_packets.get(), 2);
    harness.host_sends(&payload(60));
    assert_eq!(wakes(&harness), 1);
}
