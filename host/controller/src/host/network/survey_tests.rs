use std::net::Ipv4Addr;

use rtnetlink::packet_route::{address::AddressHeaderFlags, route::RouteScope};

use super::*;

const MAC: [u8; 6] = [2, 0x42, 10, 9, 0, 2];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn message(own: &str, prefix_length: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.prefix_len = prefix_length;
    message.header.flags = AddressHeaderFlags::Permanent;
    message.attributes.push(AddressAttribute::Address(ip(own)));
    message
}

fn made(message: &AddressMessage) -> Option<(Vec<u8>, u32)> {
    address(message, MAC).map(|address| (address.ip, address.prefix_length))
}

fn eth0(addresses: &[(&str, u32)]) -> Vec<SurveyedInterface> {
    let address = |(text, prefix_length): &(&str, u32)| Address {
        ip: octets(ip(text)),
        prefix_length: *prefix_length,
        ..Address::default()
    };
    vec![SurveyedInterface {
        index: 2,
        name: "eth0".into(),
        mac: MAC,
        mtu: 1500,
        addresses: addresses.iter().map(address).collect(),
    }]
}

fn route_to(destination: Option<(&str, u8)>, attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.attributes = attributes;
    message.attributes.push(RouteAttribute::Oif(2));
    if let Some((to, prefix_length)) = destination {
        message.header.destination_prefix_length = prefix_length;
        message.attributes.push(RouteAttribute::Destination(ip(to).into()));
        if ip(to).is_ipv6() {
            message.header.address_family = AddressFamily::Inet6;
        }
    }
    message
}

#[test]
fn an_address_is_taken_with_its_prefix() {
    assert_eq!(made(&message("10.9.0.2", 24)), Some((vec![10, 9, 0, 2], 24)));
    assert_eq!(made(&message("fd00::2", 64)), Some((octets(ip("fd00::2")), 64)));
}

#[test]
fn an_address_that_is_still_tentative_is_taken() {
    let mut message = message("fd00::2", 64);
    message.header.flags |= AddressHeaderFlags::Tentative;
    assert!(made(&message).is_some());
}

#[test]
fn link_local_addresses_that_the_kernel_made_are_left_out() {
    assert_eq!(made(&message("fe80::42:aff:fe09:2", 64)), None);
    let mut random = message("fe80::1234", 64);
    random.attributes.push(AddressAttribute::Flags(AddressFlags::StablePrivacy));
    assert_eq!(made(&random), None);
    let mut said = message("fe80::1234", 64);
    said.attributes.push(AddressAttribute::Protocol(AddressProtocol::LinkLocal));
    assert_eq!(made(&said), None);
}

#[test]
fn a_link_local_address_that_somebody_chose_is_taken() {
    assert!(made(&message("fe80::1", 64)).is_some());
}

#[test]
fn of_a_peers_address_only_the_own_half_is_taken() {
    let mut message = message("10.9.0.1", 24);
    message.attributes.push(AddressAttribute::Local(ip("10.9.0.2")));
    assert_eq!(made(&message), Some((vec![10, 9, 0, 2], 32)));
}

#[test]
fn an_address_without_a_route_of_its_prefix_gets_none_in_the_guest() {
    let mut message = message("fd00::2", 64);
    message.attributes.push(AddressAttribute::Flags(AddressFlags::Noprefixroute));
    assert_eq!(made(&message), Some((octets(ip("fd00::2")), 128)));
}

#[test]
fn routes_that_come_with_an_address_are_left_out() {
    let interfaces = eth0(&[("10.9.0.2", 20), ("fd00::2", 64)]);
    for destination in [("10.9.0.0", 20), ("fd00::", 64), ("fe80::", 64), ("ff00::", 8)] {
        let mut message = route_to(Some(destination), Vec::new());
        message.header.protocol = RouteProtocol::Kernel;
        assert_eq!(route(&message, &interfaces), None, "{destination:?}");
    }
}

#[test]
fn a_kernel_route_that_no_address_brings_is_taken() {
    let mut message = route_to(Some(("10.9.0.0", 24)), Vec::new());
    message.header.protocol = RouteProtocol::Kernel;
    assert!(route(&message, &eth0(&[("10.9.0.2", 32)])).is_some());
}

