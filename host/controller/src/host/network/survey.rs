//! What CNI has put into a pod's network namespace.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv6Addr},
};

use pericarp_protos::agent::{Address, Interface, Neighbour, Route};
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{
            RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
            RouteNextHopFlags, RouteProtocol, RouteType, RouteVia,
        },
    },
};
use tokio_stream::StreamExt as _;

use super::{NetworkError, netlink, redirect};

/// The most that a tap takes; a veth takes 14 bytes more.
const MTU_MAX: u16 = 65521;

/// What there is.
#[derive(Debug)]
pub struct Survey {
    pub interfaces: Vec<SurveyedInterface>,
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
    /// The names of all links, whatever they are.
    pub names: HashSet<String>,
}

/// An interface whose frames the guest is to have.
#[derive(Debug)]
pub struct SurveyedInterface {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub addresses: Vec<Address>,
}

impl SurveyedInterface {
    pub fn into_interface(self) -> Interface {
        Interface {
            name: self.name,
            mac: self.mac.into(),
            mtu: self.mtu.into(),
            addresses: self.addresses,
            ..Interface::default()
        }
    }
}

/// A link as it is needed here.
#[derive(Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// None: not a virtual one.
    pub kind: Option<InfoKind>,
    flags: LinkFlags,
    mac: Vec<u8>,
    mtu: u32,
}

/// Reads it all. Refuses interfaces that a machine cannot be given.
pub async fn survey(handle: &Handle) -> Result<Survey, NetworkError> {
    let links = links(handle).await?;
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .collect::<Result<_, _>>()
        .await
        .map_err(netlink("list the pod's addresses"))?;
    let taken = redirect::ingress_qdiscs(handle).await?;

    let mut interfaces = Vec::new();
    for link in links.iter().filter(|link| !link.flags.contains(LinkFlags::Loopback)) {
        let addresses: Vec<_> =
            addresses.iter().filter(|address| address.header.index == link.index).collect();
        // The kernel makes some by itself in every namespace (sit0, tunl0…), which nobody has any use for.
        if !link.flags.contains(LinkFlags::Up) && addresses.is_empty() {
            continue;
        }
        if taken.contains(&link.index) {
            return Err(NetworkError::IngressTaken { interface: link.name.clone() });
        }
        interfaces.push(interface(link, &addresses)?);
    }
    let routes = routes(handle, &interfaces).await?;
    let neighbours = neighbours(handle, &interfaces).await?;
    let names = links.into_iter().map(|link| link.name).collect();
    Ok(Survey { interfaces, routes, neighbours, names })
}

pub async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .collect::<Result<_, _>>()
        .await
        .map_err(netlink("list the pod's interfaces"))?;
    Ok(links.into_iter().map(link).collect())
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: None,
        flags: message.header.flags,
        mac: Vec::new(),
        mtu: 0,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(mac) => link.mac = mac,
            LinkAttribute::LinkInfo(infos) => {
                link.kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

/// Frames can be taken from an interface and given back to it if it takes and brings them as they are, for the
/// guest's MAC address, which is the interface's own.
fn interface(link: &Link, addresses: &[&AddressMessage]) -> Result<SurveyedInterface, NetworkError> {
    let mac = <[u8; 6]>::try_from(&link.mac[..]);
    // An ipvlan that does not resolve neighbours (modes l3 and l3s) carries packets, not frames.
    let resolves = !link.flags.contains(LinkFlags::Noarp);
    match (&link.kind, mac) {
        (Some(InfoKind::Veth | InfoKind::MacVlan | InfoKind::IpVlan), Ok(mac)) if resolves => {
            Ok(SurveyedInterface {
                index: link.index,
                name: link.name.clone(),
                mac,
                mtu: u16::try_from(link.mtu).unwrap_or(MTU_MAX).min(MTU_MAX),
                addresses: addresses.iter().filter_map(|address| self::address(address, mac)).collect(),
            })
        }
        (kind, _) => Err(NetworkError::Kind {
            interface: link.name.clone(),
            kind: match kind {
                Some(InfoKind::IpVlan) => "ipvlan in mode l3".into(),
                Some(kind) => kind.to_string(),
                None => "physical device".into(),
            },
        }),
    }
}

/// An address as the guest is to have it; none of those that a kernel gives itself.
fn address(message: &AddressMessage, mac: [u8; 6]) -> Option<Address> {
    let (mut local, mut address, mut protocol) = (None, None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            AddressAttribute::Protocol(by) => protocol = Some(*by),
            _ => {}
        }
    }
    // With a peer, the one is the own address and the other the peer's.
    let ip = local.or(address)?;
    if let IpAddr::V6(ip) = ip
        && ip.is_unicast_link_local()
        && (protocol == Some(AddressProtocol::LinkLocal)
            // Kernels before 5.18 do not say so.
            || flags.contains(AddressFlags::StablePrivacy)
            || ip == link_local(mac))
    {
        return None;
    }
    // A prefix that is the peer's, or that shall have no route, is not the interface's: the guest would make a
    // route for it.
    let own_prefix =
        address.is_none_or(|address| address == ip) && !flags.contains(AddressFlags::Noprefixroute);
    let whole = if ip.is_ipv4() { 32 } else { 128 };
    Some(Address {
        ip: octets(ip),
        prefix_length: if own_prefix { u32::from(message.header.prefix_len).min(whole) } else { whole },
        ..Address::default()
    })
}

