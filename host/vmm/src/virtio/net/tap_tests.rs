//! The device on real taps.

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::{
    config::{NetConfig, RateLimits},
    virtio::{
        Activation, Device as _, F_VERSION_1,
        net::{
            Net,
            testing::{OWN_NETNS, in_new_namespace, make_tap, packet_socket, switch_on, wait_for_events},
        },
        testing::{Buffer, RING_SIZE, Ring, guest_memory, threads},
    },
};

/// An Ethernet type for experiments (IEEE 802). No kernel sends frames of it by itself.
const ETHER_TYPE: u16 = 0x88b5;

fn frame(length: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 9]].concat();
    frame.extend(ETHER_TYPE.to_be_bytes());
    frame.extend((0..=250).cycle().take(length - frame.len()));
    frame
}

/// A tap with a single queue.
fn open(name: &str) -> Result<Tap, TapError> {
    Tap::open(Path::new(OWN_NETNS), name, 1).map(|mut taps| taps.remove(0))
}

#[test]
fn a_frame_passes_both_ways_through_a_real_tap() {
    in_new_namespace(|| {
        make_tap("tap0", 1);
        let config = NetConfig {
            netns: OWN_NETNS.into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1500,
            queue_pairs: 1,
        };
        let mut device = Net::new(0, &config, &RateLimits::default()).unwrap();
        switch_on("tap0");
        let memory = guest_memory();
        let (mut receive, receive_queue) = Ring::new(&memory, RING_SIZE, 256);
        let (mut transmit, transmit_queue) = Ring::new(&memory, 2 * RING_SIZE, 256);
        let irqfd = receive_queue.interrupt.0.clone();
        let notified = transmit_queue.notified.try_clone().unwrap();
        for address in [0x10_0000, 0x20_0000, 0x30_0000] {
            receive.add(&[Buffer { address, length: 700, writable: true }]);
        }
        let features = device.features() & !crate::virtio::F_EVENT_IDX | F_VERSION_1;
        let queues = vec![Some(receive_queue), Some(transmit_queue)];
        device.activate(Activation { memory: memory.clone(), features, queues, threads: threads() }).unwrap();
        let socket = packet_socket("tap0", ETHER_TYPE);

        rustix::io::write(&socket, &frame(1000)).unwrap();
        wait_for_events(&[&irqfd]);
        let (Some((0, 700)), Some((1, 312))) = (receive.used(), receive.used()) else {
            panic!("the frame fills two buffers")
        };
        let mut got = vec![0; 1000];
        memory.read_slice(&mut got[..688], GuestAddress(0x10_000c)).unwrap();
        memory.read_slice(&mut got[688..], GuestAddress(0x20_0000)).unwrap();
        assert_eq!(got, frame(1000));
        assert_eq!(memory.read_obj::<u16>(GuestAddress(0x10_000a)).unwrap(), 2);

        memory.write_slice(&[0; 12], GuestAddress(0x80_0000)).unwrap();
        memory.write_slice(&frame(900), GuestAddress(0x80_000c)).unwrap();
        transmit.add(&[
            Buffer { address: 0x80_0000, length: 15, writable: false },
            Buffer { address: 0x80_000f, length: 897, writable: false },
        ]);
        notified.write(1).unwrap();
        let mut got = vec![0; 2000];
        let length = rustix::io::read(&socket, &mut got).unwrap();
        assert_eq!(got[..length], frame(900));

        device.stop();
        let counters: Vec<_> = device.counters().iter().map(|(_, counter)| counter.get()).collect();
        assert_eq!(counters, [1, 1000, 0, 1, 900, 0, 0, 0]);
    });
}

#[test]
fn to_detach_a_queue_waits_for_whoever_moves_its_frames() {
    in_new_namespace(|| {
        make_tap("tap0", 2);
        let taps = Tap::open(Path::new(OWN_NETNS), "tap0", 2).unwrap();
        taps[1].attach_queue().unwrap();
        let moving = taps[1].lock_receiving();
        std::thread::scope(|scope| {
            let detached = scope.spawn(|| taps[1].detach_queue().unwrap());
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(!detached.is_finished());
            drop(moving);
            detached.join().unwrap();
        });
    });
}

#[test]
fn a_header_that_does_not_fit_its_frame_is_refused_by_the_kernel() {
    in_new_namespace(|| {
        make_tap("tap0", 1);
        let tap = open("tap0").unwrap();
        switch_on("tap0");
        let send = |header: [u8; 12]| rustix::io::write(&tap, &[&header[..], &frame(60)].concat());
        send([0; 12]).unwrap();
        // A checksum beyond the end of the frame; a header longer than it; an unknown kind of segment.
        for header in [
            [1, 0, 0, 0, 0, 0, 200, 0, 16, 0, 0, 0],
            [0, 1, 0xff, 0xff, 8, 0, 0, 0, 0, 0, 0, 0],
            [0, 0x7f, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
        ] {
            assert_eq!(send(header), Err(Errno::INVAL), "{header:?}");
        }
    });
}

#[test]
fn a_tap_that_is_removed_is_gone_for_reads_and_writes() {
    in_new_namespace(|| {
        make_tap("tap0", 1);
        let tap = open("tap0").unwrap();
        switch_on("tap0");
        // SAFETY: a number.
        result(unsafe { libc::ioctl(tap.fd.as_raw_fd(), libc::TUNSETPERSIST, 0) }).unwrap();
        remove("tap0");
        let read = io::Error::from(rustix::io::read(&tap, &mut [0; 2000]).unwrap_err());
        assert_eq!(TapFailure::of_read(&read), TapFailure::Gone, "{read}");
        let sent = [&[0; 12][..], &frame(60)].concat();
        let write = io::Error::from(rustix::io::write(&tap, &sent).unwrap_err());
        assert_eq!(TapFailure::of_write(&write), TapFailure::Gone, "{write}");
    });
}

/// Removes an interface of the thread's namespace (`RTM_DELLINK`).
fn remove(interface: &str) {
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap().to_ne_bytes());
    message.extend([0; 8]);
    // An ifinfomsg.
    message.extend([0; 4]);
    message.extend(interface_index(interface).unwrap().to_ne_bytes());
    message.extend([0; 8]);
    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).unwrap();
    rustix::io::write(&socket, &message).unwrap();
    let mut answer = [0; 64];
    rustix::io::read(&socket, &mut answer).unwrap();
    assert_eq!(answer[16..20], [0; 4], "the kernel does not remove the interface");
}

