//! Port-forward: TCP connections from the pod's network namespace on the host, each carried to the guest.
//!
//! Whatever port a client dials there, its connection arrives at one listener, and the accepted socket has the dialled
//! port as its local one. The device makes it a stream to
//! [`VsockConfig::forward_port`](crate::VsockConfig::forward_port) of the guest, which begins with the port (two bytes,
//! big-endian). The guest sends one byte, [`REACHED`], once it has connected to that port itself; all other bytes are
//! the two ends' own. Until that byte has come, the connection can only end in a reset, so that its client sees an
//! error instead of a response that is empty.

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::net::sockopt::set_socket_linger;

/// The byte that the guest sends first, when it has connected to the port.
pub const REACHED: u8 = 0;

/// Where the connections come from. Whoever starts the machine opens both.
#[derive(Debug)]
pub struct PortForward {
    /// Accepts the connections to all ports.
    pub listener: TcpListener,
    /// The BPF link that steers them to the listener. Nothing uses it: it lasts as long as a descriptor of it does, and
    /// so ends with the machine.
    pub steering: OwnedFd,
}

/// Sets the options of a connection that was just accepted, and returns the port that its client has dialled.
pub fn configure_accepted(stream: &TcpStream) -> io::Result<u16> {
    set_reset_on_close(stream, true)?;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream.local_addr()?.port())
}

/// Sets whether closing a TCP socket resets its connection (`SO_LINGER`, socket(7)), in whatever way it is closed.
pub fn set_reset_on_close(stream: impl AsFd, reset: bool) -> io::Result<()> {
    Ok(set_socket_linger(stream, reset.then_some(Duration::ZERO))?)
}

/// The bytes that a forwarded connection's stream to the guest begins with.
pub fn preamble(port: u16) -> [u8; 2] {
    port.to_be_bytes()
}
