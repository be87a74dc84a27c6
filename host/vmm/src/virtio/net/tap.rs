//! The tap: an interface in the pod's network namespace whose other end is a file descriptor, or several.
//!
//! A tap with several queues distributes frames over those that are attached, by the connection that a frame belongs
//! to. Frames of a connection on which the guest itself sends arrive at the queue through which it sends. A detached
//! queue is given no frames, but still takes them. (`Documentation/networking/tuntap.rst`, "Multiqueue tuntap
//! interface".)

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    net::{AddressFamily, SocketType},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use thiserror::Error;

use super::{HEADER_SIZE, feature};
use crate::lock::unpoisoned;

const TUN: &str = "/dev/net/tun";

/// A tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    #[error("the tap's name {name:?} is empty or longer than {} bytes", libc::IFNAMSIZ - 1)]
    Name { name: String },
    #[error(
        "cannot open {netns}, the network namespace of the tap {tap}; if it is gone, the pod's network has \
         been torn down and the pod has to be made again"
    )]
    Netns {
        netns: PathBuf,
        tap: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot enter {netns}; it must be a network namespace, and the machine needs CAP_SYS_ADMIN")]
    Enter {
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is no interface {tap} in {netns}; the tap must exist before the machine starts, so the pod \
         has to be made again"
    )]
    Missing {
        netns: PathBuf,
        tap: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "cannot open {TUN}; load the kernel module tun (`modprobe tun`), and let the machine's user read \
         and write the device"
    )]
    OpenTun(#[source] io::Error),
    #[error(
        "cannot attach to {tap} in {netns} (queues: {queues}); it must be a tap that no other process \
         holds, made with IFF_MULTI_QUEUE for several queues and without it for one, and the machine needs \
         CAP_NET_ADMIN"
    )]
    Attach {
        netns: PathBuf,
        tap: String,
        queues: u16,
        #[source]
        source: io::Error,
    },
    #[error("the kernel refuses to {what} the tap {tap} in {netns}")]
    SetUp {
        what: &'static str,
        netns: PathBuf,
        tap: String,
        #[source]
        source: io::Error,
    },
}

/// The machine's end of a tap, or of one of its queues. Reads and writes move whole frames, each behind a
/// `virtio_net_hdr`, and do not block.
pub struct Tap {
    fd: OwnedFd,
    /// Whether the kernel segments UDP for the tap (since Linux 6.2).
    segments_udp: bool,
    /// Locked while frames are moved from the tap to the guest: see [`Tap::detach_queue`].
    receiving: Mutex<()>,
}