#[test]
fn what_is_missing_is_named() {
    in_new_namespace(|| {
        let open = |netns: &str, tap| Tap::open(Path::new(netns), tap, 1).map(drop).unwrap_err();
        let error = open("/run/netns/gone", "tap0");
        assert!(matches!(error, TapError::Netns { .. }) && error.to_string().contains("/run/netns/gone"));
        let error = open("/proc/self/status", "tap0");
        assert!(matches!(error, TapError::Enter { .. }), "{error}");
        let error = open(OWN_NETNS, "tap0");
        assert!(matches!(error, TapError::Missing { .. }) && error.to_string().contains("tap0"), "{error}");
        // Asking does not make it.
        assert!(interface_index("tap0").is_err());
        let error = open(OWN_NETNS, "lo");
        assert!(matches!(error, TapError::Attach { .. }), "{error}");
        let error = open(OWN_NETNS, "a-name-that-is-too-long");
        assert!(matches!(error, TapError::Name { .. }), "{error}");
        make_tap("tap1", 1);
        let _holder = self::open("tap1").unwrap();
        let error = open(OWN_NETNS, "tap1");
        assert!(matches!(error, TapError::Attach { .. }), "{error}");
    });
}

#[test]
fn a_tap_with_one_queue_is_none_with_several() {
    in_new_namespace(|| {
        for (made, asked) in [(1, 2), (2, 1)] {
            let name = format!("tap{made}");
            make_tap(&name, made);
            let error = Tap::open(Path::new(OWN_NETNS), &name, asked).map(drop).unwrap_err();
            assert!(matches!(error, TapError::Attach { queues, .. } if queues == asked), "{error}");
            assert_eq!(Tap::open(Path::new(OWN_NETNS), &name, made).unwrap().len(), usize::from(made));
        }
    });
}

#[test]
fn a_detached_queue_holds_no_frame_and_still_sends() {
    in_new_namespace(|| {
        make_tap("tap0", 2);
        let taps = Tap::open(Path::new(OWN_NETNS), "tap0", 2).unwrap();
        switch_on("tap0");
        let socket = packet_socket("tap0", ETHER_TYPE);
        let read = |tap: &Tap| rustix::io::read(tap, &mut [0; 2000]);

        // All frames of this kind belong together: they come by the queue that is attached.
        rustix::io::write(&socket, &frame(100)).unwrap();
        assert_eq!((read(&taps[0]), read(&taps[1])), (Ok(112), Err(Errno::AGAIN)));
        taps[1].attach_queue().unwrap();
        taps[0].detach_queue().unwrap();
        rustix::io::write(&socket, &frame(100)).unwrap();
        assert_eq!((read(&taps[0]), read(&taps[1])), (Err(Errno::AGAIN), Ok(112)));
        rustix::io::write(&socket, &frame(100)).unwrap();
        taps[1].detach_queue().unwrap();
        assert_eq!(read(&taps[1]), Err(Errno::AGAIN));

        rustix::io::write(&taps[1], &[&[0; 12][..], &frame(60)].concat()).unwrap();
        let mut got = vec![0; 2000];
        let length = rustix::io::read(&socket, &mut got).unwrap();
        assert_eq!(got[..length], frame(60));
    });
}

#[test]
fn the_caller_stays_in_its_namespace() {
    let own = std::fs::read_link(OWN_NETNS).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let (done, finished) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            in_new_namespace(move || {
                make_tap("tap0", 1);
                let thread = rustix::thread::gettid().as_raw_nonzero();
                send.send(format!("/proc/self/task/{thread}/ns/net")).unwrap();
                let _ = finished.recv();
            });
        });
        let tap = Tap::open(Path::new(&receive.recv().unwrap()), "tap0", 1);
        drop(done);
        assert!(tap.is_ok());
        assert_eq!(std::fs::read_link(OWN_NETNS).unwrap(), own);
    });
}

#[test]
fn the_tap_does_only_what_the_driver_has_accepted() {
    use feature::{GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6};
    assert_eq!(offload_flags(0), 0);
    assert_eq!(offload_flags(GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6), 0);
    assert_eq!(offload_flags(GUEST_CSUM), libc::TUN_F_CSUM);
    assert_eq!(offload_flags(GUEST_CSUM | GUEST_TSO6), libc::TUN_F_CSUM | libc::TUN_F_TSO6);
    assert_eq!(offload_flags(GUEST_CSUM | GUEST_USO4), libc::TUN_F_CSUM);
    assert_eq!(offload_flags(u64::MAX), ALL_OFFLOADS);
}
