//! How requests are served: what is checked is what is executed, and no guest can keep its device.

use std::{num::NonZeroU64, ops::ControlFlow, sync::Arc, time::Instant};

use virtiofsd::{
    fuse::{CopyfilerangeIn, ForgetIn, MkdirIn, ReadIn, WriteIn},
    passthrough,
    server::Server,
};

use super::*;
use crate::virtio::{Counter, fs::staging::Staging};

fn mkdir(name: &str) -> Vec<u8> {
    let body = [MkdirIn { mode: 0o700, umask: 0 }.as_slice(), &string(name)].concat();
    let header = InHeader {
        len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
        opcode: Opcode::Mkdir as u32,
        nodeid: ROOT_ID,
        ..InHeader::default()
    };
    [header.as_slice(), &body].concat()
}

/// The file system of a server. The calling thread must serve it.
pub fn checked_fs(share: &Path) -> CheckedFs {
    let config =
        passthrough::Config { root_dir: share.to_str().unwrap().into(), ..passthrough::Config::default() };
    let passthrough = PassthroughFs::new(config).unwrap();
    passthrough.open_root_node().unwrap();
    CheckedFs::new(passthrough, Counter::default())
}

fn server(share: &Path) -> Arc<Server<CheckedFs>> {
    Arc::new(Server::new(checked_fs(share)))
}

#[test]
fn what_the_guest_changes_after_it_was_checked_is_not_done() {
    let directory = directory_with_share();
    let server = server(&directory.path().join("share"));
    let memory = guest_memory();
    let (mut ring, [_, mut queue]) = queues(&memory);
    let mut staging = Staging::new(&memory).unwrap();
    let asked = mkdir("asked");
    memory.write_slice(&asked, GuestAddress(REQUEST)).unwrap();
    let length = u32::try_from(asked.len()).unwrap();
    ring.add(&[
        Buffer { address: REQUEST, length, writable: false },
        Buffer { address: REPLY, length: ROOM, writable: true },
    ]);

    let chain = queue.pop(&memory).unwrap().unwrap();
    let request = staging.copy_request(&memory, chain).unwrap();
    let room = request::check(&request).unwrap();
    // The guest changes the request, and where its buffers are.
    memory.write_slice(&mkdir("other"), GuestAddress(REQUEST)).unwrap();
    memory.write_slice(&[0xff; 64], GuestAddress(2 * RING_SIZE)).unwrap();
    let (reader, writer) = staging.reader_and_writer(room).unwrap();
    server.handle_message(reader, writer, None::<&mut ()>).unwrap();

    let share = directory.path().join("share");
    assert!(share.join("asked").is_dir());
    assert!(!share.join("other").exists());
    let reply: u32 = memory.read_obj(GuestAddress(REPLY + 4)).unwrap();
    assert_eq!(reply, 0);
}

#[test]
fn a_guest_that_never_stops_asking_does_not_keep_its_device() {
    let directory = directory_with_share();
    let memory = guest_memory();
    let (mut ring, queues) = queues(&memory);
    let notify = queues[1].notified.try_clone().unwrap();
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let counters = Counters::default();
    let requests = counters.requests.clone();
    let server = server(&directory.path().join("share"));
    let throttle = Throttle::default();
    let mut worker = worker::Worker::new(memory.clone(), queues, server, counters, throttle, &stop).unwrap();
    for _ in 0..200 {
        ring.add(&[Buffer { address: REQUEST, length: 8, writable: false }]);
    }
    notify.write(1).unwrap();
    assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Continue(()));
    assert_eq!(requests.get(), worker::BATCH as u64);
    // Without another notification.
    assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Continue(()));
    assert_eq!(requests.get(), 2 * worker::BATCH as u64);
    stop.write(1).unwrap();
    assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Break(()));
    assert_eq!(requests.get(), 2 * worker::BATCH as u64);
}

/// A request in guest memory.
fn write_request(memory: &GuestMemory, address: u64, opcode: Opcode, body: &[u8]) -> Buffer {
    let length = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len: length, opcode: opcode as u32, nodeid: ROOT_ID, ..InHeader::default() };
    memory.write_slice(&[header.as_slice(), body].concat(), GuestAddress(address)).unwrap();
    Buffer { address, length, writable: false }
}