#[test]
fn routes_of_other_tables_interfaces_and_kinds_are_left_out() {
    let interfaces = eth0(&[]);
    let message = route_to(Some(("10.1.0.0", 16)), Vec::new());
    assert!(route(&message, &interfaces).is_some());
    let other = |change: fn(&mut RouteMessage)| {
        let mut message = message.clone();
        change(&mut message);
        route(&message, &interfaces)
    };
    assert_eq!(other(|message| message.header.table = 255), None);
    assert_eq!(other(|message| message.attributes.push(RouteAttribute::Table(1000))), None);
    assert_eq!(other(|message| message.attributes.push(RouteAttribute::Oif(3))), None);
    assert_eq!(other(|message| message.header.kind = RouteType::Multicast), None);
    assert_eq!(other(|message| message.header.kind = RouteType::BlackHole), None);
}

#[test]
fn a_default_route_is_all_zero_and_keeps_what_it_says() {
    let mut message = route_to(
        None,
        vec![
            RouteAttribute::Gateway(ip("169.254.1.1").into()),
            RouteAttribute::PrefSource(ip("10.9.0.2").into()),
            RouteAttribute::Priority(7),
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]),
        ],
    );
    message.header.flags = RouteFlags::Onlink;
    message.header.scope = RouteScope::Universe;
    let route = route(&message, &eth0(&[])).unwrap();
    let expected = Route {
        interface: "eth0".into(),
        destination: vec![0; 4],
        gateway: vec![169, 254, 1, 1],
        source: vec![10, 9, 0, 2],
        metric: 7,
        on_link: true,
        mtu: 1400,
        ..Route::default()
    };
    assert_eq!(route, expected);
}

#[test]
fn of_several_gateways_the_first_is_taken() {
    let mut hop = RouteNextHop::default();
    hop.interface_index = 2;
    hop.attributes = vec![RouteAttribute::Gateway(ip("fd00::1").into())];
    let mut message = route_to(Some(("fd01::", 64)), vec![RouteAttribute::MultiPath(vec![hop.clone(), hop])]);
    message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
    assert_eq!(route(&message, &eth0(&[])).unwrap().gateway, octets(ip("fd00::1")));
}

#[test]
fn only_permanent_neighbours_are_taken() {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = 2;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(Ipv4Addr::new(169, 254, 1, 1))),
        NeighbourAttribute::LinkLayerAddress(MAC.into()),
    ];
    let taken = neighbour(&message, &eth0(&[])).unwrap();
    assert_eq!((taken.ip, taken.mac), (vec![169, 254, 1, 1], MAC.to_vec()));
    message.header.state = NeighbourState::Stale;
    assert_eq!(neighbour(&message, &eth0(&[])), None);
}

#[test]
fn a_network_is_an_address_without_its_last_bits() {
    assert_eq!(network(&[10, 9, 255, 255], 20), [10, 9, 240, 0]);
    assert_eq!(network(&[10, 9, 255, 255], 0), [0; 4]);
    assert_eq!(network(&[10, 9, 255, 255], 32), [10, 9, 255, 255]);
}

#[test]
fn a_kind_of_link_that_a_machine_cannot_have_is_refused_by_name() {
    let link = |kind, flags| Link {
        index: 2,
        name: "net1".into(),
        kind,
        flags: LinkFlags::Up | flags,
        mac: MAC.into(),
        mtu: 1500,
    };
    let carries_packets = LinkFlags::Noarp;
    let refused = interface(&link(Some(InfoKind::IpVlan), carries_packets), &[]).unwrap_err().to_string();
    assert!(refused.contains("ipvlan in mode l3"), "{refused}");
    for (kind, name) in [
        (Some(InfoKind::Tun), "tun"),
        (Some(InfoKind::Wireguard), "wireguard"),
        (Some(InfoKind::Other("newest".into())), "newest"),
        (None, "physical device"),
    ] {
        let text = interface(&link(kind, LinkFlags::empty()), &[]).unwrap_err().to_string();
        assert!(text.contains("net1") && text.contains(name) && text.contains("veth"), "{text}");
    }
    for kind in [InfoKind::Veth, InfoKind::MacVlan, InfoKind::IpVlan] {
        assert!(interface(&link(Some(kind), LinkFlags::empty()), &[]).is_ok());
    }
}
