//! Listening sockets and the connections that they accept.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// A listening socket.
pub enum Listener {
    /// In a guest.
    Vsock(VsockListener),
    /// In tests.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port of the guest.
    pub fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// Waits for the next connection. One that does not come from the host is dropped, because containers can open
    /// vsock sockets as well.
    pub async fn accept(&self) -> io::Result<Connection> {
        loop {
            match self {
                Self::Vsock(listener) => {
                    let (stream, peer) = listener.accept().await?;
                    if peer.cid() == VMADDR_CID_HOST {
                        return Ok(Connection::Vsock(stream));
                    }
                    tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's");
                }
                Self::Unix(listener) => return Ok(Connection::Unix(listener.accept().await?.0)),
            }
        }
    }
}

/// A connection that a [`Listener`] has accepted.
pub enum Connection {
    /// In a guest.
    Vsock(VsockStream),
    /// In tests.
    Unix(UnixStream),
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_write(context, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_write(context, buffer),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_flush(context),
            Self::Unix(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}
