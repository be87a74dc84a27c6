//! Tells systemd that the service is up (`sd_notify(3)`).

use std::{
    env, io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// Sends `READY=1`, if the service manager wants to know.
pub fn ready() {
    let Some(address) = env::var_os("NOTIFY_SOCKET") else { return };
    let send = || -> io::Result<usize> {
        let socket = UnixDatagram::unbound()?;
        let bytes = address.as_encoded_bytes();
        let address = match bytes.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&address)?,
        };
        socket.send_to_addr(b"READY=1", &address)
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "cannot tell systemd that the controller is ready");
    }
}
