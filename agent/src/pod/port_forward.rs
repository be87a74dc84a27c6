//! Port-forward: forwards the machine's connections to the pod's localhost.
//!
//! [`FORWARD_PORT`] documents the protocol. IPv4 is tried before IPv6, as containerd does where a pod's localhost is on
//! the host (`criService.portForward`).

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsFd as _,
    sync::Arc,
    thread,
    time::Duration,
};

use pericarp_protos::guest::{FORWARD_PORT, NETWORK_NAMESPACE};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional},
    net::TcpStream,
    sync::Semaphore,
    time::timeout,
};

use super::{Namespaces, Pod};
use crate::ttrpc::Listener;

/// How many connections there may be at the same time; a machine has as many.
const CONNECTIONS_MAX: usize = 1024;

/// How long receiving the port and connecting to it may take. Both take no time unless the machine or the server hangs.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// The byte that tells the machine that the port has been reached.
const REACHED: u8 = 0;

/// Why a connection was not forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("the machine does not say which port a connection is for: {0}")]
    Port(io::Error),
    #[error("nothing takes connections to port {port} of localhost: {source}")]
    Connect { port: u16, source: io::Error },
    #[error("a connection to port {port} of localhost has broken: {source}")]
    Copy { port: u16, source: io::Error },
}

/// Listens for the machine's connections.
pub fn listen() -> io::Result<Listener> {
    Listener::vsock(FORWARD_PORT)
}

/// Serves the pod when it has been configured, in its network namespace.
pub async fn serve_pod(listener: Listener, pod: Arc<Pod>) {
    match pod.wait_until_configured().await {
        Some(Namespaces::Guest) => serve(listener).await,
        Some(Namespaces::Own) => {
            let thread =
                thread::Builder::new().name("forward".into()).spawn(move || serve_in_pod_namespace(listener));
            if let Err(error) = thread {
                tracing::error!(%error, "port-forward to this pod will not work");
            }
        }
        None => {}
    }
}

/// Serves on this thread, which enters the pod's own network namespace and stays there: a socket belongs to the
/// namespace in which it is created.
fn serve_in_pod_namespace(listener: Listener) {
    let enter = || -> io::Result<tokio::runtime::Runtime> {
        let netns = File::open(NETWORK_NAMESPACE)?;
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        tokio::runtime::Builder::new_current_thread().enable_all().build()
    };
    match enter() {
        Ok(runtime) => runtime.block_on(serve(listener)),
        Err(error) => tracing::error!(%error, "port-forward to this pod will not work"),
    }
}

