//! The pod's network: its address is the guest's own.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, Result};
use pericarp_tests::{Container, Node, Pod, Runtime, on_node};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// No connection on a node takes longer.
const LIMIT: Duration = Duration::from_secs(20);

/// The node's address on the CNI bridge.
const GATEWAY: &str = "10.88.0.1";

/// A pod with a container that answers on port 8080 with its pod's name.
async fn server(node: &Node, name: &str) -> Result<(Pod, Container, IpAddr)> {
    let pod = node.pod(name).run().await?;
    let script = format!("echo ready; exec nc -lk -p 8080 -e echo {name}");
    let container = pod.container("server").script(&script).start().await?;
    while container.log()?.stdout() != "ready\n" {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let network = pod.status().await?.and_then(|status| status.network).context("the pod's network")?;
    let address = network.ip.parse().context("the pod's address")?;
    Ok((pod, container, address))
}

async fn answer_of(address: IpAddr) -> Result<String> {
    let mut text = String::new();
    timeout(LIMIT, async {
        let mut stream = loop {
            // The server may not listen quite yet.
            match TcpStream::connect((address, 8080)).await {
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                connected => break connected?,
            }
        };
        stream.read_to_string(&mut text).await
    })
    .await??;
    Ok(text.trim().to_owned())
}

#[test]
fn the_pods_address_is_the_guests() -> Result<()> {
    on_node(async |node| {
        let (pod, container, address) = server(node, "server").await?;
        let shown = container.shell("ip -4 -o address show dev eth0; ip link show dev eth0").await?;
        assert!(shown.contains(&format!("inet {address}/16")), "{shown}");
        assert!(shown.contains("mtu 1500"), "{shown}");
        let routes = container.shell("ip route").await?;
        assert!(routes.contains(&format!("default via {GATEWAY} dev eth0")), "{routes}");
        let hosts = container.shell("cat /etc/hosts").await?;
        assert!(hosts.contains(&address.to_string()), "{hosts}");

        // From the node into the pod, as kubelet's probes come, and out of it to the node.
        assert_eq!(answer_of(address).await?, "server");
        let listener = TcpListener::bind((GATEWAY, 0)).await?;
        let port = listener.local_addr()?.port();
        let greeter = async {
            let (mut stream, from) = timeout(LIMIT, listener.accept()).await??;
            stream.write_all(b"node\n").await?;
            anyhow::Ok(from.ip())
        };
        let script = format!("nc {GATEWAY} {port} < /dev/null");
        let (from, said) = futures::try_join!(greeter, container.shell(&script))?;
        assert_eq!((from, said.as_str()), (address, "node"));

        pod.stop().await?;
        pod.remove().await
    })
}

#[test]
fn pods_reach_each_other_whatever_runs_them() -> Result<()> {
    on_node(async |node| {
        let other = node.with_runtime(Runtime::Runc);
        let ((_, one, first), (_, two, second), (_, three, third)) =
            futures::try_join!(server(node, "one"), server(node, "two"), server(&other, "three"))?;
        for (container, peers) in [
            (&one, [(second, "two"), (third, "three")]),
            (&two, [(first, "one"), (third, "three")]),
            (&three, [(first, "one"), (second, "two")]),
        ] {
            for (address, name) in peers {
                assert_eq!(container.shell(&format!("nc {address} 8080 < /dev/null")).await?, name);
            }
        }
        Ok(())
    })
}

#[test]
fn a_megabyte_crosses_in_both_directions_unchanged() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("echo").run().await?;
        let container = pod.container("server").script("exec nc -lk -p 8080 -e cat").start().await?;
        let network = pod.status().await?.and_then(|status| status.network).context("the pod's network")?;
        let address: IpAddr = network.ip.parse()?;
        let sent: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut stream = timeout(LIMIT, async {
            loop {
                match TcpStream::connect((address, 8080)).await {
                    Ok(stream) => break stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        })
        .await?;
        let (mut reader, mut writer) = stream.split();
        let mut received = Vec::new();
        let write = async {
            writer.write_all(&sent).await?;
            writer.shutdown().await
        };
        timeout(Duration::from_secs(60), async {
            futures::try_join!(write, reader.read_to_end(&mut received))
        })
        .await??;
        assert_eq!(received.len(), sent.len());
        assert!(received == sent, "the bytes differ");
        container.stop(0).await
    })
}