/// The address that a kernel makes of a MAC address (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let mut octets = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 0];
    octets[8..11].copy_from_slice(&mac[..3]);
    octets[8] ^= 2;
    octets[13..].copy_from_slice(&mac[3..]);
    octets.into()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

async fn routes(handle: &Handle, interfaces: &[SurveyedInterface]) -> Result<Vec<Route>, NetworkError> {
    let messages: Vec<RouteMessage> = handle
        .route()
        .get(RouteMessage::default())
        .execute()
        .collect::<Result<_, _>>()
        .await
        .map_err(netlink("list the pod's routes"))?;
    let mut routes: Vec<Route> = messages.iter().filter_map(|message| route(message, interfaces)).collect();
    // A gateway must be in reach before its routes are added.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(routes)
}

/// A route of the main table over one of the interfaces; none of those that come by themselves with an address.
fn route(message: &RouteMessage, interfaces: &[SurveyedInterface]) -> Option<Route> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut out = None;
    let mut route = Route {
        prefix_length: header.destination_prefix_length.into(),
        scope: u8::from(header.scope).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        ..Route::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(all) => table = *all,
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::Destination(ip) => route.destination = route_octets(ip)?,
            RouteAttribute::Gateway(ip) => route.gateway = route_octets(ip)?,
            RouteAttribute::Via(via) => route.gateway = via_octets(via)?,
            RouteAttribute::PrefSource(ip) => route.source = route_octets(ip)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtu.unwrap_or(0);
            }
            RouteAttribute::MultiPath(hops) => out = Some(first_hop(hops, &mut route)?),
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.kind != RouteType::Unicast {
        return None;
    }
    let interface = interfaces.iter().find(|interface| Some(interface.index) == out)?;
    if route.destination.is_empty() {
        let v4 = header.address_family == AddressFamily::Inet;
        route.destination = vec![0; if v4 { 4 } else { 16 }];
    }
    if header.protocol == RouteProtocol::Kernel && comes_by_itself(&route, interface) {
        return None;
    }
    route.interface.clone_from(&interface.name);
    Some(route)
}

/// Takes the first of several ways: the guest's part of the contract knows no others.
fn first_hop(hops: &[RouteNextHop], route: &mut Route) -> Option<u32> {
    let hop = hops.first()?;
    if hops.len() > 1 {
        tracing::warn!(?hops, "of a route over several gateways the pod gets the first only");
    }
    for attribute in &hop.attributes {
        match attribute {
            RouteAttribute::Gateway(ip) => route.gateway = route_octets(ip)?,
            RouteAttribute::Via(via) => route.gateway = via_octets(via)?,
            _ => {}
        }
    }
    route.on_link |= hop.flags.contains(RouteNextHopFlags::Onlink);
    Some(hop.interface_index)
}

fn route_octets(ip: &RouteAddress) -> Option<Vec<u8>> {
    match ip {
        RouteAddress::Inet(ip) => Some(ip.octets().into()),
        RouteAddress::Inet6(ip) => Some(ip.octets().into()),
        _ => None,
    }
}

fn via_octets(via: &RouteVia) -> Option<Vec<u8>> {
    match via {
        RouteVia::Inet(ip) => Some(ip.octets().into()),
        RouteVia::Inet6(ip) => Some(ip.octets().into()),
        _ => None,
    }
}

/// Whether the guest's kernel makes this route by itself, with an address or with a link.
fn comes_by_itself(route: &Route, interface: &SurveyedInterface) -> bool {
    let with_link =
        matches!(route.destination[..], [0xfe, 0x80, ..] | [0xff, ..]) && route.destination.len() == 16;
    with_link
        || interface.addresses.iter().any(|address| {
            address.prefix_length == route.prefix_length
                && network(&address.ip, address.prefix_length) == route.destination
        })
}

/// An address with all but its first bits cleared.
fn network(ip: &[u8], prefix_length: u32) -> Vec<u8> {
    let mut left = prefix_length;
    let first_bits = |byte: &u8| {
        let bits = left.min(8);
        left -= bits;
        byte & !0xff_u8.checked_shr(bits).unwrap_or(0)
    };
    ip.iter().map(first_bits).collect()
}

async fn neighbours(
    handle: &Handle,
    interfaces: &[SurveyedInterface],
) -> Result<Vec<Neighbour>, NetworkError> {
    let messages: Vec<NeighbourMessage> = handle
        .neighbours()
        .get()
        .execute()
        .collect::<Result<_, _>>()
        .await
        .map_err(netlink("list the pod's neighbours"))?;
    Ok(messages.iter().filter_map(|message| neighbour(message, interfaces)).collect())
}

/// A neighbour that somebody has entered for good; the others the guest learns by itself.
fn neighbour(message: &NeighbourMessage, interfaces: &[SurveyedInterface]) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let interface = interfaces.iter().find(|interface| interface.index == message.header.ifindex)?;
    let mut neighbour = Neighbour { interface: interface.name.clone(), ..Neighbour::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbour.ip = ip.octets().into();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbour.ip = ip.octets().into();
            }
            NeighbourAttribute::LinkLayerAddress(mac) => neighbour.mac.clone_from(mac),
            _ => {}
        }
    }
    (!neighbour.ip.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
}

#[cfg(test)]
#[path = "survey_tests.rs"]
mod tests;
