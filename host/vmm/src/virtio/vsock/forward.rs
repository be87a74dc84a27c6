//! Port-forward: TCP connections from the pod's network namespace on the host, each carried to the guest.
//!
//! Whatever port is dialled there, the connection arrives at one listener, and the socket that is accepted has that
//! port for its own. It becomes a stream to [`VsockConfig::forward_port`](crate::VsockConfig::forward_port) of the
//! guest, which begins with the port (two bytes, big-endian). The guest answers with one byte, [`REACHED`], once it
//! has connected there itself; everything else is the two ends' own. Until that byte the connection can only end in a
//! reset, so that its client sees an error and not an empty success.

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::net::sockopt::set_socket_linger;

/// The guest's answer when it has connected to the port.
pub const REACHED: u8 = 0;

/// Where forwarded connections come from; opened by whoever starts the machine.
#[derive(Debug)]
pub struct Forward {
    /// Accepts the connections for all ports.
    pub listener: TcpListener,
    /// What leads them there, a BPF link. Only held: the leading ends with the last descriptor of it, and so with the
    /// machine.
    pub steering: OwnedFd,
}

/// Makes a connection that was just accepted ready to be carried. Answers with the port that was dialled.
pub fn prepare(stream: &TcpStream) -> io::Result<u16> {
    reset_on_close(stream, true)?;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream.local_addr()?.port())
}

/// Whether closing a TCP socket resets its connection (`SO_LINGER`, socket(7)), however it comes to be closed.
pub fn reset_on_close(stream: impl AsFd, reset: bool) -> io::Result<()> {
    Ok(set_socket_linger(stream, reset.then_some(Duration::ZERO))?)
}

/// What a forwarded connection's stream begins with.
pub fn preamble(port: u16) -> [u8; 2] {
    port.to_be_bytes()
}
