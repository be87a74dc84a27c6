//! How requests are served: what is checked is what is executed, and no guest can keep its device.

use std::{ops::ControlFlow, sync::Arc};

use virtiofsd::{fuse::MkdirIn, passthrough, server::Server};

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
    CheckedFs::new(passthrough)
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
    let requests = Counter::default();
    let server = server(&directory.path().join("share"));
    let mut worker = worker::Worker::new(memory.clone(), queues, server, requests.clone(), &stop).unwrap();
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
