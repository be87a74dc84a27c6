//! Taps: the host's end of the machine's network devices.

use std::{collections::HashSet, fs::File, io, os::fd::AsRawFd as _};

use libc::{
    IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN_EXCL, IFF_VNET_HDR, TUNSETIFF, TUNSETPERSIST, c_int,
};
use rtnetlink::{
    Handle, LinkUnspec,
    packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute},
        tc::{TcAttribute, TcHandle, TcMessage},
    },
};
use rustix::io::Errno;
use tokio_stream::StreamExt as _;

use super::{NetworkError, kernel_error, netlink, survey::Link};

const TUN: &str = "/dev/net/tun";
/// Every tap's name begins with this, so that it is known as ours.
const PREFIX: &str = "pericarp";

/// Names for taps, none of which is in `taken`. No longer than the 15 characters that a link's name can have.
pub fn names(taken: &HashSet<String>) -> impl Iterator<Item = String> {
    (0..u16::MAX).map(|number| format!("{PREFIX}{number}")).filter(|name| !taken.contains(name))
}

/// Whether a link is a tap that [`make`] has made.
pub fn is_ours(link: &Link) -> bool {
    let number = link.name.strip_prefix(PREFIX).and_then(|number| number.parse::<u16>().ok());
    number.is_some() && link.kind == Some(InfoKind::Tun)
}

/// Makes a tap that stays until it is deleted, and brings it up. It has no address of its own and sends nothing
/// of its own. Answers its index.
///
/// The machine attaches to it once for each queue pair. The kernel wants to be told at once whether a tap may have
/// several queues, and is told so only if it will: it then makes 256 of everything.
pub async fn make(handle: &Handle, name: &str, mtu: u16, queue_pairs: u16) -> Result<u32, NetworkError> {
    let failed = |source| NetworkError::Tap { tap: name.to_owned(), source };
    let several = if queue_pairs > 1 { IFF_MULTI_QUEUE } else { 0 };
    let tap = attach(name, IFF_TUN_EXCL | several)?;
    // SAFETY: this request takes a number and touches no memory.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, 1 as c_int) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let index = index_of(handle, name).await?;
    no_queueing(handle, index).await.map_err(|error| failed(kernel_error(error)))?;
    no_link_local_address(handle, index).await.map_err(|error| failed(kernel_error(error)))?;
    let up = LinkUnspec::new_with_index(index).mtu(mtu.into()).up().build();
    handle.link().set(up).execute().await.map_err(|error| failed(kernel_error(error)))?;
    Ok(index)
}

/// Opens a tap by its name: one that exists or, if `flags` has `IFF_TUN_EXCL`, a new one. `IFF_MULTI_QUEUE` must be
/// there if, and only if, the tap was made with it.
pub(super) fn attach(name: &str, flags: c_int) -> Result<File, NetworkError> {
    /// `struct ifreq` as `TUNSETIFF` uses it.
    #[repr(C)]
    struct Request {
        name: [u8; libc::IFNAMSIZ],
        flags: u16,
        rest: [u8; 22],
    }
    const { assert!(size_of::<Request>() == size_of::<libc::ifreq>()) };

    let failed = |source| NetworkError::Tap { tap: name.to_owned(), source };
    let tap = File::options()
        .read(true)
        .write(true)
        .open(TUN)
        .map_err(|source| NetworkError::Tun { path: TUN, source })?;
    let flags =
        u16::try_from(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | flags).map_err(|_| failed(Errno::INVAL.into()))?;
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
    // One byte stays zero: the end of the string.
    if name.len() >= request.name.len() {
        return Err(failed(Errno::NAMETOOLONG.into()));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the kernel reads and writes one `struct ifreq`, which `request` has the size of.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(tap)
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let mut links = std::pin::pin!(handle.link().get().match_name(name).execute());
    let link = links.next().await.unwrap_or(Err(rtnetlink::Error::RequestFailed));
    link.map(|link| link.header.index).map_err(netlink(format!("find the tap {name}")))
}

/// Leaves queueing to the tap's own queues, as `tc qdisc add dev TAP root noqueue` would: the qdiscs that the kernel
/// gives to a link when it comes up never hold a frame, as a tap drops what it has no room for, and take time and
/// memory (with several queues 6 MiB, for 256 of them). Must be asked for before the link is up.
async fn no_queueing(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut qdisc = TcMessage::with_index(index.cast_signed());
    qdisc.header.parent = TcHandle::ROOT;
    qdisc.attributes.push(TcAttribute::Kind("noqueue".into()));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(qdisc));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let mut answers = handle.clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// Without that address, the kernel has nothing to say over IPv6 to the guest. Must be asked for before the link
/// is up.
async fn no_link_local_address(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let request = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]))
        .build();
    match handle.link().set(request).execute().await {
        // A kernel without IPv6.
        Err(rtnetlink::Error::NetlinkError(message))
            if [Errno::AFNOSUPPORT, Errno::OPNOTSUPP]
                .iter()
                .any(|errno| errno.raw_os_error() == -message.raw_code()) =>
        {
            Ok(())
        }
        result => result,
    }
}
