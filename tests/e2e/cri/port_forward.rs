//! Port-forward to servers on a pod's localhost.

use std::{
    fs::File,
    io::{self, ErrorKind},
    net::SocketAddr,
    os::fd::AsFd as _,
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use pericarp_tests::{
    Container, HANG_LIMIT, Node, Pod, PortForwardOutput, Runtime,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
    },
    on_node, on_pericarp, wait_until,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// A port at which nobody listens.
const NOBODY: u16 = 9;

/// Starts a container that serves at an address of its pod.
async fn serve(pod: &Pod, name: &str, address: &str) -> Result<Container> {
    let container = pod.container(name).command(["peer", "serve", address]).start().await?;
    container.wait_for_output("ready\n").await?;
    Ok(container)
}

/// A pod with one server.
async fn pod_with_server(node: &Node, address: &str) -> Result<(Pod, Container)> {
    let pod = node.pooled_pod().await?;
    let container = serve(&pod, "server", address).await?;
    Ok((pod, container))
}

/// Sends a line to the server at a port, by port-forward, and reads its response to the end of the connection.
async fn ask(pod: &Pod, port: u16, line: &str) -> Result<PortForwardOutput> {
    let mut forward = pod.forward_port(port).await?;
    forward.write(format!("{line}\n").as_bytes()).await?;
    forward.wait_for_end().await.with_context(|| format!("ask port {port} for {line}"))
}

fn answer(text: &str) -> PortForwardOutput {
    PortForwardOutput { data: text.as_bytes().to_vec(), error: String::new() }
}

fn pattern(seed: u32, length: u32) -> Vec<u8> {
    (0..length).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed * 7919) >> 24) as u8).collect()
}

/// The pod's network namespace on the host, where containerd dials.
async fn netns_of(node: &Node, pod: &Pod) -> Result<String> {
    let info = pod.info().await?;
    let netns = match node.runtime {
        Runtime::Pericarp => info["pericarp"]["netns"].as_str(),
        Runtime::Runc => info["runtimeSpec"]["linux"]["namespaces"]
            .as_array()
            .and_then(|all| all.iter().find(|namespace| namespace["type"] == "network"))
            .and_then(|namespace| namespace["path"].as_str()),
    };
    Ok(netns.with_context(|| format!("no netns in {info:#}"))?.to_owned())
}

/// Dials from inside a network namespace, on a thread that ends there.
fn dial(netns: &str, address: &str) -> io::Result<TcpStream> {
    let (netns, address): (_, SocketAddr) = (netns.to_owned(), address.parse().map_err(io::Error::other)?);
    let dialled = thread::spawn(move || {
        let netns = File::open(netns)?;
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        let stream = std::net::TcpStream::connect_timeout(&address, HANG_LIMIT)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    });
    dialled
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        .and_then(TcpStream::from_std)
}

#[test]
fn a_server_on_either_address_of_localhost_alone_is_reached() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        for (name, address) in [("four", "127.0.0.1:8004"), ("six", "[::1]:8006"), ("all", "[::]:8000")] {
            serve(&pod, name, address).await?;
        }
        for port in [8004, 8006, 8000] {
            assert_eq!(ask(&pod, port, "name").await?, answer("pooled\n"), "port {port}");
        }
        if node.runtime == Runtime::Pericarp {
            assert_eq!(pod.info().await?["pericarp"]["portForward"], "works");
        }
        Ok(())
    })
}

#[test]
fn fifty_connections_at_once_each_carry_their_own_data() -> Result<()> {
    on_node(async |node| {
        let (pod, _server) = pod_with_server(node, "127.0.0.1:8080").await?;
        let mut forwards = Vec::new();
        for _ in 0..50 {
            let mut forward = pod.forward_port(8080).await?;
            forward.write(b"echo\n").await?;
            forwards.push(forward);
        }
        // All of them are open by now.
        let echoed = forwards.into_iter().zip(0..).map(async |(mut forward, seed)| {
            let sent = pattern(seed, 20_000);
            forward.write(&sent).await?;
            ensure!(forward.read(sent.len()).await? == sent, "connection {seed} got other data");
            forward.close().await
        });
        try_join_all(echoed).await?;
        Ok(())
    })
}

