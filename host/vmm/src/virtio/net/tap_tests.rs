//! On real taps, in a network namespace of each test's own. They need root and the tun module, as every
//! machine with a network does.

use std::{os::fd::FromRawFd as _, time::Duration};

use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::*;
use crate::{
    config::NetConfig,
    virtio::{
        Active, Device as _, F_VERSION_1,
        net::Net,
        testing::{Buffer, RING_SIZE, Ring, guest_memory},
    },
};

/// The namespace of the thread that asks.
const OWN_NETNS: &str = "/proc/thread-self/ns/net";
/// An Ethernet type for experiments (IEEE 802), which no kernel sends by itself.
const ETHER_TYPE: u16 = 0x88b5;

/// Runs a test on a thread in a new network namespace.
fn in_new_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: only this thread's network namespace changes, and it ends with the test.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
                .expect("these tests need root");
            // A kernel without IPv6 has no such file; one with it sends frames of its own.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            test();
        });
    });
}

/// Makes a tap that stays, and switches it on.
fn make_tap(name: &str) {
    let mut request = interface_request(name).unwrap();
    let tun = open_tun().unwrap();
    // SAFETY: an ifreq that outlives the call; a number.
    unsafe {
        result(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request)).unwrap();
        result(libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1)).unwrap();
    }
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    // SAFETY: an ifreq that outlives the call.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).unwrap();
}

/// A socket that sends through an interface and receives what comes in by it.
fn packet_socket(interface: &str) -> OwnedFd {
    let protocol = ETHER_TYPE.to_be();
    // SAFETY: numbers only; the descriptor is nobody else's.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
        assert!(socket >= 0);
        OwnedFd::from_raw_fd(socket)
    };
    // SAFETY: a sockaddr_ll is made of numbers.
    let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = protocol;
    address.sll_ifindex = i32::try_from(interface_index(interface).unwrap()).unwrap();
    let size = libc::socklen_t::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the address outlives the call, and is as long as it says.
    result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) }).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_secs(10)),
    )
    .unwrap();
    socket
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 9]].concat();
    frame.extend(ETHER_TYPE.to_be_bytes());
    frame.extend((0..=250).cycle().take(length - frame.len()));
    frame
}

fn wait_for(event: &EventFd) {
    let epoll = Epoll::new().unwrap();
    let interest = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest).unwrap();
    assert_eq!(epoll.wait(10_000, &mut [interest]).unwrap(), 1, "no interrupt");
    event.read().unwrap();
}

#[test]
fn a_frame_passes_both_ways_through_a_real_tap() {
    in_new_namespace(|| {
        make_tap("tap0");
        let config =
            NetConfig { netns: OWN_NETNS.into(), tap: "tap0".into(), mac: [2, 0, 0, 0, 0, 7], mtu: 1500 };
        let mut device = Net::new(0, &config).unwrap();
        let memory = guest_memory();
        let (mut receive, receive_queue) = Ring::new(&memory, RING_SIZE, 256);
        let (mut transmit, transmit_queue) = Ring::new(&memory, 2 * RING_SIZE, 256);
        let irqfd = receive_queue.interrupt.irqfd.clone();
        let notified = transmit_queue.notified.try_clone().unwrap();
        for address in [0x10_0000, 0x20_0000, 0x30_0000] {
            receive.add(&[Buffer { address, length: 700, writable: true }]);
        }
        let features = device.features() & !crate::virtio::F_EVENT_IDX | F_VERSION_1;
        let queues = vec![Some(receive_queue), Some(transmit_queue)];
        device.activate(Active { memory: memory.clone(), features, queues }).unwrap();
        let socket = packet_socket("tap0");

        rustix::io::write(&socket, &frame(1000)).unwrap();
        wait_for(&irqfd);
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
        assert_eq!(counters, [1, 1000, 0, 1, 900, 0]);
    });
}

#[test]
fn a_header_that_does_not_fit_its_frame_is_refused_by_the_kernel() {
    in_new_namespace(|| {
        make_tap("tap0");
        let tap = Tap::open(Path::new(OWN_NETNS), "tap0").unwrap();
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
        make_tap("tap0");
        let tap = Tap::open(Path::new(OWN_NETNS), "tap0").unwrap();
        // SAFETY: a number.
        result(unsafe { libc::ioctl(tap.fd.as_raw_fd(), libc::TUNSETPERSIST, 0) }).unwrap();
        remove("tap0");
        let read = io::Error::from(rustix::io::read(&tap, &mut [0; 2000]).unwrap_err());
        assert_eq!(Failure::of_read(&read), Failure::Gone, "{read}");
        let sent = [&[0; 12][..], &frame(60)].concat();
        let write = io::Error::from(rustix::io::write(&tap, &sent).unwrap_err());
        assert_eq!(Failure::of_write(&write), Failure::Gone, "{write}");
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
        let open = |netns: &str, tap| Tap::open(Path::new(netns), tap).map(drop).unwrap_err();
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
        make_tap("tap1");
        let _holder = Tap::open(Path::new(OWN_NETNS), "tap1").unwrap();
        let error = open(OWN_NETNS, "tap1");
        assert!(matches!(error, TapError::Attach { .. }), "{error}");
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
                make_tap("tap0");
                let thread = rustix::thread::gettid().as_raw_nonzero();
                send.send(format!("/proc/self/task/{thread}/ns/net")).unwrap();
                let _ = finished.recv();
            });
        });
        let tap = Tap::open(Path::new(&receive.recv().unwrap()), "tap0");
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
