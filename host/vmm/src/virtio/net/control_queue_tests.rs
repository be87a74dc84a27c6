//! Commands as a driver may send them, to a device with two queue pairs on a real tap.

use std::{path::Path, sync::Arc};

use vm_memory::GuestAddress;

use super::*;
use crate::virtio::{
    net::{
        tap::Tap,
        testing::{OWN_NETNS, in_new_namespace, make_tap},
    },
    testing::{Buffer, RING_SIZE, Ring, guest_memory},
};

const COMMAND: u64 = 0x10_0000;
const ACK: u64 = 0x20_0000;
const OUTSIDE: u64 = 0xf000_0000;
/// The byte where the result goes, before there is one.
const NO_ACK: u8 = 0xaa;
const SET_2: [u8; 4] = [CLASS_MQ, MQ_VQ_PAIRS_SET, 2, 0];
const SET_1: [u8; 4] = [CLASS_MQ, MQ_VQ_PAIRS_SET, 1, 0];

struct Harness {
    queue: ControlQueue,
    ring: Ring,
    memory: GuestMemory,
}

impl Harness {
    fn new(steering: Option<Steering>) -> Self {
        let memory = guest_memory();
        let (ring, queue) = Ring::new(&memory, RING_SIZE, 16);
        let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let queue = ControlQueue::new("net0.control".into(), memory.clone(), queue, steering, &stop).unwrap();
        Self { queue, ring, memory }
    }

    /// Sends a chain. Returns the result, and the number of bytes that were written.
    fn send_chain(&mut self, chain: &[Buffer]) -> (u8, u32) {
        self.memory.write_obj(NO_ACK, GuestAddress(ACK)).unwrap();
        let head = self.ring.add(chain);
        assert!(self.queue.serve_one().unwrap());
        assert!(!self.queue.serve_one().unwrap());
        let (used, length) = self.ring.used().unwrap();
        assert_eq!(used, head);
        (self.memory.read_obj(GuestAddress(ACK)).unwrap(), length)
    }

    fn send(&mut self, command: &[u8]) -> (u8, u32) {
        self.memory.write_slice(command, GuestAddress(COMMAND)).unwrap();
        self.send_chain(&[readable(COMMAND, command.len()), writable(ACK, 1)])
    }
}

fn readable(address: u64, length: usize) -> Buffer {
    Buffer { address, length: u32::try_from(length).unwrap(), writable: false }
}

fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

/// Runs a test with a device on a tap with two queues, of which the second is detached.
fn with_two_pairs(test: impl FnOnce(Harness, Arc<Tap>) + Send) {
    in_new_namespace(|| {
        make_tap("tap0", 2);
        let mut taps = Tap::open(Path::new(OWN_NETNS), "tap0", 2).unwrap();
        let second = Arc::new(taps.remove(1));
        test(Harness::new(Some(Steering::new(vec![Arc::downgrade(&second)]))), second);
    });
}

/// Tries to attach a tap's queue, and detaches it again if that has succeeded. Returns whether it was attached before.
fn probe_attached(tap: &Tap) -> bool {
    match tap.attach_queue() {
        Ok(()) => {
            tap.detach_queue().unwrap();
            false
        }
        Err(_) => true,
    }
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    with_two_pairs(|mut harness, second| {
        assert!(!probe_attached(&second));
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
        assert!(!probe_attached(&second));
        for _ in 0..2 {
            assert_eq!(harness.send(&SET_2), (ACK_OK, 1));
            assert!(probe_attached(&second));
        }
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
        assert!(!probe_attached(&second));
    });
}

#[test]
fn the_driver_may_cut_a_command_as_it_likes() {
    with_two_pairs(|mut harness, second| {
        harness.memory.write_slice(&SET_2, GuestAddress(COMMAND)).unwrap();
        let chain = [
            readable(COMMAND, 1),
            readable(COMMAND + 1, 2),
            readable(OUTSIDE, 0),
            readable(COMMAND + 3, 1),
            writable(OUTSIDE, 0),
            writable(ACK, 8),
        ];
        assert_eq!(harness.send_chain(&chain), (ACK_OK, 1));
        assert!(probe_attached(&second));
    });
}

#[test]
fn commands_that_the_device_does_not_know_are_refused_and_change_nothing() {
    with_two_pairs(|mut harness, second| {
        for in_use in [SET_1, SET_2] {
            assert_eq!(harness.send(&in_use), (ACK_OK, 1));
            for command in [
                &[][..],
                &[CLASS_MQ],
                &SET_2[..3],
                &[CLASS_MQ, MQ_VQ_PAIRS_SET, 2, 0, 0],
                &[CLASS_MQ; 5000],
                // No pair, and more than there are.
                &[CLASS_MQ, MQ_VQ_PAIRS_SET, 0, 0],
                &[CLASS_MQ, MQ_VQ_PAIRS_SET, 3, 0],
                &[CLASS_MQ, MQ_VQ_PAIRS_SET, 1, 1],
                &[CLASS_MQ, MQ_VQ_PAIRS_SET, 0xff, 0xff],
                // VIRTIO_NET_CTRL_MQ_RSS_CONFIG, VIRTIO_NET_CTRL_RX, and nothing at all.
                &[CLASS_MQ, 1, 1, 0],
                &[0, 0, 1, 0],
                &[0xff, 0xff, 1, 0],
            ] {
                assert_eq!(harness.send(command), (ACK_ERR, 1), "{command:?}");
                assert_eq!(probe_attached(&second), in_use == SET_2, "{command:?}");
            }
        }
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
    });
}

#[test]
fn hostile_chains_are_given_back() {
    with_two_pairs(|mut harness, second| {
        harness.memory.write_slice(&SET_2, GuestAddress(COMMAND)).unwrap();
        for command in
            [readable(OUTSIDE, 4), readable(u64::MAX - 1, 4), readable(COMMAND, u32::MAX as usize - 1)]
        {
            assert_eq!(harness.send_chain(&[command, writable(ACK, 1)]), (ACK_ERR, 1));
        }
        assert_eq!(harness.send_chain(&[writable(ACK, 1)]), (ACK_ERR, 1));
        assert!(!probe_attached(&second));
        // There is no room for the result.
        let command = readable(COMMAND, 4);
        assert_eq!(harness.send_chain(&[command]), (NO_ACK, 0));
        assert_eq!(harness.send_chain(&[command, writable(ACK, 0)]), (NO_ACK, 0));
        assert_eq!(harness.send_chain(&[command, writable(OUTSIDE, 1)]), (NO_ACK, 0));
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
        assert!(!probe_attached(&second));
    });
}

#[test]
fn a_ring_that_claims_too_much_stops_the_queue() {
    let mut harness = Harness::new(None);
    harness.ring.set_available(17);
    assert!(harness.queue.serve_one().is_err());
}

#[test]
fn a_driver_that_has_not_accepted_multi_queue_cannot_set_it() {
    let mut harness = Harness::new(None);
    assert_eq!(harness.send(&SET_1), (ACK_ERR, 1));
}

#[test]
fn a_pair_that_has_stopped_cannot_be_put_into_use_but_out_of_it() {
    with_two_pairs(|mut harness, second| {
        assert_eq!(harness.send(&SET_2), (ACK_OK, 1));
        drop(second);
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
        assert_eq!(harness.send(&SET_2), (ACK_ERR, 1));
        assert_eq!(harness.send(&SET_1), (ACK_OK, 1));
    });
}