#[test]
fn a_large_answer_arrives_whole_and_ends_without_an_error() -> Result<()> {
    on_node(async |node| {
        let (pod, _server) = pod_with_server(node, "127.0.0.1:8080").await?;
        let answer = ask(&pod, 8080, "source 3000000").await?;
        assert_eq!((answer.data.len(), answer.error.as_str()), (3_000_000, ""));
        assert!(answer.data.iter().all(|byte| *byte == b'p'), "the bytes differ");
        Ok(())
    })
}

#[test]
fn the_end_of_either_sides_data_reaches_the_other() -> Result<()> {
    on_node(async |node| {
        let (pod, _server) = pod_with_server(node, "[::]:8080").await?;
        let netns = netns_of(node, &pod).await?;
        for address in ["127.0.0.1:8080", "[::1]:8080"] {
            // The client ends its side; the server responds after that.
            let mut stream = dial(&netns, address)?;
            stream.write_all(b"sink\n").await?;
            stream.write_all(&pattern(1, 1_000_000)).await?;
            stream.shutdown().await?;
            let mut text = String::new();
            timeout(HANG_LIMIT, stream.read_to_string(&mut text)).await??;
            assert_eq!(text, "1000000\n", "{address}");

            // The server ends its side; the client's is still open.
            let mut stream = dial(&netns, address)?;
            stream.write_all(b"source 1000000\n").await?;
            let mut bytes = Vec::new();
            timeout(HANG_LIMIT, stream.read_to_end(&mut bytes)).await??;
            assert_eq!(bytes.len(), 1_000_000, "{address}");
        }
        Ok(())
    })
}

#[test]
fn a_client_that_goes_away_is_seen_by_the_server() -> Result<()> {
    on_node(async |node| {
        let (pod, server) = pod_with_server(node, "127.0.0.1:8080").await?;
        let mut forward = pod.forward_port(8080).await?;
        forward.write(b"echo\nhello").await?;
        assert_eq!(forward.read(5).await?, b"hello");
        // Established connections of port 8080: the server's ends of them.
        let count = "grep -c ':1F90 [^ ]* 01' /proc/net/tcp || true";
        assert_eq!(server.shell(count).await?, "1");
        forward.close().await?;
        wait_until("the server to lose the connection", async || Ok(server.shell(count).await? == "0")).await
    })
}

#[test]
fn a_port_that_nobody_listens_on_is_an_error_and_later_connections_work() -> Result<()> {
    on_node(async |node| {
        let (pod, _server) = pod_with_server(node, "127.0.0.1:8080").await?;
        for line in ["", "name"] {
            let refused = ask(&pod, NOBODY, line).await?;
            assert_eq!(refused.data, b"");
            assert!(refused.error.contains(&format!("error forwarding port {NOBODY} to pod")), "{refused:?}");
        }
        // The error is the same while another connection is open.
        let mut open = pod.forward_port(8080).await?;
        open.write(b"echo\nbefore").await?;
        assert_eq!(open.read(6).await?, b"before");
        assert_ne!(ask(&pod, NOBODY, "").await?.error, "");
        open.write(b"after").await?;
        assert_eq!(open.read(5).await?, b"after");
        assert_eq!(ask(&pod, 8080, "name").await?, answer("pooled\n"));
        open.close().await
    })
}

/// Whether a machine accepts connections to a pod's localhost, in whose guest nobody listens.
async fn reaches_machine(netns: &str) -> Result<bool> {
    let read = async {
        let mut stream = dial(netns, &format!("127.0.0.1:{NOBODY}"))?;
        stream.read(&mut [0; 1]).await
    };
    match timeout(HANG_LIMIT, read).await? {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
        other => bail!("neither refused nor reset, but {other:?}"),
    }
}

#[test]
fn forwarding_outlives_the_controller_and_ends_with_the_machine() -> Result<()> {
    on_pericarp(async |node| {
        let mut controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        controller.start_pod("kept", &pod_config("kept"), &netns).await?;
        assert!(reaches_machine(&netns.path()).await?);
        let mut controller = controller.replace().await?;
        assert!(reaches_machine(&netns.path()).await?, "after the controller was killed");
        controller.shut_down_pod("kept").await?;
        assert!(!reaches_machine(&netns.path()).await?, "after the pod's end");
        netns.remove().await?;
        controller.stop().await
    })
}
