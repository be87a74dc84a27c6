//! The CNI plugins that may make a pod's network: see `tests/node/containerd-config`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result};
use pericarp_tests::{Network, Runtime, api, on_node, on_pericarp};

use super::{Server, ask, ask_by_datagram, on_the_node, pod_connects_to_node};

#[test]
fn a_dual_stack_pod_is_reached_by_both_families() -> Result<()> {
    on_node(async |node| {
        let node = node.with_network(Network::Dual);
        let other = node.with_runtime(Runtime::Runc);
        let (server, other) = futures::try_join!(Server::new(&node, "server"), Server::new(&other, "other"))?;
        let [four, six] = server.addresses[..] else { panic!("two addresses: {:?}", server.addresses) };
        let shown = server.container.shell("ip address show dev eth0; cat /etc/hosts").await?;
        for part in ["mtu 1400", &format!("inet {four}/16"), &format!("inet6 {six}/64")] {
            assert!(shown.contains(part), "no {part} in {shown}");
        }
        for (gateway, address) in [("10.89.0.1", server.address()?), ("fd00:89::1", server.six()?)] {
            assert_eq!(ask(address, "name").await?, "server");
            assert_eq!(ask_by_datagram(address, "hello").await?, "server hello");
            assert_eq!(pod_connects_to_node(&server, gateway.parse()?).await?, address.ip());
            assert_eq!(other.asks("tcp", address, "name").await?, "server");
            let hosts = format!("{}\tserver", address.ip());
            assert!(node.runtime == Runtime::Runc || shown.contains(&hosts), "no {hosts:?} in {shown}");
        }
        assert_eq!(server.asks("tcp", other.six()?, "name").await?, "other");
        Ok(())
    })
}

#[test]
fn a_pod_may_have_ipv6_only() -> Result<()> {
    on_node(async |node| {
        let server = Server::new(&node.with_network(Network::Six), "server").await?;
        let address = server.six()?;
        assert_eq!(server.addresses, [address.ip()]);
        assert_eq!(ask(address, "name").await?, "server");
        assert_eq!(pod_connects_to_node(&server, "fd00:90::1".parse()?).await?, address.ip());
        let shown = server.container.shell("ip -o -4 address show dev eth0; ip -6 route").await?;
        assert!(shown.contains("default via fd00:90::1 dev eth0") && !shown.contains("inet "), "{shown}");
        Ok(())
    })
}

#[test]
fn a_fixed_address_mac_mtu_and_further_route_are_the_guests() -> Result<()> {
    on_node(async |node| {
        let server = Server::new(&node.with_network(Network::Static), "server").await?;
        assert_eq!(server.addresses, ["10.91.0.9".parse::<IpAddr>()?]);
        let shown = server.container.shell("ip address show dev eth0; ip route").await?;
        for part in ["mtu 9000", "link/ether 02:00:00:00:91:09", "192.0.2.0/24 via 10.91.0.7 dev eth0"] {
            assert!(shown.contains(part), "no {part} in {shown}");
        }
        assert_eq!(ask(server.address()?, "name").await?, "server");
        let text = "0123456789".repeat(880);
        assert_eq!(ask_by_datagram(server.address()?, &text).await?, format!("server {text}"));
        Ok(())
    })
}

#[test]
fn a_ptp_pods_bandwidth_is_limited_on_the_node() -> Result<()> {
    on_node(async |node| {
        let limited = node.with_network(Network::Ptp).pod("server").with(|config| {
            for direction in ["ingress", "egress"] {
                let annotation = format!("kubernetes.io/{direction}-bandwidth");
                config.annotations.insert(annotation, "800M".to_owned());
            }
        });
        let server = Server::of(limited).await?;
        for address in [server.address()?, server.six()?] {
            assert_eq!(ask(address, "name").await?, "server");
        }
        // Each direction has a token bucket that all of the pod's traffic goes through.
        let counted = async || -> Result<Vec<u64>> {
            let qdiscs: serde_json::Value = serde_json::from_str(&on_the_node("tc -s -j qdisc show").await?)?;
            let qdiscs = qdiscs.as_array().context("a list of qdiscs")?;
            let limits = qdiscs
                .iter()
                .filter(|qdisc| qdisc["kind"] == "tbf" && qdisc["options"]["rate"] == 100_000_000);
            Ok(limits.filter_map(|limit| limit["bytes"].as_u64()).collect())
        };
        let before = counted().await?;
        let answer = ask(server.address()?, "source 1000000").await?;
        assert_eq!(answer.len(), 1_000_000);
        let after = counted().await?;
        assert_eq!((before.len(), after.len()), (2, 2), "{before:?} {after:?}");
        assert!(after.iter().zip(&before).all(|(after, before)| after > before), "{before:?} {after:?}");
        assert!(after.iter().sum::<u64>() - before.iter().sum::<u64>() > 1_000_000, "{before:?} {after:?}");
        Ok(())
    })
}

