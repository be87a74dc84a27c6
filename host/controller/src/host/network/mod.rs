//! The pod's network: what CNI has put into the pod's network namespace becomes the guest's.
//!
//! Every interface there gets a tap beside it, and whatever arrives at one of the two leaves by the other. The
//! guest has a device on the tap with the interface's MAC address, and its addresses, routes and neighbours.
//! The namespace itself keeps them too: CNI plugins look for them in `CHECK` and `DEL`. It is deaf, though:
//! ingress redirection takes a frame before the namespace's own protocols see it, so ARP, neighbour discovery
//! and everything else is answered by the guest alone.
//!
//! Connections to localhost in the namespace are the exception: [`steer`] leads them to the machine, which carries
//! them to the guest's localhost. CRI's port-forward makes such connections.
//!
//! All of it is done by netlink and bpf(2), on a thread of its own that has entered the namespace.

mod inside;
mod redirect;
pub mod steer;
mod survey;
mod tap;
mod watch;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use pericarp_protos::agent::{Interface, Neighbour, Route};
use pericarp_vmm::{NetConfig, PortForward};
use rtnetlink::{Handle, LinkUnspec};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::watch::Watch;
use self::{inside::inside, redirect::End, steer::SteerError};

/// The pod's network cannot be made the guest's.
#[derive(Debug, Error)]
pub enum NetworkError {
    #[error(
        "the pod's network namespace {netns} is not there: CNI has not made it, or it was removed; see \
         containerd's log for what CNI said"
    )]
    Missing {
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the pod's network namespace {netns} is the one that Pericarp itself runs in; a pod needs its own"
    )]
    Own { netns: PathBuf },
    #[error("the pod's network namespace {netns} cannot be entered; Pericarp must run as root on the host")]
    Enter {
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the pod's interface {interface} is of the link type {kind}, whose frames cannot be handed to a \
         machine; use a CNI plugin that makes veth, macvlan or ipvlan interfaces (bridge, ptp, macvlan, ipvlan in mode \
         l2), or the runc runtime for this pod"
    )]
    Kind { interface: String, kind: String },
    #[error(
        "the pod's interface {interface} has an ingress or clsact qdisc already, which Pericarp needs for itself; \
         leave out the CNI plugin that adds it"
    )]
    IngressTaken { interface: String },
    #[error("the pod's interface {interface} was removed while the pod's network was set up")]
    Removed { interface: String },
    #[error(
        "taps cannot be made: {path} cannot be opened; load the module tun (modprobe tun), and run as root"
    )]
    Tun {
        path: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the tap {tap} cannot be made; Pericarp needs CAP_NET_ADMIN over the pod's network namespace")]
    Tap {
        tap: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "the host's kernel cannot redirect the frames of {interface}: it refuses the {what}; load what is \
         missing (modprobe -a sch_ingress cls_u32 act_mirred)"
    )]
    TrafficControl {
        interface: String,
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the host's kernel refuses to {request}")]
    Netlink {
        request: String,
        #[source]
        source: io::Error,
    },
    #[error("the pod's network was not set up within {seconds} s; the host's kernel does not answer")]
    TimeLimit { seconds: u64 },
    #[error("no thread can be had for the pod's network")]
    Thread(#[source] io::Error),
}

/// Makes an error of a request that failed. `request` completes "refuses to …".
fn netlink(request: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    move |error| NetworkError::Netlink { request: request.into(), source: kernel_error(error) }
}

fn kernel_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        error => io::Error::other(error),
    }
}

/// The index of the loopback interface in every network namespace (Linux `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// What the machine and its guest are to be given.
#[derive(Debug, Default)]
pub struct PodNetwork {
    /// The machine's network devices.
    pub nets: Vec<NetConfig>,
    pub interfaces: Vec<Interface>,
    /// In the order in which they are to be added.
    pub routes: Vec<Route>,
    pub neighbours: Vec<Neighbour>,
    /// Where connections to the pod's localhost come from, or why they do not. Without a namespace there are none.
    pub forward: Option<Result<PortForward, SteerError>>,
}

/// An interface of a pod, for its status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// With their prefix lengths.
    pub addresses: Vec<String>,
    /// Whether it was removed from under the running pod.
    #[serde(default)]
    pub removed: bool,
}

impl PodNetwork {
    pub fn status(&self) -> Vec<InterfaceStatus> {
        let status = |interface: &Interface| InterfaceStatus {
            name: interface.name.clone(),
            mac: interface.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
            mtu: interface.mtu,
            addresses: interface
                .addresses
                .iter()
                .map(|address| format!("{}/{}", ip_text(&address.ip), address.prefix_length))
                .collect(),
            removed: false,
        };
        self.interfaces.iter().map(status).collect()
    }
}

fn ip_text(bytes: &[u8]) -> String {
    if let Ok(ip) = <[u8; 4]>::try_from(bytes) {
        Ipv4Addr::from(ip).to_string()
    } else if let Ok(ip) = <[u8; 16]>::try_from(bytes) {
        Ipv6Addr::from(ip).to_string()
    } else {
        format!("{bytes:?}")
    }
}

