//! Neither side is sent more than it has room for, and who does not read delays nobody else.

use super::*;

#[test]
fn the_guest_is_sent_no_more_than_it_has_room_for_and_asked_once_for_more() {
    let mut harness = Harness::new();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    let ports = harness.received()[0].0.ports;
    let room = |fwd_cnt| Header { buf_alloc: 10, fwd_cnt, ..packet(ports, Operation::CreditUpdate) };
    harness.send(Header { buf_alloc: 10, ..packet(ports, Operation::Response) }, &[]);
    stream.write_all(&pattern(25)).unwrap();

    let packets = harness.received();
    assert_eq!(packets[0].1, pattern(25)[..10]);
    assert_eq!(packets[1].0.operation, Operation::CreditRequest);
    // A guest whose program does not read answers at once, with nothing: no packets to and fro.
    for _ in 0..3 {
        harness.send(room(0), &[]);
        assert_eq!(harness.operations(), []);
    }
    harness.send(room(10), &[]);
    let packets = harness.received();
    assert_eq!(packets[0].1, pattern(25)[10..20]);
    assert_eq!(packets[1].0.operation, Operation::CreditRequest);
    harness.send(room(15), &[]);
    assert_eq!(harness.received()[0].1, pattern(25)[20..]);
}

#[test]
fn a_guest_that_claims_to_have_read_more_than_it_was_sent_gets_nothing() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    harness.send(Header { fwd_cnt: 5, buf_alloc: 100, ..packet(ports, Operation::CreditUpdate) }, &[]);
    stream.write_all(b"data").unwrap();
    assert_eq!(harness.operations(), [Operation::CreditRequest]);
}

#[test]
fn a_host_program_that_does_not_read_holds_up_only_itself() {
    let mut harness = Harness::new();
    let (mut slow, slow_ports) = harness.established();
    let (mut quick, quick_ports) = harness.established();
    let all = pattern(8 << 20);
    let mut sent = 0;
    let mut forwarded = 0;
    // As much as the device gives credit for: what the socket takes, and one buffer.
    while sent - forwarded < BUF_ALLOC as usize {
        let chunk = &all[sent..sent + 32 * 1024];
        harness.send(data(slow_ports, chunk), chunk);
        sent += chunk.len();
        for (header, _) in harness.received() {
            forwarded = header.fwd_cnt as usize;
        }
        assert!(sent < 4 << 20, "the device takes everything");
    }
    harness.send(data(quick_ports, b"quick"), b"quick");
    let mut bytes = [0; 5];
    quick.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"quick");

    // Once it reads, it gets all of it, in order, and the guest gets its credit back.
    let mut taken = vec![0; sent];
    let mut count = 0;
    slow.set_nonblocking(true).unwrap();
    while count < sent {
        harness.run_until_idle();
        count += slow.read(&mut taken[count..]).unwrap_or(0);
    }
    assert!(taken == all[..sent], "the data arrived changed");
    let last = harness.received().last().unwrap().0;
    assert_eq!(last.operation, Operation::CreditUpdate);
    assert!(sent - last.fwd_cnt as usize <= BUF_ALLOC as usize / 4);
}

#[test]
fn what_a_guest_sent_before_it_reset_the_connection_still_arrives() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    let chunk = pattern(60 * 1024);
    let mut sent = 0;
    let mut forwarded = 0;
    while sent + chunk.len() - forwarded <= BUF_ALLOC as usize {
        harness.send(data(ports, &chunk), &chunk);
        sent += chunk.len();
        for (header, _) in harness.received() {
            forwarded = header.fwd_cnt as usize;
        }
    }
    assert!(forwarded < sent, "nothing is waiting in the device");
    harness.send(packet(ports, Operation::Reset), &[]);
    // The guest may take the ports for another stream at once, while the first is still being written.
    let mut count = 0;
    let mut bytes = vec![0; 1 << 20];
    stream.set_nonblocking(true).unwrap();
    for _ in 0..1000 {
        harness.run_until_idle();
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(length) => count += length,
            Err(_) => {}
        }
    }
    assert_eq!(count, sent);
    assert!(harness.worker.mux.is_empty());
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut harness = Harness::new();
    let (stream, ports) = harness.established();
    let chunk = pattern(PAYLOAD_MAX);
    for _ in 0..20 {
        harness.send(data(ports, &chunk), &chunk);
    }
    assert!(harness.operations().contains(&Operation::Reset));
    drop(stream);
}

#[test]
fn megabytes_arrive_unchanged_in_both_directions() {
    let mut harness = Harness::new();
    let (stream, ports) = harness.established();
    let all = pattern(3 << 20);
    let sender = {
        let (mut stream, all) = (stream.try_clone().unwrap(), all.clone());
        std::thread::spawn(move || stream.write_all(&all).unwrap())
    };
    let receiver = {
        let (mut stream, length) = (stream, all.len());
        std::thread::spawn(move || {
            let mut bytes = vec![0; length];
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            stream.read_exact(&mut bytes).unwrap();
            bytes
        })
    };
    let (mut got, mut sent, mut forwarded) = (Vec::new(), 0, 0);
    while got.len() < all.len() || sent < all.len() {
        for (header, payload) in harness.received() {
            got.extend(payload);
            forwarded = header.fwd_cnt as usize;
        }
        let fwd_cnt = u32::try_from(got.len()).unwrap();
        let length = (all.len() - sent).min(BUF_ALLOC as usize - (sent - forwarded)).min(PAYLOAD_MAX);
        let header = Header { fwd_cnt, ..data(ports, &all[sent..sent + length]) };
        harness.send(header, &all[sent..sent + length]);
        sent += length;
    }
    sender.join().unwrap();
    assert!(got == all, "the guest got other data");
    // What the device holds goes on its way only as the host program makes room.
    while !receiver.is_finished() {
        harness.run_until_idle();
        std::thread::yield_now();
    }
    assert!(receiver.join().unwrap() == all, "the host program got other data");
}

#[test]
fn resets_that_the_guest_does_not_take_hold_up_only_its_own_packets() {
    let mut harness = Harness::without_buffers();
    let header = |guest| packet(Ports { host: 7, guest }, Operation::ReadWrite);
    let mut taken = 0;
    for guest in 0..1000 {
        harness.send(header(guest), &[]);
        while harness.transmit.used().is_some() {
            taken += 1;
        }
        if taken <= guest {
            break;
        }
    }
    assert_eq!(taken, 256);
    // A reset that goes out lets a packet in.
    harness.give_buffer(RECEIVE_BUFFERS);
    assert_eq!(harness.operations(), [Operation::Reset]);
    while harness.transmit.used().is_some() {
        taken += 1;
    }
    assert!(taken > 256);
}
