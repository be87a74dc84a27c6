//! Packets as a guest may lay them out in its queues, and queues that it breaks.

use super::*;

#[test]
fn a_packet_cut_into_many_descriptors_is_put_together() {
    let mut scene = Scene::new();
    let (mut stream, ports) = scene.established();
    let bytes = [&reversed(data(ports, b"pieces").to_guest()), &b"pieces"[..]].concat();
    scene.memory.write_slice(&bytes, GuestAddress(TRANSMIT_BUFFER)).unwrap();
    let chain: Vec<_> = [(0, 1), (1, 30), (31, 15), (46, 4)]
        .map(|(at, length)| Buffer { address: TRANSMIT_BUFFER + at, length, writable: false })
        .to_vec();
    scene.transmit.add(&chain);
    scene.turn();
    let mut text = [0; 6];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"pieces");
}

#[test]
fn a_packet_for_the_guest_is_cut_to_its_descriptors() {
    let mut scene = Scene::without_buffers();
    let chain: Vec<_> = [(0, 44), (0x1000, 2), (0x2000, 10)]
        .map(|(at, length)| Buffer { address: RECEIVE_BUFFERS + at, length, writable: true })
        .to_vec();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    scene.receive.add(&chain);
    scene.turn();
    let ports = Ports { host: 1 << 30, guest: 1024 };
    scene.send(packet(ports, Operation::Response), &[]);
    scene.receive.add(&chain);
    stream.write_all(b"0123456789abcdef").unwrap();
    scene.turn();
    assert_eq!(scene.receive.used(), Some((0, 44)));
    assert_eq!(scene.receive.used(), Some((3, 56)));
    let mut bytes = [0; 10];
    scene.memory.read_slice(&mut bytes[..2], GuestAddress(RECEIVE_BUFFERS + 0x1000)).unwrap();
    assert_eq!(&bytes[..2], b"01");
    scene.memory.read_slice(&mut bytes, GuestAddress(RECEIVE_BUFFERS + 0x2000)).unwrap();
    assert_eq!(&bytes, b"23456789ab");
}

#[test]
fn a_header_that_promises_more_than_there_is_resets_its_connection() {
    for length in [5, u32::MAX] {
        let mut scene = Scene::new();
        let (_stream, ports) = scene.established();
        scene.send(Header { length, ..packet(ports, Operation::ReadWrite) }, b"four");
        assert_eq!(scene.operations(), [Operation::Reset]);
    }
}

#[test]
fn packets_without_a_whole_header_or_outside_memory_are_dropped() {
    let mut scene = Scene::new();
    let (_stream, _) = scene.established();
    scene.send_bytes(&[0xff; 43]);
    scene.transmit.add(&[Buffer { address: 1 << 40, length: 44, writable: false }]);
    scene.transmit.add(&[Buffer { address: u64::MAX, length: u32::MAX, writable: false }]);
    scene.transmit.add(&[Buffer { address: TRANSMIT_BUFFER, length: 44, writable: true }]);
    assert_eq!(scene.operations(), []);
    for _ in 0..5 {
        assert!(scene.transmit.used().is_some());
    }
}

#[test]
fn buffers_that_cannot_hold_a_packet_are_given_back_empty() {
    let mut scene = Scene::without_buffers();
    let mut stream = scene.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    scene.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 44, writable: true }]);
    scene.receive.add(&[Buffer { address: RECEIVE_BUFFERS, length: 4096, writable: false }]);
    scene.receive.add(&[Buffer { address: 1 << 40, length: 4096, writable: true }]);
    scene.turn();
    for head in 0..3 {
        assert_eq!(scene.receive.used(), Some((head, 0)));
    }
}

#[test]
fn a_guest_that_breaks_a_ring_stops_the_device() {
    let mut scene = Scene::new();
    scene.transmit.set_available(1000);
    assert!(scene.worker.move_packets().is_err());

    let mut scene = Scene::new();
    scene.transmit.offer(QUEUE);
    assert!(scene.worker.move_packets().is_err());

    let mut scene = Scene::new();
    scene.receive.set_available(5000);
    scene.send_bytes(&reversed(packet(Ports { host: 1, guest: 1 }, Operation::Response).to_guest()));
    assert!(scene.worker.move_packets().is_err());
}

#[test]
fn a_chain_that_runs_in_a_circle_ends() {
    let mut scene = Scene::new();
    let piece = Buffer { address: TRANSMIT_BUFFER, length: 1, writable: false };
    let chain = vec![piece; usize::from(QUEUE)];
    let head = scene.transmit.add(&chain);
    // The last descriptor now also says that another follows: the first.
    let last = TRANSMIT_RING + u64::from(QUEUE - 1) * 16;
    scene.memory.write_obj(1u16, GuestAddress(last + 12)).unwrap();
    scene.turn();
    assert_eq!(scene.transmit.used(), Some((head, 0)));
}

#[test]
fn a_stopped_worker_returns() {
    let scene = Scene::new();
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    scene.worker.mux.wait_context().add(&stop, Token::Stop).unwrap();
    let thread = std::thread::spawn(move || scene.worker.run());
    stop.write(1).unwrap();
    thread.join().unwrap();
}
