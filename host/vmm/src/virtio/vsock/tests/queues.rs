//! Packets as a guest may lay them out in its queues, and queues that it breaks.

use super::*;

#[test]
fn a_packet_cut_into_many_descriptors_is_put_together() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    let bytes = [&reversed(data(ports, b"pieces").to_guest()), &b"pieces"[..]].concat();
    harness.memory.write_slice(&bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
    let chain: Vec<_> = [(0, 1), (1, 30), (31, 15), (46, 4)]
        .map(|(at, length)| Buffer { address: TRANSMIT_BUFFER + at, length, writable: false })
        .to_vec();
    harness.transmit.add(&chain);
    harness.run_until_idle();
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"pieces");
}

#[test]
fn a_packet_for_the_guest_is_cut_to_its_descriptors() {
    let mut harness = Harness::without_buffers();
    let chain: Vec<_> = [(0, 44), (0x1000, 2), (0x2000, 10)]
        .map(|(at, length)| Buffer { address: RECEIVE_BUFFERS + at, length, writable: true })
        .to_vec();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    harness.receive.add(&chain);
    harness.run_until_idle();
    let ports = Ports { host: 1 << 30, guest: 1024 };
    harness.send(packet(ports, Operation::Response), &[]);
    harness.receive.add(&chain);
    stream.write_all(b"0123456789abcdef").unwrap();
    harness.run_until_idle();
    assert_eq!(harness.receive.used(), Some((0, 44)));
    assert_eq!(harness.receive.used(), Some((3, 56)));
    let mut bytes = [0; 10];
    harness.memory.read_slice(&mut bytes[..2], GuestAddress(RECEIVE_BUFFERS + 0x1000)).unwrap();
    assert_eq!(&bytes[..2], b"01");
    harness.memory.read_slice(&mut bytes, GuestAddress(RECEIVE_BUFFERS + 0x2000)).unwrap();
    assert_eq!(&bytes, b"23456789ab");
}

#[test]
fn a_header_that_promises_more_than_there_is_resets_its_connection() {
    for length in [5, u32::MAX] {
        let mut harness = Harness::new();
        let (_stream, ports) = harness.established();
        harness.send(Header { length, ..packet(ports, Operation::ReadWrite) }, b"four");
        assert_eq!(harness.operations(), [Operation::Reset]);
    }
}

#[test]
fn packets_without_a_whole_header_or_outside_memory_are_dropped() {
    let mut harness = Harness::new();
    let (_stream, _) = harness.established();
    harness.send_bytes(&[0xff; 43]);
    harness.transmit.add(&[Buffer { address: 1 << 40, length: 44, writable: false }]);
    harness.transmit.add(&[Buffer { address: u64::MAX, length: u32::MAX, writable: false }]);
    harness.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length: 44, writable: true }]);
    assert_eq!(harness.operations(), []);
    for _ in 0..5 {
        assert!(harness.transmit.used().is_some());
    }
}

#[test]
fn buffers_that_cannot_hold_a_packet_are_given_back_empty() {
    let mut harness = Harness::without_buffers();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    harness.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 44, writable: true }]);
    harness.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 4096, writable: false }]);
    harness.receive.add(&[Buffer { address: 1 << 40, length: 4096, writable: true }]);
    harness.run_until_idle();
    for head in 0..3 {
        assert_eq!(harness.receive.used(), Some((head, 0)));
    }
}

#[test]
fn a_guest_that_breaks_a_ring_stops_the_device() {
    let mut harness = Harness::new();
    harness.transmit.set_available(1000);
    assert!(harness.worker.move_packets().is_err());

    let mut harness = Harness::new();
    harness.transmit.offer(QUEUE);
    assert!(harness.worker.move_packets().is_err());

    let mut harness = Harness::new();
    harness.receive.set_available(5000);
    harness.send_bytes(&reversed(packet(Ports { host: 1, guest: 1 }, Operation::Response).to_guest()));
    assert!(harness.worker.move_packets().is_err());
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let mut harness = Harness::new();
    let piece = Buffer { address: TRANSMIT_BUFFER, length: 1, writable: false };
    let chain = vec![piece; usize::from(QUEUE)];
    let head = harness.transmit.add(&chain);
    // The last descriptor now also says that another follows: the first.
    let last = TRANSMIT_RING + u64::from(QUEUE - 1) * 16;
    harness.memory.write_obj(1u16, GuestAddress(last + 12)).unwrap();
    harness.run_until_idle();
    assert_eq!(harness.transmit.used(), Some((head, 0)));
}

#[test]
fn a_stopped_worker_returns() {
    let harness = Harness::new();
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    harness.worker.mux.wait_context().add(&stop, Token::Stop).unwrap();
    let thread = std::thread::spawn(move || harness.worker.run());
    stop.write(1).unwrap();
    thread.join().unwrap();
}
