//! The pod's interfaces in the guest, which are configured by rtnetlink(7).
//!
//! The guest's devices have the MAC addresses of the interfaces that CNI has created in the pod's netns on the host, by
//! which each device is found. The guest gets the pod's addresses.

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

/// The longest name of an interface, in bytes, without its terminator (`IFNAMSIZ`).
const NAME_MAX: usize = 15;

/// Why the pod's network cannot be configured.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refuses a netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] std::io::Error),
    /// The machine does not have a device for an interface.
    #[error("the machine has no network device with the MAC address {mac} of interface {name:?}")]
    NoDevice {
        /// The interface.
        name: String,
        /// Its MAC address.
        mac: String,
    },
    /// The controller's request is malformed.
    #[error("the {what} of interface {name:?} is malformed")]
    Malformed {
        /// The interface.
        name: String,
        /// The malformed part.
        what: &'static str,
    },
    /// The request has a route or neighbour of an interface that it does not describe.
    #[error("there is no interface {0:?}")]
    Unknown(String),
    /// The kernel refused something.
    #[error("cannot {what} interface {name:?}: {source}")]
    Kernel {
        /// What was being done, up to the interface's name.
        what: String,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: rtnetlink::Error,
    },
}

/// An interface of the pod whose device has been found.
struct PodInterface {
    name: String,
    index: u32,
}

/// Gives this network namespace the pod's interfaces, addresses, routes and neighbours.
pub async fn configure(request: &ConfigureRequest) -> Result<(), NetworkError> {
    if request.interfaces.is_empty() {
        return Ok(());
    }
    with_netlink(async |handle| configure_all(handle, request).await).await
}

/// Moves the pod's interfaces to another network namespace, where [`configure`] finds them again by their MAC
/// addresses.
pub async fn move_to(netns: impl AsFd, request: &ConfigureRequest) -> Result<(), NetworkError> {
    let netns = netns.as_fd();
    with_netlink(async |handle| {
        let (_, found) = find_all(handle, request).await?;
        for PodInterface { name, index } in &found {
            let link = LinkUnspec::new_with_index(*index).setns_by_fd(netns.as_raw_fd()).build();
            handle.link().set(link).execute().await.map_err(kernel_error("hand to the pod", name))?;
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

/// All devices of this network namespace, and the pod's interfaces among them.
async fn find_all(
    handle: &Handle,
    request: &ConfigureRequest,
) -> Result<(Vec<LinkMessage>, Vec<PodInterface>), NetworkError> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(kernel_error("list", ""))?;
    let mut found = Vec::with_capacity(request.interfaces.len());
    for interface in &request.interfaces {
        found.push(find(&links, interface, &found)?);
    }
    Ok((links, found))
}

async fn configure_all(handle: &Handle, request: &ConfigureRequest) -> Result<(), NetworkError> {
    let (links, found) = find_all(handle, request).await?;
    free_names(handle, &links, &found).await?;
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

fn kernel_error(what: impl Into<String>, name: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let (what, name) = (what.into(), name.to_owned());
    move |source| NetworkError::Kernel { what, name, source }
}

/// Finds the device with the interface's MAC address among those that are not in `assigned`. Several interfaces may
/// have the same address (ipvlan); the machine's devices are in the order of the interfaces.
fn find(
    links: &[LinkMessage],
    interface: &Interface,
    assigned: &[PodInterface],
) -> Result<PodInterface, NetworkError> {
    let name = interface.name.clone();
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(NetworkError::Malformed { name, what: "name" });
    }
    let has_its_mac = |link: &&LinkMessage| {
        let mac = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Address(mac) => Some(mac),
            _ => None,
        });
        mac == Some(&interface.mac) && assigned.iter().all(|other| other.index != link.header.index)
    };
    match links.iter().find(has_its_mac) {
        Some(link) => Ok(PodInterface { name, index: link.header.index }),
        None => Err(NetworkError::NoDevice { name, mac: format_mac(&interface.mac) }),
    }
}

fn format_mac(mac: &[u8]) -> String {
    let bytes: Vec<_> = mac.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

/// Renames devices that have the name of another of the pod's interfaces: the kernel names devices in its own order.
async fn free_names(
    handle: &Handle,
    links: &[LinkMessage],
    found: &[PodInterface],
) -> Result<(), NetworkError> {
    for link in links {
        let index = link.header.index;
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        });
        let is_taken = found.iter().any(|found| Some(found.name.as_str()) == name && found.index != index);
        if let Some(name) = name.filter(|_| is_taken) {
            let free = LinkUnspec::new_with_index(index).name(format!("guest{index}")).build();
            handle.link().set(free).execute().await.map_err(kernel_error("rename", name))?;
        }
    }
    Ok(())
}