/// Accepts connections and never returns. Each connection is forwarded by a task of its own. Those beyond
/// [`CONNECTIONS_MAX`] are closed.
pub async fn serve(listener: Listener) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        match listener.accept().await {
            Ok(connection) => {
                let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else { continue };
                tokio::spawn(async move {
                    // The machine resets a connection that ends without an answer. A container's errors are not logged
                    // on the console.
                    if let Err(error) = forward(connection, TIME_LIMIT).await {
                        tracing::debug!(%error, "port-forward");
                    }
                    drop(permit);
                });
            }
            // There are no descriptors or no memory. Running tasks may free some before the next attempt.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to be forwarded");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Forwards one connection until both of its ends are closed, or one fails. `limit` applies to each step before the two
/// ends' own bytes.
async fn forward(
    mut machine: impl AsyncRead + AsyncWrite + Unpin,
    limit: Duration,
) -> Result<(), ForwardError> {
    let port = timeout(limit, machine.read_u16())
        .await
        .unwrap_or_else(|elapsed| Err(elapsed.into()))
        .map_err(ForwardError::Port)?;
    let mut server = timeout(limit, connect(port))
        .await
        .unwrap_or_else(|elapsed| Err(elapsed.into()))
        .map_err(|source| ForwardError::Connect { port, source })?;
    let forwarded = async {
        server.set_nodelay(true)?;
        machine.write_u8(REACHED).await?;
        // When one side shuts down its sending direction, so is the other's.
        copy_bidirectional(&mut machine, &mut server).await.map(drop)
    };
    forwarded.await.map_err(|source| ForwardError::Copy { port, source })
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect((IpAddr::from(Ipv4Addr::LOCALHOST), port)).await {
        Ok(server) => Ok(server),
        Err(_) => TcpStream::connect((IpAddr::from(Ipv6Addr::LOCALHOST), port)).await,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    /// A listener at a free port of `ip`, and the port.
    async fn listener(ip: &str) -> (TcpListener, u16) {
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    /// The machine's end of a connection to `port`.
    fn forwarded(port: u16) -> (UnixStream, tokio::task::JoinHandle<Result<(), ForwardError>>) {
        let (machine, agent) = UnixStream::pair().unwrap();
        machine.try_write(&port.to_be_bytes()).unwrap();
        (machine, tokio::spawn(forward(agent, TIME_LIMIT)))
    }

    async fn rest(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_server_at_either_address_of_localhost_is_reached() {
        for ip in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
            let (listener, port) = listener(ip).await;
            let (mut machine, carried) = forwarded(port);
            let (mut server, _) = listener.accept().await.unwrap();
            server.write_all(b"hello").await.unwrap();
            let mut bytes = [0xff; 6];
            machine.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"\0hello", "{ip}");
            machine.write_all(b"bye").await.unwrap();
            machine.shutdown().await.unwrap();
            assert_eq!(rest(&mut server).await, b"bye");
            drop(server);
            assert_eq!(rest(&mut machine).await, b"");
            carried.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_client_that_sends_no_more_still_receives() {
        let (listener, port) = listener("127.0.0.1").await;
        let (mut machine, carried) = forwarded(port);
        let (mut server, _) = listener.accept().await.unwrap();
        machine.write_all(&vec![7; 1 << 20]).await.unwrap();
        machine.shutdown().await.unwrap();
        let count = rest(&mut server).await.len();
        server.write_all(count.to_string().as_bytes()).await.unwrap();
        drop(server);
        assert_eq!(rest(&mut machine).await, b"\x001048576");
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_server_that_sends_no_more_still_receives() {
        let (listener, port) = listener("127.0.0.1").await;
        let (mut machine, carried) = forwarded(port);
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"banner").await.unwrap();
        server.shutdown().await.unwrap();
        assert_eq!(rest(&mut machine).await, b"\0banner");
        machine.write_all(b"late").await.unwrap();
        machine.shutdown().await.unwrap();
        assert_eq!(rest(&mut server).await, b"late");
        carried.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_ends_without_an_answer() {
        let (listener, port) = listener("127.0.0.1").await;
        drop(listener);
        let (mut machine, carried) = forwarded(port);
        assert_eq!(rest(&mut machine).await, b"");
        let error = carried.await.unwrap().unwrap_err();
        assert!(matches!(error, ForwardError::Connect { .. }), "{error}");
        assert!(error.to_string().contains(&port.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_connection_that_names_no_port_is_given_up() {
        for (sent, ends, kind) in [
            (&b""[..], false, io::ErrorKind::TimedOut),
            (b"\0", false, io::ErrorKind::TimedOut),
            (b"\0", true, io::ErrorKind::UnexpectedEof),
        ] {
            let (mut machine, agent) = UnixStream::pair().unwrap();
            machine.write_all(sent).await.unwrap();
            if ends {
                machine.shutdown().await.unwrap();
            }
            let error = forward(agent, Duration::from_millis(20)).await.unwrap_err();
            assert!(matches!(&error, ForwardError::Port(error) if error.kind() == kind), "{error}");
            assert_eq!(rest(&mut machine).await, b"");
        }
    }

    #[tokio::test]
    async fn a_server_that_breaks_the_connection_ends_it_for_the_client() {
        let (listener, port) = listener("::1").await;
        let (mut machine, carried) = forwarded(port);
        let (server, _) = listener.accept().await.unwrap();
        assert_eq!(machine.read_u8().await.unwrap(), REACHED);
        server.set_zero_linger().unwrap();
        drop(server);
        let _ = machine.read_to_end(&mut Vec::new()).await;
        assert!(matches!(carried.await.unwrap(), Err(ForwardError::Copy { .. })));
    }

    #[tokio::test]
    async fn many_connections_are_carried_at_the_same_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        tokio::spawn(serve(Listener::Unix(tokio::net::UnixListener::bind(&path).unwrap())));
        let (listener, port) = listener("127.0.0.1").await;
        let mut pairs = Vec::new();
        for _ in 0..100 {
            let mut machine = UnixStream::connect(&path).await.unwrap();
            machine.write_u16(port).await.unwrap();
            assert_eq!(machine.read_u8().await.unwrap(), REACHED);
            pairs.push((machine, listener.accept().await.unwrap().0));
        }
        for (number, (machine, server)) in (0u32..).zip(&mut pairs) {
            machine.write_u32(number).await.unwrap();
            server.write_u32(number + 1000).await.unwrap();
        }
        for (number, (machine, server)) in (0u32..).zip(&mut pairs) {
            assert_eq!(server.read_u32().await.unwrap(), number);
            assert_eq!(machine.read_u32().await.unwrap(), number + 1000);
        }
    }
}
