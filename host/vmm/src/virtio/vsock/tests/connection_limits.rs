//! Neither a guest nor forwarded connections can use up the connections that host programs need.

use super::*;
use crate::virtio::vsock::{
    connection_limits::{ConnectionLimits, FORWARDED_MAX, Initiator},
    mux::CLOSE_TIMEOUT,
};

/// Lets the time for closing connections pass.
fn time_out(harness: &mut Harness) {
    harness.run_until_idle();
    harness.worker.mux.close_expired(Instant::now() + CLOSE_TIMEOUT);
    harness.run_until_idle();
}

#[test]
fn each_kind_of_connection_has_places_that_no_other_takes() {
    let limits = ConnectionLimits::default();
    let mut forwarded: Vec<_> =
        (0..FORWARDED_MAX).map(|_| limits.try_acquire(Initiator::PortForward).unwrap()).collect();
    assert!(limits.try_acquire(Initiator::PortForward).is_none());
    let _guest = limits.try_acquire(Initiator::Guest).unwrap();
    let host: Vec<_> = std::iter::from_fn(|| limits.try_acquire(Initiator::HostProgram)).collect();
    assert_eq!(host.len() + 1 + forwarded.len(), 1024);
    forwarded.pop();
    assert!(limits.try_acquire(Initiator::PortForward).is_some());
}

#[test]
fn a_guest_that_ignores_the_end_of_a_connection_does_not_keep_its_place() {
    let mut harness = Harness::new();
    let (stream, ports) = harness.established();
    drop(stream);
    let end = harness.received();
    assert_eq!((end.len(), end[0].0.operation, end[0].0.flags), (1, Operation::Shutdown, SHUTDOWN_BOTH));
    harness.worker.mux.close_expired(Instant::now());
    assert!(!harness.worker.mux.is_empty(), "the guest has time to answer");
    time_out(&mut harness);
    assert!(harness.worker.mux.is_empty());
    let packets = harness.received();
    assert_eq!((packets[0].0.operation, packets[0].0.ports), (Operation::Reset, ports));
}

#[test]
fn a_guest_that_takes_no_packets_does_not_keep_the_place_of_a_caller_that_has_gone() {
    let mut harness = Harness::without_buffers();
    let mut stream = harness.connect();
    stream.write_all(b"CONNECT 1024\n").unwrap();
    harness.run_until_idle();
    drop(stream);
    time_out(&mut harness);
    assert!(harness.worker.mux.is_empty());
}

#[test]
fn a_slow_reader_of_what_a_host_program_left_behind_is_not_cut_off() {
    let mut harness = Harness::new();
    let (mut stream, ports) = harness.established();
    // The guest takes four bytes, and no more for now.
    let little = Header { buf_alloc: 4, ..packet(ports, Operation::CreditUpdate) };
    harness.send(little, &[]);
    stream.write_all(b"all of it").unwrap();
    drop(stream);
    let packets = harness.received();
    assert_eq!(packets[0].1, b"all ");
    time_out(&mut harness);
    assert!(!harness.worker.mux.is_empty());
    harness.send(Header { fwd_cnt: 4, ..packet(ports, Operation::CreditUpdate) }, &[]);
    assert!(harness.received().iter().any(|(_, payload)| payload == b"of it"));
}

#[test]
fn a_connection_that_ends_in_time_leaves_nothing_to_wait_for() {
    let mut harness = Harness::new();
    let (stream, ports) = harness.established();
    drop(stream);
    harness.received();
    assert!(harness.worker.timeout().unwrap() > Duration::ZERO);
    harness.send(packet(ports, Operation::Reset), &[]);
    assert!(harness.worker.mux.is_empty());
    assert_eq!(harness.worker.timeout(), None);
}

#[test]
fn a_connection_that_has_gone_leaves_nothing_to_be_sent() {
    let mut harness = Harness::without_buffers();
    let ports = Ports { host: HOST_PORT, guest: 7 };
    harness.send(packet(ports, Operation::Request), &[]);
    harness.host = None;
    harness.run_until_idle();
    assert!(harness.worker.mux.has_output(), "the guest is to be told, when it takes packets");
    harness.send(packet(ports, Operation::Reset), &[]);
    assert!(!harness.worker.mux.has_output(), "the connection is still in the queue");
}

#[test]
fn a_guest_that_sends_without_end_is_served_in_batches() {
    let mut harness = Harness::new();
    for _ in 0..BATCH + 5 {
        harness.send_bytes(&reversed(packet(Ports { host: 1, guest: 1 }, Operation::Reset).to_guest()));
    }
    let mut taken = || std::iter::from_fn(|| harness.transmit.used()).count();
    assert!(harness.worker.handle_events(Some(Duration::ZERO)).unwrap().is_continue());
    assert!(harness.worker.move_packets().unwrap(), "there is more, after whoever else has something to say");
    assert_eq!(taken(), BATCH);
    assert!(!harness.worker.move_packets().unwrap());
    assert_eq!(taken(), 5);
}

#[test]
fn a_connection_too_many_is_closed_at_once_and_a_freed_place_is_used_again() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();

    let mut harness = Harness::new();
    let mut streams = Vec::new();
    for _ in 0..1024 {
        streams.push(harness.connect());
        harness.run_until_idle();
    }
    let mut refused = harness.connect();
    harness.run_until_idle();
    assert!(reads_end(&mut refused));
    streams.pop();
    harness.established();
}
