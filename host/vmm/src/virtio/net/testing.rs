//! Real taps, each test's in a network namespace of its own. They need root and the tun module, as every machine with a
//! network does.

use std::{
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};

use rustix::net::{AddressFamily, SocketType};
use vmm_sys_util::eventfd::EventFd;

use super::tap::{interface_index, interface_request, open_tun, result};
use crate::virtio::wait_context::{WaitContext, event_tokens};

event_tokens! {
    enum Token {
        AnyEvent,
    }
}

/// The network namespace of the calling thread.
pub const OWN_NETNS: &str = "/proc/thread-self/ns/net";

/// Runs a test on a thread in a new network namespace.
pub fn in_new_namespace(test: impl FnOnce() + Send) {
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

/// Makes a persistent tap with one or several queues.
pub fn make_tap(name: &str, queues: u16) {
    let request = interface_request(name, queues).unwrap();
    let tun = open_tun().unwrap();
    // SAFETY: an ifreq that outlives the call; a number.
    unsafe {
        result(libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request)).unwrap();
        result(libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1)).unwrap();
    }
}

/// Switches a tap on, which must be attached by now. If a tap that is on were attached, the kernel would finish that a
/// little later, and lose all frames until then.
pub fn switch_on(name: &str) {
    let mut request = interface_request(name, 1).unwrap();
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap();
    // SAFETY: an ifreq that outlives the call.
    result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).unwrap();
}

/// A socket that sends frames of an Ethernet type through an interface, and receives those that arrive at it.
pub fn packet_socket(interface: &str, ether_type: u16) -> OwnedFd {
    let protocol = ether_type.to_be();
    // SAFETY: numbers only; the descriptor is nobody else's.
    let socket = unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol.into());
        assert!(socket >= 0);
        OwnedFd::from_raw_fd(socket)
    };
    // SAFETY: a sockaddr_ll is made of numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
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

/// Waits until one of the events is written, and reads all of them.
pub fn wait_for_events(events: &[&EventFd]) {
    let wait_context = WaitContext::new().unwrap();
    for event in events {
        wait_context.add(*event, Token::AnyEvent).unwrap();
    }
    let count = wait_context.wait::<1>(Some(Duration::from_secs(10))).unwrap().count();
    assert_ne!(count, 0, "no interrupt");
    for event in events {
        let _ = event.read();
    }
}
