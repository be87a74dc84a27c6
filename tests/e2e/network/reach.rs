//! Who reaches whom on the node's own network.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use pericarp_tests::{HANG_LIMIT, Runtime, on_node};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{Server, ask, ask_by_datagram, pod_connects_to_node};

/// The node's address on the bridge.
const GATEWAY: &str = "10.88.0.1";

#[test]
fn the_pods_address_is_the_guests() -> Result<()> {
    on_node(async |node| {
        let server = Server::new(node, "server").await?;
        let address = server.addresses.first().context("the pod's address")?;
        let shown = server.container.shell("ip -4 -o address show dev eth0; ip link show dev eth0").await?;
        assert!(shown.contains(&format!("inet {address}/16")), "{shown}");
        assert!(shown.contains("mtu 1500"), "{shown}");
        let routes = server.container.shell("ip route").await?;
        assert!(routes.contains(&format!("default via {GATEWAY} dev eth0")), "{routes}");
        if node.runtime == Runtime::Pericarp {
            // Until kubelet mounts its own; containerd gives runc's containers the node's.
            let hosts = server.container.shell("cat /etc/hosts").await?;
            assert!(hosts.lines().any(|line| line == format!("{address}\tserver")), "{hosts}");
        }
        Ok(())
    })
}

#[test]
fn the_node_and_the_pod_reach_each_other() -> Result<()> {
    on_node(async |node| {
        let server = Server::new(node, "server").await?;
        let address = server.address()?;
        // As kubelet's probes come.
        assert_eq!(ask(address, "name").await?, "server");
        assert_eq!(ask_by_datagram(address, "hello").await?, "server hello");
        let ping = format!("ping -c 1 -W 10 {}", address.ip());
        super::on_the_node(&ping.replace("ping", "busybox ping")).await?;
        assert_eq!(pod_connects_to_node(&server, GATEWAY.parse()?).await?, address.ip());
        // A port that nobody listens on is refused, not silent.
        let error = ask(SocketAddr::new(address.ip(), 1), "name").await.unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");

        server.pod.stop().await?;
        server.pod.remove().await
    })
}

#[test]
fn pods_reach_each_other_whatever_runs_them() -> Result<()> {
    on_node(async |node| {
        let other = node.with_runtime(Runtime::Runc);
        let (one, two, three) = futures::try_join!(
            Server::new(node, "one"),
            Server::new(node, "two"),
            Server::new(&other, "three")
        )?;
        for (asking, asked) in [
            (&one, [(&two, "two"), (&three, "three")]),
            (&two, [(&one, "one"), (&three, "three")]),
            (&three, [(&one, "one"), (&two, "two")]),
        ] {
            for (server, name) in asked {
                assert_eq!(asking.asks("tcp", server.address()?, "name").await?, name);
                let answer = asking.asks("udp", server.address()?, "datagram").await?;
                assert_eq!(answer, format!("{name} datagram"));
            }
        }
        Ok(())
    })
}

#[test]
fn megabytes_cross_in_both_directions_unchanged() -> Result<()> {
    on_node(async |node| {
        let server = Server::pooled(node).await?;
        let sent: Vec<u8> = (0..4u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut stream = timeout(HANG_LIMIT, TcpStream::connect(server.address()?)).await??;
        stream.write_all(b"echo\n").await?;
        let (mut reader, mut writer) = stream.split();
        let mut received = Vec::new();
        let write = async {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        };
        timeout(HANG_LIMIT, async { futures::try_join!(write, reader.read_to_end(&mut received)) }).await??;
        assert_eq!(received.len(), sent.len());
        assert!(received == sent, "the bytes differ");
        Ok(())
    })
}

#[test]
fn a_datagram_larger_than_the_mtu_crosses_in_pieces() -> Result<()> {
    on_node(async |node| {
        let server = Server::pooled(node).await?;
        let text = "0123456789".repeat(2_000);
        assert_eq!(ask_by_datagram(server.address()?, &text).await?, format!("pooled {text}"));
        Ok(())
    })
}

#[test]
fn a_hundred_connections_are_open_at_once() -> Result<()> {
    on_node(async |node| {
        let server = Server::pooled(node).await?;
        let address = server.address()?;
        let connect = async |number: u32| {
            let mut stream = TcpStream::connect(address).await?;
            stream.write_all(format!("echo\n{number}\n").as_bytes()).await?;
            anyhow::Ok((number, stream))
        };
        let streams = timeout(HANG_LIMIT, futures::future::try_join_all((0..100).map(connect))).await??;
        for (number, mut stream) in streams {
            let mut answer = String::new();
            stream.shutdown().await?;
            timeout(HANG_LIMIT, stream.read_to_string(&mut answer)).await??;
            assert_eq!(answer, format!("{number}\n"));
        }
        Ok(())
    })
}

#[test]
fn a_pods_loopback_is_its_own() -> Result<()> {
    on_node(async |node| {
        let server = Server::pooled(node).await?;
        for loopback in ["127.0.0.1", "::1"] {
            let loopback: IpAddr = loopback.parse()?;
            assert_eq!(server.asks("tcp", SocketAddr::new(loopback, super::PORT), "name").await?, "pooled");
        }
        Ok(())
    })
}