async fn bring_up(handle: &Handle, interface: &Interface, found: &PodInterface) -> Result<(), NetworkError> {
    let PodInterface { name, index } = found;
    let link = LinkUnspec::new_with_index(*index).name(name.clone()).mtu(interface.mtu).up().build();
    handle.link().set(link).execute().await.map_err(kernel_error("name and start", name))?;
    for address in &interface.addresses {
        let ip = parse_ip(&address.ip)
            .ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "address" })?;
        let prefix = check_prefix(address.prefix_length, ip)
            .ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "prefix length" })?;
        let mut add = handle.address().add(*index, ip, prefix).replace();
        if ip.is_ipv6() {
            // CNI has detected duplicate addresses on the host. To do so again here would take a second.
            add.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        add.execute().await.map_err(kernel_error(format!("add address {ip}/{prefix} to"), name))?;
    }
    Ok(())
}

async fn add_neighbour(
    handle: &Handle,
    found: &[PodInterface],
    neighbour: &Neighbour,
) -> Result<(), NetworkError> {
    let PodInterface { name, index } = interface_by_name(found, &neighbour.interface)?;
    let ip = parse_ip(&neighbour.ip)
        .ok_or_else(|| NetworkError::Malformed { name: name.clone(), what: "neighbour" })?;
    let add = handle.neighbours().add(*index, ip).link_layer_address(&neighbour.mac).replace();
    add.execute().await.map_err(kernel_error(format!("add neighbour {ip} to"), name))
}

async fn add_route(handle: &Handle, found: &[PodInterface], route: &Route) -> Result<(), NetworkError> {
    let PodInterface { name, index } = interface_by_name(found, &route.interface)?;
    let malformed = |what| NetworkError::Malformed { name: name.clone(), what };
    let destination = parse_ip(&route.destination).ok_or_else(|| malformed("route's destination"))?;
    let prefix =
        check_prefix(route.prefix_length, destination).ok_or_else(|| malformed("route's prefix length"))?;
    let scope = u8::try_from(route.scope).map_err(|_| malformed("route's scope"))?;
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination, prefix)
        .map_err(|_| malformed("route's destination"))?
        .output_interface(*index)
        .scope(RouteScope::from(scope));
    if !route.gateway.is_empty() {
        let gateway = parse_ip(&route.gateway).ok_or_else(|| malformed("route's gateway"))?;
        message = message.gateway(gateway).map_err(|_| malformed("route's gateway"))?;
    }
    if !route.source.is_empty() {
        let source = parse_ip(&route.source).ok_or_else(|| malformed("route's source"))?;
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
    add.execute().await.map_err(kernel_error(format!("add the route to {destination}/{prefix} over"), name))
}

fn interface_by_name<'a>(found: &'a [PodInterface], name: &str) -> Result<&'a PodInterface, NetworkError> {
    found
        .iter()
        .find(|found| found.name == name)
        .ok_or_else(|| NetworkError::Unknown(name.chars().take(NAME_MAX).collect()))
}

/// Parses an address from its 4 or 16 bytes, in network order.
pub fn parse_ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(bytes).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into())
}

/// Checks that a prefix length is not longer than its address.
fn check_prefix(length: u32, ip: IpAddr) -> Option<u8> {
    let limit = if ip.is_ipv4() { 32 } else { 128 };
    u8::try_from(length).ok().filter(|length| *length <= limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_four_or_sixteen_bytes() {
        assert_eq!(parse_ip(&[10, 0, 0, 7]), Some("10.0.0.7".parse().unwrap()));
        assert_eq!(parse_ip(&Ipv6Addr::LOCALHOST.octets()), Some("::1".parse().unwrap()));
        for length in [0, 3, 5, 15, 17] {
            assert_eq!(parse_ip(&vec![1; length]), None, "{length} bytes");
        }
    }

    #[test]
    fn a_prefix_is_no_longer_than_its_address() {
        let (four, six) = ("10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap());
        assert_eq!((check_prefix(32, four), check_prefix(33, four)), (Some(32), None));
        assert_eq!((check_prefix(128, six), check_prefix(129, six)), (Some(128), None));
        assert_eq!(check_prefix(1 << 20, six), None);
    }

    #[tokio::test]
    async fn an_interface_without_a_device_is_named_with_its_mac() {
        let mut request = ConfigureRequest::new();
        let mut interface = Interface::new();
        interface.name = "eth0".into();
        interface.mac = vec![2, 0, 0, 0xab, 0xcd, 0xef];
        request.interfaces.push(interface);
        let error = configure(&request).await.unwrap_err().to_string();
        assert!(error.contains("eth0") && error.contains("02:00:00:ab:cd:ef"), "{error}");
    }

    #[tokio::test]
    async fn a_pod_without_interfaces_needs_nothing() {
        configure(&ConfigureRequest::new()).await.unwrap();
    }
}