/// Joins every interface of the pod's network namespace to a tap and reads what the guest must know. Without a
/// namespace, or with one that has no interface but loopback, there is nothing to do.
///
/// Each of the guest's devices gets a queue pair for each of its vCPUs, as far as a machine takes them.
pub async fn set_up(netns: &Path, vcpus: u8) -> Result<PodNetwork, NetworkError> {
    if netns.as_os_str().is_empty() {
        return Ok(PodNetwork::default());
    }
    let netns = netns.to_owned();
    let queue_pairs = u16::from(vcpus).clamp(1, NetConfig::QUEUE_PAIRS_MAX);
    // The thread that has entered the namespace is waited for where waiting is allowed.
    let done = tokio::task::spawn_blocking(move || {
        inside(&netns, async |handle| connect_taps(&handle, &netns, queue_pairs).await)
    });
    done.await.unwrap_or_else(|error| Err(NetworkError::Thread(io::Error::other(error))))
}

/// Removes whatever [`set_up`] has made in a network namespace, also if it failed midway. If that, or the namespace
/// itself, has gone, there is nothing to do. Blocks.
pub fn remove(netns: &Path) -> io::Result<()> {
    if netns.as_os_str().is_empty() {
        return Ok(());
    }
    match inside(netns, async |handle| remove_taps(&handle).await) {
        Ok(()) | Err(NetworkError::Missing { .. } | NetworkError::Own { .. }) => Ok(()),
        Err(error) => Err(io::Error::other(crate::telemetry::error_chain::chain(&error))),
    }
}

async fn connect_taps(handle: &Handle, netns: &Path, queue_pairs: u16) -> Result<PodNetwork, NetworkError> {
    // A start that was cut short, by a crash of the controller, say, may have left something.
    remove_taps(handle).await?;
    let survey = survey::survey(handle).await?;
    let mut devices = Vec::new();
    let mut names = tap::names(&survey.names);
    for interface in &survey.interfaces {
        let name = names.next().unwrap_or_default();
        let tap = tap::make(handle, &name, interface.mtu, queue_pairs).await?;
        let pod_end = End { index: interface.index, name: &interface.name };
        let tap_end = End { index: tap, name: &name };
        redirect::redirect(handle, tap_end, pod_end).await?;
        redirect::redirect(handle, pod_end, tap_end).await?;
        stop_router_solicitations(&interface.name);
        devices.push(NetConfig {
            netns: netns.to_owned(),
            tap: name,
            mac: interface.mac,
            mtu: interface.mtu,
            queue_pairs,
        });
    }
    let interfaces = survey.interfaces.into_iter().map(survey::SurveyedInterface::into_interface).collect();
    // CNI's loopback plugin has done this where containerd runs it.
    let loopback = LinkUnspec::new_with_index(LOOPBACK).up().build();
    handle.link().set(loopback).execute().await.map_err(netlink("bring the pod's loopback interface up"))?;
    Ok(PodNetwork {
        nets: devices,
        interfaces,
        routes: survey.routes,
        neighbours: survey.neighbours,
        forward: Some(steer::steer()),
    })
}

/// Stops the namespace's own kernel from asking for routers in the guest's name: it would go on for ever, as
/// the guest gets all answers. What it does by itself but once, duplicate address detection, came with the
/// address. Netlink has no request for this.
fn stop_router_solicitations(interface: &str) {
    // /proc/sys/net is that of the namespace of the thread that opens it.
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/router_solicitations");
    match std::fs::write(&path, "0") {
        // A kernel without IPv6 asks for nothing.
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(path, %error, "the pod's host side keeps asking for IPv6 routers");
        }
        _ => {}
    }
}

/// Takes taps and interfaces apart again. Taps are known by their names, and as each is made before and removed
/// after the qdisc that leads to it, there are none of our qdiscs where there is no tap.
async fn remove_taps(handle: &Handle) -> Result<(), NetworkError> {
    let links = survey::links(handle).await?;
    let taps: Vec<_> = links.iter().filter(|link| tap::is_ours(link)).collect();
    if taps.is_empty() {
        return Ok(());
    }
    for index in redirect::ingress_qdiscs(handle).await? {
        tolerate_gone(redirect::remove(handle, index).await, "remove an ingress qdisc")?;
    }
    for tap in taps {
        let request = format!("delete the tap {}", tap.name);
        tolerate_gone(handle.link().del(tap.index).execute().await, request)?;
    }
    Ok(())
}

/// What is to be removed may have been removed by others meanwhile.
fn tolerate_gone(
    result: Result<(), rtnetlink::Error>,
    request: impl Into<String>,
) -> Result<(), NetworkError> {
    const GONE: [Errno; 3] = [Errno::NODEV, Errno::NOENT, Errno::INVAL];
    match result {
        Err(rtnetlink::Error::NetlinkError(message))
            if GONE.iter().any(|gone| gone.raw_os_error() == -message.raw_code()) =>
        {
            Ok(())
        }
        result => result.map_err(netlink(request)),
    }
}

#[cfg(test)]
mod tests;
