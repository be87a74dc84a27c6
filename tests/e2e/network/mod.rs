//! The pod's network: its addresses are the guest's own.

mod failures;
mod plugins;
mod reach;
mod statistics;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context, Result, bail};
use pericarp_tests::{Container, HANG_LIMIT, Node, Pod, PodBuilder};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::timeout,
};

/// The port at which a pod's `peer` serves.
const PORT: u16 = 8080;

/// A pod whose container serves at [`PORT`].
struct Server {
    pod: Pod,
    container: Container,
    addresses: Vec<IpAddr>,
}

impl Server {
    async fn new(node: &Node, name: &str) -> Result<Self> {
        Self::of(node.pod(name)).await
    }

    async fn of(pod: PodBuilder) -> Result<Self> {
        Self::in_pod(pod.run().await?).await
    }

    /// In a pod that tests have one after the other; its host name is `pooled`.
    async fn pooled(node: &Node) -> Result<Self> {
        Self::in_pod(node.pooled_pod().await?).await
    }

    async fn in_pod(pod: Pod) -> Result<Self> {
        let container = pod.container("server").command(["peer", "serve", "[::]:8080"]).start().await?;
        container.wait_for_output("ready\n").await?;
        let addresses = pod.addresses().await?;
        Ok(Self { pod, container, addresses })
    }

    /// Its main address.
    fn address(&self) -> Result<SocketAddr> {
        let ip = self.addresses.first().context("the pod has no address")?;
        Ok(SocketAddr::new(*ip, PORT))
    }

    /// Its IPv6 address.
    fn six(&self) -> Result<SocketAddr> {
        let ip = self.addresses.iter().find(|ip| ip.is_ipv6()).context("the pod has no IPv6 address")?;
        Ok(SocketAddr::new(*ip, PORT))
    }

    /// Sends a question from this server's container to another server; returns the response.
    async fn asks(&self, protocol: &str, other: SocketAddr, question: &str) -> Result<String> {
        let other = other.to_string();
        let output = self.container.exec(["peer", protocol, &other, question]).await?;
        if output.exit_code != 0 {
            bail!("peer {protocol} {other} {question}: {output:?}");
        }
        Ok(output.stdout.trim_end().to_owned())
    }
}

/// Sends one line from the node to a server over TCP; returns the response.
async fn ask(server: SocketAddr, line: &str) -> Result<String> {
    let mut answer = String::new();
    let asked = async {
        let mut stream = TcpStream::connect(server).await?;
        stream.write_all(format!("{line}\n").as_bytes()).await?;
        stream.shutdown().await?;
        stream.read_to_string(&mut answer).await
    };
    timeout(HANG_LIMIT, asked)
        .await
        .map_err(io::Error::from)
        .flatten()
        .with_context(|| format!("ask {server}"))?;
    Ok(answer.trim_end().to_owned())
}

/// Sends one datagram from the node to a server; returns the response.
async fn ask_by_datagram(server: SocketAddr, text: &str) -> Result<String> {
    let mut answer = vec![0; 65_536];
    let asked = async {
        let socket = UdpSocket::bind((any_for(server.ip()), 0)).await?;
        socket.send_to(text.as_bytes(), server).await?;
        socket.recv(&mut answer).await
    };
    let length = timeout(HANG_LIMIT, asked)
        .await
        .map_err(io::Error::from)
        .flatten()
        .with_context(|| format!("ask {server} by a datagram"))?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn any_for(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Has a pod connect to an address of the node; returns the address that the connection came from.
async fn pod_connects_to_node(server: &Server, node: IpAddr) -> Result<IpAddr> {
    let listener = TcpListener::bind((node, 0)).await?;
    let port = listener.local_addr()?.port();
    let greeter = async {
        let (mut stream, from) = timeout(HANG_LIMIT, listener.accept()).await??;
        let mut question = String::new();
        timeout(HANG_LIMIT, stream.read_to_string(&mut question)).await??;
        stream.write_all(format!("{} back", question.trim_end()).as_bytes()).await?;
        stream.shutdown().await?;
        anyhow::Ok(from.ip())
    };
    let (from, said) = futures::try_join!(greeter, server.asks("tcp", SocketAddr::new(node, port), "there"))?;
    assert_eq!(said, "there back");
    Ok(from)
}

/// Runs a command on the node, which must succeed; returns its output.
async fn on_the_node(command: &str) -> Result<String> {
    let output = Command::new("sh").args(["-c", command]).output().await?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
