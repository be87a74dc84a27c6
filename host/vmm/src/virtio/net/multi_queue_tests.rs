//! The whole device with several queue pairs, between a real tap and a guest that the tests play.

use std::os::fd::OwnedFd;

use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{
    testing::{OWN_NETNS, in_new_namespace, make_tap, packet_socket, switch_on, wait_for_events},
    *,
};
use crate::virtio::{
    ActiveQueue, F_VERSION_1,
    testing::{Buffer, RING_SIZE, Ring, guest_memory, threads},
};

const COMMAND: u64 = 0x10_0000;
const ACK: u64 = 0x10_1000;
const RECEIVE_BUFFERS: u64 = 0x20_0000;
const TRANSMIT_BUFFER: u64 = 0x80_0000;
/// So many that the kernel does not give the frames of all to one of two queues.
const CONNECTIONS: u16 = 64;
const PAIRS: u16 = 2;
/// The Ethernet type of IPv4. The kernel distinguishes connections of protocols that it knows.
const IPV4: u16 = 0x800;

struct Queue {
    ring: Ring,
    notified: EventFd,
    irqfd: Arc<EventFd>,
}

struct Harness {
    device: Net,
    memory: GuestMemory,
    socket: OwnedFd,
    /// In the device's order. `None` for each that the driver has left out.
    queues: Vec<Option<Queue>>,
}

impl Harness {
    /// A driver that accepts all but `refused` of the features and leaves out some of the queues.
    fn new(refused: u64, left_out: &[usize]) -> Self {
        make_tap("tap0", PAIRS);
        let config = NetConfig {
            netns: OWN_NETNS.into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1500,
            queue_pairs: PAIRS,
        };
        let mut device = Net::new(0, &config, &RateLimits::default()).unwrap();
        switch_on("tap0");
        let memory = guest_memory();
        let features = device.features() & !(refused | F_EVENT_IDX) | F_VERSION_1;
        let set_up = |(index, size): (usize, &u16)| {
            let base = (index as u64 + 1) * RING_SIZE;
            let left_out = left_out.contains(&index);
            if left_out { (None, None) } else { queue(&memory, base, *size) }
        };
        let (queues, theirs): (Vec<_>, _) = device.queue_sizes().iter().enumerate().map(set_up).unzip();
        device
            .activate(Activation { memory: memory.clone(), features, queues: theirs, threads: threads() })
            .unwrap();
        let mut harness = Self { device, memory, socket: packet_socket("tap0", IPV4), queues };
        harness.give_receive_buffers(0);
        harness
    }

    fn queue(&mut self, index: usize) -> &mut Queue {
        self.queues[index].as_mut().unwrap()
    }

    fn give_receive_buffers(&mut self, pair: usize) {
        for buffer in 0..2 * u64::from(CONNECTIONS) {
            let address = RECEIVE_BUFFERS + (pair as u64 * 256 + buffer) * 2048;
            self.queue(2 * pair).ring.add(&[Buffer { address, length: 2048, writable: true }]);
        }
        self.queue(2 * pair).notified.write(1).unwrap();
    }

    /// Sends a command through a control queue. Returns its result.
    fn command(&mut self, queue: usize, command: [u8; 4]) -> u8 {
        self.memory.write_slice(&command, GuestAddress(COMMAND)).unwrap();
        self.memory.write_obj(0xaau8, GuestAddress(ACK)).unwrap();
        let queue = self.queue(queue);
        queue.ring.add(&[
            Buffer { address: COMMAND, length: 4, writable: false },
            Buffer { address: ACK, length: 1, writable: true },
        ]);
        queue.notified.write(1).unwrap();
        wait_for_events(&[&queue.irqfd]);
        assert!(queue.ring.used().is_some_and(|(_, length)| length == 1));
        self.memory.read_obj(GuestAddress(ACK)).unwrap()
    }

    fn set_pairs(&mut self, pairs: u8) -> u8 {
        self.command(4, [4, 0, pairs, 0])
    }

    /// Sends a frame of each connection from the tap's side. Returns how many arrive at each receive queue, once all
    /// have arrived.
    fn receive_all(&mut self) -> Vec<u16> {
        for connection in 0..CONNECTIONS {
            rustix::io::write(&self.socket, &datagram(connection)).unwrap();
        }
        let mut received = vec![0; PAIRS.into()];
        while received.iter().sum::<u16>() < CONNECTIONS {
            let irqfds: Vec<_> =
                self.queues[..4].iter().step_by(2).flatten().map(|queue| queue.irqfd.as_ref()).collect();
            wait_for_events(&irqfds);
            for (queue, count) in self.queues.iter_mut().step_by(2).zip(&mut received) {
                while queue.as_mut().is_some_and(|queue| queue.ring.used().is_some()) {
                    *count += 1;
                }
            }
        }
        received
    }

