//! The pod's interfaces inside the guest: what `Configure` says of them, applied by rtnetlink(7).
//!
//! The guest's devices have the MAC addresses of the interfaces that CNI made in the pod's netns, and that
//! is how each is found. From then on the pod's addresses are the guest's.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd as _},
};

use futures::TryStreamExt;
use pericarp_protos::agent::{ConfigureRequest, Interface, Neighbour, Route};
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        address::AddressHeaderFlags,
        link::{LinkAttribute, LinkMessage},
        route::{RouteAttribute, RouteMetric, RouteScope},
    },
};

/// Longest name of an interface, without its terminator (`IFNAMSIZ`).
const NAME_MAX: usize = 15;

/// Why the pod has not the network that it should have. Each says what and where.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no talking to the kernel.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] std::io::Error),
    /// The machine was made without a device for an interface.
    #[error("the machine has no network device with the MAC address {mac} of interface {name:?}")]
    NoDevice {
        /// The interface.
        name: String,
        /// Its address.
        mac: String,
    },
    /// What the controller sent is malformed.
    #[error("the {what} of interface {name:?} is malformed")]
    Malformed {
        /// The interface.
        name: String,
        /// The part of it.
        what: &'static str,
    },
    /// A route or neighbour of an interface that was not described.
    #[error("there is no interface {0:?}")]
    Unknown(String),
    /// The kernel refused something.
    #[error("cannot {what} interface {name:?}: {source}")]
    Kernel {
        /// What was to be done, up to the name.
        what: String,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
}

/// An interface of the pod that the guest has found.
struct Found {
    name: String,
    index: u32,
}

/// Gives the guest the pod's interfaces, addresses, routes and neighbours.
pub async fn apply(request: &ConfigureRequest) -> Result<(), NetworkError> {
    if request.interfaces.is_empty() {
        return Ok(());
    }
    with_netlink(async |handle| apply_through(handle, request).await).await
}

/// Moves the pod's interfaces to another network namespace, where they can be found again in the same way.
pub async fn move_to(netns: impl AsFd, request: &ConfigureRequest) -> Result<(), NetworkError> {
    let netns = netns.as_fd();
    with_netlink(async |handle| {
        let (_, found) = find_all(handle, request).await?;
        for Found { name, index } in &found {
            let link = LinkUnspec::new_with_index(*index).setns_by_fd(netns.as_raw_fd()).build();
            handle.link().set(link).execute().await.map_err(refused("hand to the pod", name))?;
        }
        Ok(())
    })
    .await
}

async fn with_netlink<T>(
    work: impl AsyncFnOnce(&Handle) -> Result<T, NetworkError>,
) -> Result<T, NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
    let connection = tokio::spawn(connection);
    let done = work(&handle).await;
    connection.abort();
    done
}

/// All devices, and which of them are the pod's.
async fn find_all(
    handle: &Handle,
    request: &ConfigureRequest,
) -> Result<(Vec<LinkMessage>, Vec<Found>), NetworkError> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(refused("list", ""))?;
    let mut found = Vec::with_capacity(request.interfaces.len());
    for interface in &request.interfaces {
        found.push(find(&links, interface, &found)?);
    }
    Ok((links, found))
}

async fn apply_through(handle: &Handle, request: &ConfigureRequest) -> Result<(), NetworkError> {
    let (links, found) = find_all(handle, request).await?;
    make_names_free(handle, &links, &found).await?;
    for (interface, found) in request.interfaces.iter().zip(&found) {
        bring_up(handle, interface, found).await?;
    }
    for neighbour in &request.neighbours {
        add_neighbour(handle, &found, neighbour).await?;
    }
    for route in &request.routes {
        add_route(handle, &found, route).await?;
    }
    Ok(())
}

fn refused(what: impl Into<String>, name: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let (what, name) = (what.into(), name.to_owned());
    move |source| NetworkError::Kernel { what, name, source }
}

/// The device with the interface's MAC address. Interfaces may have the same (ipvlan); each then takes the next device,
/// as the machine's devices are in the order of the interfaces.
fn find(links: &[LinkMessage], interface: &Interface, taken: &[Found]) -> Result<Found, NetworkError> {
    let name = interface.name.clone();
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(NetworkError::Malformed { name, what: "name" });
    }
    let has_its_mac = |link: &&LinkMessage| {
        let mac = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => Some(mac),
            _ => None,
        });
        mac == Some(&interface.mac) && taken.iter().all(|taken| taken.index != link.header.index)
    };
    match links.iter().find(has_its_mac) {
        Some(link) => Ok(Found { name, index: link.header.index }),
        None => Err(NetworkError::NoDevice { name, mac: readable(&interface.mac) }),
    }
}