#[test]
fn a_pod_has_all_interfaces_that_it_was_given() -> Result<()> {
    on_node(async |node| {
        let node = node.with_network(Network::Two);
        let other = node.with_runtime(Runtime::Runc);
        let (server, other) = futures::try_join!(Server::new(&node, "server"), Server::new(&other, "other"))?;
        assert_eq!(ask(server.address()?, "name").await?, "server");
        // Pods on the second network reach each other over it.
        let address = async |server: &Server| {
            let shown = server.container.shell("ip -4 -o address show dev eth1").await?;
            let address = shown.split_whitespace().find_map(|word| word.strip_suffix("/24"));
            let ip: IpAddr = address.with_context(|| format!("no address in {shown:?}"))?.parse()?;
            anyhow::Ok(SocketAddr::new(ip, super::PORT))
        };
        assert_eq!(other.asks("tcp", address(&server).await?, "name").await?, "server");
        assert_eq!(server.asks("tcp", address(&other).await?, "name").await?, "other");
        Ok(())
    })
}

#[test]
fn macvlan_pods_reach_each_other() -> Result<()> {
    reach_each_other_over(Network::Macvlan)
}

#[test]
fn ipvlan_pods_reach_each_other() -> Result<()> {
    reach_each_other_over(Network::Ipvlan)
}

/// Tests that pods reach each other over a network. The node itself cannot reach pods over these kinds of links.
fn reach_each_other_over(network: Network) -> Result<()> {
    on_node(async |node| {
        let node = node.with_network(network);
        let other = node.with_runtime(Runtime::Runc);
        let (one, two, three) = futures::try_join!(
            Server::new(&node, "one"),
            Server::new(&node, "two"),
            Server::new(&other, "three")
        )?;
        for (asking, asked, name) in
            [(&one, &two, "two"), (&two, &one, "one"), (&one, &three, "three"), (&three, &one, "one")]
        {
            assert_eq!(asking.asks("tcp", asked.address()?, "name").await?, name);
            assert_eq!(asking.asks("udp", asked.address()?, "hello").await?, format!("{name} hello"));
        }
        Ok(())
    })
}

#[test]
fn a_link_that_no_machine_can_be_given_is_refused_by_its_type() -> Result<()> {
    on_pericarp(async |node| {
        for (network, kind) in [(Network::Tap, "tun"), (Network::Dummy, "dummy")] {
            let refused = node.with_network(network).pod(kind).try_run().await?.map(drop).unwrap_err();
            let text = refused.message();
            assert!(text.contains(&format!("link type {kind}")), "{text}");
            assert!(text.contains("eth0") && text.contains("bridge, ptp"), "{text}");
        }
        Ok(())
    })
}

#[test]
fn host_ports_lead_to_the_pod() -> Result<()> {
    on_node(async |node| {
        let mapping = |protocol: api::Protocol, host_port| api::PortMapping {
            protocol: protocol.into(),
            container_port: super::PORT.into(),
            host_port,
            ..Default::default()
        };
        // Ports of this test alone, whatever runs beside it.
        let (tcp, udp) = (20_080, 20_081);
        let pod = node.with_network(Network::Dual).pod("server").with(|config| {
            config.port_mappings = vec![mapping(api::Protocol::Tcp, tcp), mapping(api::Protocol::Udp, udp)];
        });
        let server = Server::of(pod).await?;
        for ip in ["127.0.0.1", "10.89.0.1", "fd00:89::1"] {
            let ip: IpAddr = ip.parse()?;
            let at = |port: i32| anyhow::Ok(SocketAddr::new(ip, u16::try_from(port)?));
            assert_eq!(ask(at(tcp)?, "name").await?, "server", "over {ip}");
            if !ip.is_loopback() {
                assert_eq!(ask_by_datagram(at(udp)?, "hello").await?, "server hello", "over {ip}");
            }
        }
        server.pod.stop().await?;
        let gone = ask(SocketAddr::new("10.89.0.1".parse()?, u16::try_from(tcp)?), "name").await;
        assert!(gone.is_err(), "{gone:?}");
        Ok(())
    })
}
