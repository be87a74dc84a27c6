//! Redirection of everything that arrives at one link to another.
//!
//! As `tc qdisc add dev FROM ingress` and `tc filter add dev FROM parent ffff: protocol all u32 match u32 0 0
//! action mirred egress redirect dev TO` would. u32 and not matchall, as every kernel with traffic control has it.

use rtnetlink::{
    Handle,
    packet_route::tc::{TcHandle, TcMessage},
};
use rustix::io::Errno;
use tokio_stream::StreamExt as _;

use super::{NetworkError, kernel_error, netlink};

/// The parent `ffff:` of an ingress qdisc's filters.
const INGRESS_FILTERS: u32 = 0xffff_0000;
/// `linux/if_ether.h`.
const ETH_P_ALL: u16 = 3;

/// One of the two links.
#[derive(Clone, Copy)]
pub struct End<'a> {
    pub index: u32,
    pub name: &'a str,
}

/// Sends all that arrives at `from` out of `to`. `from` is then deaf: nothing above it sees a frame.
pub async fn redirect(handle: &Handle, from: End<'_>, to: End<'_>) -> Result<(), NetworkError> {
    let index = from.index.cast_signed();
    let qdisc = handle.qdisc().add(index).ingress().execute().await;
    qdisc.map_err(|error| refused(error, from, "ingress qdisc"))?;
    let filter = handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS_FILTERS)
        .protocol(ETH_P_ALL.to_be())
        .redirect(to.index)
        .map_err(netlink("make a filter"))?
        .execute()
        .await;
    filter.map_err(|error| refused(error, from, "filter (u32 with mirred)"))
}

fn refused(error: rtnetlink::Error, link: End<'_>, what: &'static str) -> NetworkError {
    let source = kernel_error(error);
    let interface = link.name.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::NODEV) => NetworkError::Removed { interface },
        // A kind of qdisc, filter or action that there is no module for; a kernel without traffic control.
        Some(Errno::NOENT | Errno::OPNOTSUPP) => NetworkError::TrafficControl { interface, what, source },
        _ => NetworkError::Netlink { request: format!("add the {what} to {interface}"), source },
    }
}

/// The links that have an ingress or clsact qdisc.
pub async fn ingress_qdiscs(handle: &Handle) -> Result<Vec<u32>, NetworkError> {
    let qdiscs: Result<Vec<TcMessage>, _> = handle.qdisc().get().execute().collect().await;
    let qdiscs = match qdiscs {
        // A kernel without traffic control has none.
        Err(rtnetlink::Error::NetlinkError(message))
            if message.raw_code() == -Errno::OPNOTSUPP.raw_os_error() =>
        {
            return Ok(Vec::new());
        }
        qdiscs => qdiscs.map_err(netlink("list the pod's qdiscs"))?,
    };
    let ingress = |qdisc: &&TcMessage| qdisc.header.parent == TcHandle::INGRESS;
    Ok(qdiscs.iter().filter(ingress).map(|qdisc| qdisc.header.index.cast_unsigned()).collect())
}

/// Removes a link's ingress qdisc with its filters.
pub async fn remove(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut request = handle.qdisc().del(index.cast_signed());
    request.message_mut().header.parent = TcHandle::INGRESS;
    request.execute().await
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroI32;

    use rtnetlink::packet_core::ErrorMessage;

    use super::*;

    fn refused_with(errno: Errno) -> NetworkError {
        let mut message = ErrorMessage::default();
        message.code = NonZeroI32::new(-errno.raw_os_error());
        let link = End { index: 2, name: "eth0" };
        refused(rtnetlink::Error::NetlinkError(message), link, "ingress qdisc")
    }

    #[test]
    fn a_kernel_without_traffic_control_is_told_what_to_load() {
        for errno in [Errno::NOENT, Errno::OPNOTSUPP] {
            let text = refused_with(errno).to_string();
            for part in ["eth0", "ingress qdisc", "modprobe -a sch_ingress cls_u32 act_mirred"] {
                assert!(text.contains(part), "no {part} in {text}");
            }
        }
    }

    #[test]
    fn an_interface_that_has_gone_is_told_from_a_request_that_is_refused() {
        assert!(
            matches!(refused_with(Errno::NODEV), NetworkError::Removed { interface } if interface == "eth0")
        );
        let text = refused_with(Errno::PERM).to_string();
        assert!(text.contains("add the ingress qdisc to eth0"), "{text}");
    }
}