fn readable(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// The kernel has named the devices in its own order, so that an interface's name may be another's.
async fn make_names_free(
    handle: &Handle,
    links: &[LinkMessage],
    found: &[Found],
) -> Result<(), NetworkError> {
    for link in links {
        let index = link.header.index;
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        let taken = found.iter().any(|found| Some(found.name.as_str()) == name && found.index != index);
        if let Some(name) = name.filter(|_| taken) {
            let free = LinkUnspec::new_with_index(index).name(format!("guest{index}")).build();
            handle.link().set(free).execute().await.map_err(refused("rename", name))?;
        }
    }
    Ok(())
}

async fn bring_up(handle: &Handle, interface: &Interface, found: &Found) -> Result<(), NetworkError> {
    let Found { name, index } = found;
    let link = LinkUnspec::new_with_index(*index).name(name.clone()).mtu(interface.mtu).up().build();
    handle.link().set(link).execute().await.map_err(refused("name and start", name))?;
    for address in &interface.addresses {
        let ip =
            ip(&address.ip).ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "address" })?;
        let prefix = prefix(address.prefix_length, ip)
            .ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "prefix length" })?;
        let mut add = handle.address().add(*index, ip, prefix).replace();
        if ip.is_ipv6() {
            // CNI has made sure on the host that nobody else has it; waiting again would cost a second.
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        add.execute().await.map_err(refused(format!("add address {ip}/{prefix} to"), name))?;
    }
    Ok(())
}

async fn add_neighbour(handle: &Handle, found: &[Found], neighbour: &Neighbour) -> Result<(), NetworkError> {
    let Found { name, index } = named(found, &neighbour.interface)?;
    let ip =
        ip(&neighbour.ip).ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "neighbour" })?;
    let add = handle.neighbours().add(*index, ip).link_layer_address(&neighbour.mac).replace();
    add.execute().await.map_err(refused(format!("add neighbour {ip} to"), name))
}

async fn add_route(handle: &Handle, found: &[Found], route: &Route) -> Result<(), NetworkError> {
    let Found { name, index } = named(found, &route.interface)?;
    let malformed = |what| NetworkError::Malformed { name: name.clone(), what };
    let destination = ip(&route.destination).ok_or_else(|| malformed("route's destination"))?;
    let prefix =
        prefix(route.prefix_length, destination).ok_or_else(|| malformed("route's prefix length"))?;
    let scope = u8::try_from(route.scope).map_err(|_| malformed("route's scope"))?;
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination, prefix)
        .map_err(|_| malformed("route's destination"))?
        .output_interface(*index)
        .scope(RouteScope::from(scope));
    if !route.gateway.is_empty() {
        let gateway = ip(&route.gateway).ok_or_else(|| malformed("route's gateway"))?;
        message = message.gateway(gateway).map_err(|_| malformed("route's gateway"))?;
    }
    if !route.source.is_empty() {
        let source = ip(&route.source).ok_or_else(|| malformed("route's source"))?;
        message = message.pref_source(source).map_err(|_| malformed("route's source"))?;
    }
    if route.metric > 0 {
        message = message.priority(route.metric);
    }
    if route.on_link {
        message = message.onlink();
    }
    if route.mtu > 0 {
        let mtu = RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]);
        message.get_mut().attributes.push(mtu);
    }
    let add = handle.route().add(message.build()).replace();
    add.execute().await.map_err(refused(format!("add the route to {destination}/{prefix} over"), name))
}

fn named<'a>(found: &'a [Found], name: &str) -> Result<&'a Found, NetworkError> {
    found
        .iter()
        .find(|found| found.name == name)
        .ok_or_else(|| NetworkError::Unknown(name.chars().take(NAME_MAX).collect()))
}

/// An address from its 4 or 16 bytes.
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into())
}

fn prefix(length: u32, ip: IpAddr) -> Option<u8> {
    let limit = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(length).ok().filter(|length| *length <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_four_or_sixteen_bytes() {
        assert_eq!(ip(&[10, 0, 0, 7]), Some("10.0.0.7".parse().unwrap()));
        assert_eq!(ip(&Ipv6Addr::LOCALHOST.octets()), Some("::1".parse().unwrap()));
        for length in [0, 3, 5, 15, 17] {
            assert_eq!(ip(&vec![1; length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_prefix_is_no_longer_than_its_address() {
        let (four, six) = ("10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap());
        assert_eq!((prefix(32, four), prefix(33, four)), (Some(32), None));
        assert_eq!((prefix(128, six), prefix(129, six)), (Some(128), None));
        assert_eq!(prefix(1 << 20, six), None);
    }

    #[tokio::test]
    async fn an_interface_without_a_device_is_named_with_its_mac() {
        let mut request = ConfigureRequest::new();
        let mut interface = Interface::new();
        interface.name = "eth0".into();
        interface.mac = vec![2, 0, 0, 0xab, 0xcd, 0xef];
        request.interfaces.push(interface);
        let error = apply(&request).await.unwrap_err().to_string();
        assert!(error.contains("eth0") && error.contains("02:00:00:ab:cd:ef"), "{error}");
    }

    #[tokio::test]
    async fn a_pod_without_interfaces_needs_nothing() {
        apply(&ConfigureRequest::new()).await.unwrap();
    }
}
