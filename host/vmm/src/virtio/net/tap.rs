//! The host's end: a tap that the controller has made in the pod's network namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    path::{Path, PathBuf},
};

use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

use super::worker::HEADER_SIZE;

const TUN: &str = "/dev/net/tun";

/// A tap cannot be attached to. Nothing of the machine has run yet.
#[derive(Debug, Error)]
pub enum TapError {
    #[error("cannot enter the pod's network namespace {netns}")]
    Netns {
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot open {TUN}; load the module tun, and see that the machine's user may use it")]
    Tun(#[source] io::Error),
    #[error("cannot attach to the tap {tap} in {netns}")]
    Attach {
        tap: String,
        netns: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start a thread to enter a network namespace with")]
    Thread(#[source] io::Error),
}

/// What the guest's driver can do with frames that come to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// It verifies, or does without, checksums that were never computed.
    pub checksum: bool,
    /// It takes TCP segments over IPv4 larger than its MTU.
    pub tso4: bool,
    /// And over IPv6.
    pub tso6: bool,
}

/// An open tap. Frames are read and written with a `virtio_net_hdr_v1` in front of them.
#[derive(Debug)]
pub struct Tap {
    file: File,
    /// A stand-in for a tap in tests takes no ioctls.
    #[cfg(test)]
    stand_in: bool,
}

/// `struct ifreq` as `TUNSETIFF` uses it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl Tap {
    /// Attaches to a tap that exists in another network namespace. This process stays in its own: a
    /// thread that ends at once goes there.
    pub fn open(netns: &Path, tap: &str) -> Result<Tap, TapError> {
        let (inside, name) = (netns.to_owned(), tap.to_owned());
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                enter(&inside)?;
                attach(&inside, &name)
            })
            .map_err(TapError::Thread)?
            .join()
            .unwrap_or_else(|_| Err(TapError::Thread(io::Error::other("it has panicked"))))
    }

    /// Tells the kernel what it may leave to the guest.
    pub fn set_offload(&self, offload: Offload) -> io::Result<()> {
        #[cfg(test)]
        if self.stand_in {
            return Ok(());
        }
        let mut flags = 0;
        if offload.checksum {
            flags |= libc::TUN_F_CSUM;
            for (wanted, flag) in [(offload.tso4, libc::TUN_F_TSO4), (offload.tso6, libc::TUN_F_TSO6)] {
                if wanted {
                    flags |= flag;
                }
            }
        }
        // SAFETY: this request takes a number and touches no memory.
        let result = unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD, flags.into()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn enter(netns: &Path) -> Result<(), TapError> {
    let failed = |source| TapError::Netns { netns: netns.into(), source };
    let file = File::open(netns).map_err(failed)?;
    rustix::thread::move_into_link_name_space(
        std::os::fd::AsFd::as_fd(&file),
        Some(rustix::thread::LinkNameSpaceType::Network),
    )
    .map_err(|errno| failed(errno.into()))
}

fn attach(netns: &Path, tap: &str) -> Result<Tap, TapError> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let failed = |source| TapError::Attach { tap: tap.to_owned(), netns: netns.into(), source };
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)
        .map_err(TapError::Tun)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: libc::c_short::try_from(flags).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?,
        rest: [0; 22],
    };
    // One byte is left for the terminator.
    if tap.is_empty() || tap.len() >= request.name.len() || tap.contains('\0') {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not the name of an interface")));
    }
    request.name[..tap.len()].copy_from_slice(tap.as_bytes());
    // SAFETY: the request has the size and layout of the kernel's `ifreq` and lives for the call.
    if unsafe { ioctl_with_ref(&file, libc::TUNSETIFF, &request) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    let size = i32::try_from(HEADER_SIZE).unwrap_or_default();
    // SAFETY: the kernel reads one `int`, which lives for the call.
    if unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ, &size) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(Tap {
        file,
        #[cfg(test)]
        stand_in: false,
    })
}

/// A stand-in for a tap, and its other end: like a tap, it keeps frames apart.
#[cfg(test)]
pub fn pair() -> (Tap, std::os::unix::net::UnixDatagram) {
    let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (Tap { file: File::from(std::os::fd::OwnedFd::from(ours)), stand_in: true }, theirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_namespace_that_is_gone_is_named() {
        let error = Tap::open(Path::new("/no/such/netns"), "tap0").unwrap_err();
        assert!(error.to_string().contains("/no/such/netns"), "{error}");
    }

    #[test]
    fn a_name_that_no_interface_can_have_is_refused() {
        for name in ["", "a-name-that-is-too-long", "a\0b"] {
            let error = Tap::open(Path::new("/proc/self/ns/net"), name).unwrap_err();
            assert!(matches!(error, TapError::Attach { .. }), "{error}");
        }
    }
}