#[test]
fn requests_beyond_the_limit_wait_and_those_of_the_high_priority_queue_do_not() {
    let directory = directory_with_share();
    let memory = guest_memory();
    let (mut urgent_ring, urgent) = Ring::new(&memory, RING_SIZE, 256);
    let (mut ring, requests) = Ring::new(&memory, 2 * RING_SIZE, QUEUE);
    let notify = [&urgent, &requests].map(|queue| queue.notified.try_clone().unwrap());
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let limit = RateLimit { operations_per_second: NonZeroU64::new(1), ..RateLimit::default() };
    let start = Instant::now();
    let throttle = Throttle::new(&limit);
    let server = server(&directory.path().join("share"));
    let mut worker =
        worker::Worker::new(memory.clone(), [urgent, requests], server, Counters::default(), throttle, &stop)
            .unwrap();
    for _ in 0..100 {
        ring.add(&[Buffer { address: REQUEST, length: 8, writable: false }]);
    }
    let forget = write_request(&memory, 2 * REQUEST, Opcode::Forget, ForgetIn { nlookup: 1 }.as_slice());
    for _ in 0..20 {
        for _ in 0..10 {
            urgent_ring.add(&[forget]);
        }
        for queue in &notify {
            queue.write(1).unwrap();
        }
        assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Continue(()));
        let forgotten = std::iter::from_fn(|| urgent_ring.used()).count();
        assert_eq!(forgotten, 10);
    }
    let replies = std::iter::from_fn(|| ring.used()).count() as u64;
    assert!((1..=2 + start.elapsed().as_secs()).contains(&replies), "{replies} replies");
    stop.write(1).unwrap();
    assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Break(()));
}

#[test]
fn the_high_priority_queue_takes_no_requests_that_have_a_limit() {
    let directory = directory_with_share();
    let memory = guest_memory();
    let (mut ring, urgent) = Ring::new(&memory, RING_SIZE, 16);
    let (_, requests) = Ring::new(&memory, 2 * RING_SIZE, QUEUE);
    let notify = urgent.notified.try_clone().unwrap();
    let stop = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let server = server(&directory.path().join("share"));
    let (counters, throttle) = (Counters::default(), Throttle::default());
    let queues = [urgent, requests];
    let mut worker = worker::Worker::new(memory.clone(), queues, server, counters, throttle, &stop).unwrap();
    let body = mkdir("asked").split_off(size_of::<InHeader>());
    let request = write_request(&memory, REQUEST, Opcode::Mkdir, &body);
    ring.add(&[request, Buffer { address: REPLY, length: ROOM, writable: true }]);
    notify.write(1).unwrap();
    assert_eq!(worker.serve_pending().unwrap(), ControlFlow::Continue(()));
    assert_eq!(ring.used(), Some((0, 16)));
    assert_eq!(memory.read_obj::<i32>(GuestAddress(REPLY + 4)).unwrap(), -libc::EINVAL);
    assert!(!directory.path().join("share/asked").exists());
}

#[test]
fn data_that_is_read_written_and_copied_is_limited_and_other_requests_are_not() {
    const PIECE: u32 = 4096;
    let directory = directory_with_share();
    fs::write(directory.path().join("share/source"), vec![7; 1 << 16]).unwrap();
    let limit = RateLimit { bytes_per_second: NonZeroU64::new(100 << 10), ..RateLimit::default() };
    let start = Instant::now();
    let mut guest = Guest::with_limit(directory, &limit);
    assert_eq!(guest.ask(Opcode::Init, 0, &init(7, 38, FsOptions::all())).error, 0);
    let (source, target) = (guest.find("source"), guest.find("file"));
    let from = guest.open(Opcode::Open, source, libc::O_RDONLY);
    let to = guest.open(Opcode::Open, target, libc::O_RDWR);
    assert_eq!(guest.device.throttle.throttled().get(), 0);
    for _ in 0..4 {
        let read = ReadIn { fh: from, size: PIECE, ..ReadIn::default() };
        let data = guest.ask_with_room(Opcode::Read as u32, source, read.as_slice(), 16 + PIECE).body;
        let write = WriteIn { fh: to, size: PIECE, ..WriteIn::default() };
        let body = [write.as_slice(), &data].concat();
        assert_eq!(guest.ask(Opcode::Write, target, &body).error, 0);
        let copy = CopyfilerangeIn {
            fh_in: from,
            off_in: 0,
            nodeid_out: target,
            fh_out: to,
            off_out: 0,
            len: PIECE.into(),
            flags: 0,
        };
        assert_eq!(guest.ask(Opcode::CopyFileRange, source, copy.as_slice()).error, 0);
    }
    let moved = 12 * u64::from(PIECE);
    assert_eq!(guest.device.counters.data_bytes.get(), moved);
    // The bucket holds a tenth of the rate, and the last piece may overdraw it.
    let least = Duration::from_millis((moved - u64::from(PIECE) - (10 << 10)) * 1000 / (100 << 10));
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    assert!(guest.device.throttle.throttled().get() > 0);
}