impl Tap {
    /// Attaches to the tap `name` in the network namespace `netns` with one or more queues, of which all except the
    /// first are detached until [`Tap::attach_queue`]. The caller stays in its own namespace.
    ///
    /// Until [`Tap::set_offloads`], the tap gives only complete frames: their checksums are filled in, and none is
    /// larger than its MTU.
    pub fn open(netns: &Path, name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        let namespace =
            rustix::fs::open(netns, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| {
                TapError::Netns { netns: netns.to_owned(), tap: name.to_owned(), source: error.into() }
            })?;
        let enter = |source: Errno| TapError::Enter { netns: netns.to_owned(), source: source.into() };
        // Not on another thread: a process that has, or has just had, others cannot enter a user namespace.
        let own =
            rustix::fs::open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(enter)?;
        let attached = attach(&namespace, netns, name, queues);
        move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Network)).map_err(enter)?;
        let refused = |what| {
            move |source| TapError::SetUp { what, netns: netns.to_owned(), tap: name.to_owned(), source }
        };
        let mut taps: Vec<_> = attached?.into_iter().map(Self::new).collect();
        for tap in taps.iter().skip(1) {
            tap.detach_queue().map_err(refused("detach a queue of"))?;
        }
        // These settings are of the whole tap, whichever queue is used to change them.
        let mut segments_udp = false;
        if let Some(tap) = taps.first() {
            tap.set_header_size().map_err(refused("put virtio headers before the frames of"))?;
            segments_udp = tap.try_offloads().map_err(refused("offload segmentation on"))?;
            tap.set_offload_flags(0).map_err(refused("switch off offloads on"))?;
            tap.discard_queued();
        }
        for tap in &mut taps {
            tap.segments_udp = segments_udp;
        }
        Ok(taps)
    }

    fn new(fd: OwnedFd) -> Self {
        Self { fd, segments_udp: false, receiving: Mutex::new(()) }
    }

    /// Switches all offloads on that the kernel knows. Returns whether it segments UDP too.
    fn try_offloads(&self) -> io::Result<bool> {
        // The kernel refuses flags that it does not know. (It knows TUN_F_UFO, but since Linux 4.14 it gives nobody a
        // UDP datagram that is still to be fragmented, so that the flag would gain nothing.)
        if self.set_offload_flags(ALL_OFFLOADS).is_ok() {
            return Ok(true);
        }
        self.set_offload_flags(ALL_OFFLOADS & !USO).map(|()| false)
    }

    /// A socket that keeps message boundaries in place of a tap.
    #[cfg(test)]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { segments_udp: true, ..Self::new(fd) }
    }

    /// Whether UDP segmentation can be offered to the guest.
    pub fn segments_udp(&self) -> bool {
        self.segments_udp
    }

    /// Lets the tap give frames that the guest's driver has said it can take: frames without a checksum, and frames
    /// larger than the MTU.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.set_offload_flags(offload_flags(features))
    }

    /// Lets the kernel give frames to this queue, which must be detached.
    pub fn attach_queue(&self) -> io::Result<()> {
        self.set_queue(libc::IFF_ATTACH_QUEUE)
    }

    /// Lets the kernel give no more frames to this queue. When this returns, the guest receives nothing more from it:
    /// the kernel has emptied it, and no thread is moving a frame.
    pub fn detach_queue(&self) -> io::Result<()> {
        self.set_queue(libc::IFF_DETACH_QUEUE)?;
        drop(self.lock_receiving());
        Ok(())
    }

    /// Must be held while frames are moved from the tap to the guest.
    pub fn lock_receiving(&self) -> MutexGuard<'_, ()> {
        unpoisoned(self.receiving.lock())
    }

    /// Attaches or detaches this queue. For that the kernel takes the lock that all of the host's network configuration
    /// shares (`rtnl_lock`), and waits for all processors when a queue is detached.
    fn set_queue(&self, change: libc::c_int) -> io::Result<()> {
        let request = no_interface(change);
        // SAFETY: the request is an ifreq, which outlives the call.
        result(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) })
    }

    /// Discards the frames that the tap has queued while other offloads were on. Nobody was there to receive them.
    fn discard_queued(&self) {
        /// Longest queue of a tap (its `txqueuelen`), unless somebody has set a longer one.
        const QUEUE_MAX: usize = 1000;
        let mut start = [0; HEADER_SIZE as usize];
        for _ in 0..QUEUE_MAX {
            if rustix::io::read(&self.fd, &mut start).is_err() {
                break;
            }
        }
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = libc::c_int::from(HEADER_SIZE);
        // SAFETY: the request reads one int, which outlives the call.
        result(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
    }

    fn set_offload_flags(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: the request's argument is a number, not an address.
        result(unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const USO: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const ALL_OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | USO;

/// The tap's offloads for a driver that has accepted `features`. Segmentation needs [`feature::GUEST_CSUM`] (virtio
/// 1.2, section 5.1.3.1). The kernel switches segmentation of UDP for IPv4 and IPv6 together.
fn offload_flags(features: u64) -> libc::c_uint {
    let accepted = |wanted: u64| features & wanted == wanted;
    if !accepted(feature::GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    if accepted(feature::GUEST_TSO4) {
        flags |= libc::TUN_F_TSO4;
    }
    if accepted(feature::GUEST_TSO6) {
        flags |= libc::TUN_F_TSO6;
    }
    if accepted(feature::GUEST_USO4 | feature::GUEST_USO6) {
        flags |= USO;
    }
    flags
}

/// Attaches to a tap. The calling thread enters the tap's namespace, and has to leave it again.
fn attach(namespace: &OwnedFd, netns: &Path, name: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    let request = interface_request(name, queues)?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| TapError::Enter { netns: netns.to_owned(), source: error.into() })?;
    // The interface is looked for first, because the tun driver would make one that does not exist.
    interface_index(name).map_err(|error| TapError::Missing {
        netns: netns.to_owned(),
        tap: name.to_owned(),
        source: error.into(),
    })?;
    let attach_one = |_| {
        let tun = open_tun().map_err(TapError::OpenTun)?;
        // SAFETY: the request is an ifreq, which outlives the call.
        result(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) }).map_err(
            |source| TapError::Attach { netns: netns.to_owned(), tap: name.to_owned(), queues, source },
        )?;
        Ok(tun)
    };
    (0..queues).map(attach_one).collect()
}

pub(super) fn open_tun() -> io::Result<OwnedFd> {
    // The standard library adds O_CLOEXEC.
    let tun =
        pericarp_jail::open_sealed(Path::new(TUN), pericarp_jail::Access::ReadAndWrite, libc::O_NONBLOCK)?;
    Ok(tun.into())
}

pub(super) fn interface_index(name: &str) -> Result<u32, Errno> {
    // Any socket will do: it belongs to the thread's namespace.
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    rustix::net::netdevice::name_to_index(socket, name)
}

/// The request to attach to a tap. A tap with several queues needs `IFF_MULTI_QUEUE`, and one with a single queue must
/// not have it.
pub(super) fn interface_request(name: &str, queues: u16) -> Result<libc::ifreq, TapError> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(TapError::Name { name: name.to_owned() });
    }
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = no_interface(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several);
    for (target, source) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([source]);
    }
    Ok(request)
}

/// A request that names no interface.
fn no_interface(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: an ifreq is made of numbers and addresses, all of which may be zero.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    #[expect(clippy::cast_possible_truncation, reason = "every flag is below 0x8000")]
    let flags = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    request
}

/// The result of a system call.
pub(super) fn result(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The meaning of an error when a frame is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapFailure {
    /// Nothing can be moved at the moment. The descriptor becomes ready when that changes.
    WouldBlock,
    /// This frame is lost, but the next one may be moved.
    FrameLost,
    /// The tap will never move a frame again.
    Gone,
}

impl TapFailure {
    /// The meaning of an error of a read. When the kernel reports a header that cannot be built, or memory that cannot
    /// be written, it has taken the frame from the tap. All other errors would come again at once, and without end.
    pub fn of_read(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::WouldBlock,
            Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM | libc::ENOBUFS) => Self::FrameLost,
            _ => Self::Gone,
        }
    }

    /// The meaning of an error of a write. Each write uses up a frame of the guest, so that no error can come again
    /// without end. EIO is an interface that is down, EINVAL a header that the kernel does not accept.
    pub fn of_write(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::WouldBlock,
            Some(
                libc::EBADFD | libc::EBADF | libc::ENODEV | libc::ENXIO | libc::EPIPE | libc::ECONNRESET,
            ) => Self::Gone,
            _ => Self::FrameLost,
        }
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