    /// Sends a frame through a pair's transmit queue, and checks that it arrives.
    fn send(&mut self, pair: usize) {
        let frame = datagram(0);
        self.memory.write_slice(&[0; 12], GuestAddress(TRANSMIT_BUFFER)).unwrap();
        self.memory.write_slice(&frame, GuestAddress(TRANSMIT_BUFFER + 12)).unwrap();
        let length = 12 + u32::try_from(frame.len()).unwrap();
        let queue = self.queue(2 * pair + 1);
        queue.ring.add(&[Buffer { address: TRANSMIT_BUFFER, length, writable: false }]);
        queue.notified.write(1).unwrap();
        let mut got = vec![0; 2000];
        let length = rustix::io::read(&self.socket, &mut got).unwrap();
        assert_eq!(got[..length], frame);
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        self.device.stop();
    }
}

fn queue(memory: &GuestMemory, base: u64, size: u16) -> (Option<Queue>, Option<ActiveQueue>) {
    let (ring, active) = Ring::new(memory, base, size);
    let (notified, irqfd) = (active.notified.try_clone().unwrap(), active.interrupt.0.clone());
    (Some(Queue { ring, notified, irqfd }), Some(active))
}

/// UDP over IPv4 (RFC 791, RFC 768) from a port that depends on the connection.
fn datagram(connection: u16) -> Vec<u8> {
    const PAYLOAD: u8 = 32;
    let mut frame = [[2, 0, 0, 0, 0, 7], [2, 0, 0, 0, 0, 9]].concat();
    frame.extend(IPV4.to_be_bytes());
    frame.extend([0x45, 0, 0, 28 + PAYLOAD, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend((1000 + connection).to_be_bytes());
    frame.extend([0, 9, 0, 8 + PAYLOAD, 0, 0]);
    frame.extend([0; PAYLOAD as usize]);
    frame
}

#[test]
fn frames_reach_the_second_pair_only_while_the_driver_uses_it() {
    in_new_namespace(|| {
        let mut harness = Harness::new(0, &[]);
        harness.give_receive_buffers(1);
        assert_eq!(harness.receive_all(), [CONNECTIONS, 0]);

        assert_eq!(harness.set_pairs(2), 0);
        let received = harness.receive_all();
        assert!(received[0] > 0 && received[1] > 0, "{received:?}");
        harness.send(0);
        harness.send(1);

        assert_eq!(harness.set_pairs(1), 0);
        harness.give_receive_buffers(0);
        assert_eq!(harness.receive_all(), [CONNECTIONS, 0]);
        let counters: Vec<_> = harness.device.counters().iter().map(|(_, counter)| counter.get()).collect();
        assert_eq!((counters[0], counters[3]), (3 * u64::from(CONNECTIONS), 2));
    });
}

#[test]
fn a_driver_without_multi_queue_leaves_out_the_second_pair() {
    in_new_namespace(|| {
        let mut harness = Harness::new(feature::MQ | feature::CTRL_VQ, &[2, 3, 4]);
        assert_eq!(harness.receive_all(), [CONNECTIONS, 0]);
        harness.send(0);
    });
}

#[test]
fn without_multi_queue_the_control_queue_follows_the_first_pair_and_refuses_all() {
    in_new_namespace(|| {
        let mut harness = Harness::new(feature::MQ, &[3, 4]);
        assert_eq!(harness.command(2, [4, 0, 1, 0]), 1);
        assert_eq!(harness.command(2, [4, 0, 2, 0]), 1);
        harness.send(0);
    });
}

#[test]
fn a_driver_that_leaves_out_queues_cannot_use_their_pair() {
    in_new_namespace(|| {
        let mut harness = Harness::new(0, &[3]);
        assert_eq!(harness.set_pairs(2), 1);
        assert_eq!(harness.set_pairs(1), 0);
        let queue = harness.queue(2);
        queue.ring.add(&[Buffer { address: RECEIVE_BUFFERS, length: 2048, writable: true }]);
        assert_eq!(harness.receive_all(), [CONNECTIONS, 0]);
    });
}

#[test]
fn a_driver_without_the_first_pair_cannot_activate_the_device() {
    in_new_namespace(|| {
        make_tap("tap0", PAIRS);
        let config = NetConfig {
            netns: OWN_NETNS.into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1500,
            queue_pairs: PAIRS,
        };
        let mut device = Net::new(0, &config, &RateLimits::default()).unwrap();
        let features = device.features() | F_VERSION_1;
        let queues = (0..5).map(|_| None).collect();
        let refused =
            device.activate(Activation { memory: guest_memory(), features, queues, threads: threads() });
        assert!(matches!(refused, Err(ActivateError::Queues)));
    });
}

#[test]
fn a_pair_whose_queue_the_guest_breaks_gets_no_frames_and_the_other_all() {
    in_new_namespace(|| {
        let mut harness = Harness::new(0, &[]);
        assert_eq!(harness.set_pairs(2), 0);
        let queue = harness.queue(3);
        queue.ring.set_available(1000);
        queue.notified.write(1).unwrap();
        // The thread of the second pair ends by itself.
        harness.device.workers.remove(1).0.join().unwrap();
        assert_eq!(harness.receive_all(), [CONNECTIONS, 0]);
        harness.send(0);
        assert_eq!((harness.set_pairs(1), harness.set_pairs(2)), (0, 1));
    });
}
