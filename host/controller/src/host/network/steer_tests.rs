//! With real network namespaces and programs: these tests need root and a kernel that takes BPF programs.

use std::{
    io::{ErrorKind, Write as _},
    net::{IpAddr, TcpStream},
};

use rtnetlink::LinkUnspec;

use super::*;
use crate::host::network::{
    LOOPBACK, set_up,
    tests::{Netns, add_address},
};

/// Begins to steer in a namespace of its own; `None` where this machine's kernel does not let anybody.
fn steered(netns: &Netns) -> Option<PortForward> {
    if let Err(error) = probe() {
        // Not captured, unlike what `eprintln!` writes: `scripts/test` tells it at its end.
        let _ = writeln!(io::stderr(), "\nskipped: {}", crate::telemetry::error_chain::chain(&error));
        return None;
    }
    Some(netns.with(async |_| steer()).unwrap())
}

/// Whether connections to localhost's port 80 are refused, over IPv4 and over IPv6.
fn refused(netns: &Netns) -> [bool; 2] {
    ["127.0.0.1", "::1"]
        .map(|ip| dial(netns, ip, 80).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused))
}

fn dial(netns: &Netns, ip: &str, port: u16) -> io::Result<TcpStream> {
    let ip: IpAddr = ip.parse().unwrap();
    netns.with(async |_| TcpStream::connect((ip, port)))
}

#[test]
fn a_connection_to_any_port_of_localhost_arrives_with_its_port() {
    let netns = Netns::new();
    let Some(forward) = steered(&netns) else { return };
    let own = forward.listener.local_addr().unwrap().port();
    for ip in ["127.0.0.1", "127.9.9.9", "::1"] {
        for port in [1, 80, 8080, own, 65535] {
            let dialled = dial(&netns, ip, port).unwrap();
            let (accepted, from) = forward.listener.accept().unwrap();
            assert_eq!(accepted.local_addr().unwrap().port(), port, "{ip}");
            assert_eq!(from.port(), dialled.local_addr().unwrap().port());
        }
    }
    assert_eq!(forward.listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn an_address_that_is_not_localhost_is_not_steered() {
    let netns = Netns::new();
    let Some(forward) = steered(&netns) else { return };
    netns.with(async |handle| {
        add_address(handle, "lo", "10.9.0.2", 32).await;
        add_address(handle, "lo", "fd00::1", 128).await;
    });
    for ip in ["10.9.0.2", "fd00::1"] {
        for port in [80, forward.listener.local_addr().unwrap().port()] {
            assert_eq!(dial(&netns, ip, port).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{ip}");
        }
    }
}

#[test]
fn a_namespace_is_steered_for_as_long_as_the_link_lives_and_no_other_is() {
    let (netns, other) = (Netns::new(), Netns::new());
    let Some(forward) = steered(&netns) else { return };
    assert_eq!(refused(&other), [true, true]);
    assert_eq!(refused(&netns), [false, false]);
    drop(forward.steering);
    assert_eq!(refused(&netns), [true, true]);
}

#[tokio::test]
async fn a_pods_network_is_steered_even_if_nobody_has_brought_loopback_up() {
    let netns = Netns::new();
    if steered(&netns).is_none() {
        return;
    }
    netns.with(async |handle| {
        let down = LinkUnspec::new_with_index(LOOPBACK).down().build();
        handle.link().set(down).execute().await.unwrap();
    });
    let network = set_up(&netns.path(), 1).await.unwrap();
    let forward = network.forward.unwrap().unwrap();
    assert_eq!(refused(&netns), [false, false]);
    drop(forward);
    assert_eq!(refused(&netns), [true, true]);
}

#[test]
fn without_a_listener_connections_are_refused() {
    let netns = Netns::new();
    let Some(forward) = steered(&netns) else { return };
    drop(forward.listener);
    assert_eq!(dial(&netns, "127.0.0.1", 80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_second_machine_cannot_take_the_namespace_over_before_the_first_has_gone() {
    let netns = Netns::new();
    let Some(first) = steered(&netns) else { return };
    // Programs run in turn, and the first to choose has chosen.
    let second = steered(&netns).unwrap();
    let _dialled = dial(&netns, "127.0.0.1", 80).unwrap();
    first.listener.accept().unwrap();
    drop(first);
    let _dialled = dial(&netns, "127.0.0.1", 80).unwrap();
    second.listener.accept().unwrap();
}

#[test]
fn a_namespace_in_which_ipv6_is_disabled_is_steered_too() {
    let netns = Netns::new();
    netns.with(async |_| std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap());
    let Some(forward) = steered(&netns) else { return };
    let _dialled = dial(&netns, "127.0.0.1", 80).unwrap();
    assert_eq!(forward.listener.accept().unwrap().0.local_addr().unwrap().port(), 80);
}

#[test]
fn a_listener_for_ipv4_alone_does_where_there_is_no_ipv6() {
    let netns = Netns::new();
    let Some(forward) = steered(&netns) else { return };
    drop(forward);
    let (listener, _steering) = netns.with(async |_| {
        let listener = TcpListener::from(listen_at(Ipv4Addr::LOCALHOST.into()).unwrap());
        let (map, program) = load().unwrap();
        bpf::put_socket(&map, &listener).unwrap();
        let netns = File::open("/proc/thread-self/ns/net").unwrap();
        (listener, bpf::attach_to_netns(&program, &netns).unwrap())
    });
    let _dialled = dial(&netns, "127.0.0.1", 80).unwrap();
    listener.accept().unwrap();
    // Port-forward does not work for IPv6: as if there were no program.
    assert_eq!(dial(&netns, "::1", 80).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}
