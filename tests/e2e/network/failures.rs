//! Networks that break, and pods that survive it.

use std::fs;

use anyhow::{Context, Result, ensure};
use pericarp_tests::{
    Pod,
    direct::{
        controller::{Controller, pod_config},
        netns::NetworkNamespace,
    },
    on_pericarp, wait_until,
};

use super::{Server, ask, on_the_node};

/// Commands that make an interface that a machine can be given.
const VETH: &str = "ip link add eth0 type veth peer name peer0; ip link set eth0 up";

/// The links and qdiscs of a network namespace that are Pericarp's.
async fn left_by_pericarp(netns: &str) -> Result<String> {
    let links = format!("nsenter --net={netns} sh -c 'ip -o link; tc qdisc show'");
    let shown = on_the_node(&links).await?;
    Ok(shown
        .lines()
        .filter(|line| line.contains("pericarp") || line.contains("ingress"))
        .collect::<Vec<_>>()
        .join("\n"))
}

async fn netns_of(pod: &Pod) -> Result<String> {
    let info = pod.info().await?;
    Ok(info["pericarp"]["netns"].as_str().with_context(|| format!("no netns in {info:#}"))?.to_owned())
}

#[test]
fn a_pod_without_any_interface_starts() -> Result<()> {
    on_pericarp(async |node| {
        let mut controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let config = pod_config("alone");
        let started = controller.start_pod("alone", &config, &netns).await?;
        assert!(started.pid > 0, "{started:?}");
        assert_eq!(left_by_pericarp(&netns.path()).await?, "");
        controller.shut_down_pod("alone").await?;
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_network_that_is_half_made_is_undone() -> Result<()> {
    on_pericarp(async |node| {
        let mut controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        // The machine can be given the first interface but not the second.
        netns.run(&format!("{VETH}; ip link add eth1 type dummy; ip link set eth1 up")).await?;
        let config = pod_config("half");
        let refused = controller.start_pod("half", &config, &netns).await.unwrap_err();
        assert!(refused.message().contains("link type dummy"), "{}", refused.message());
        assert_eq!(left_by_pericarp(&netns.path()).await?, "");
        assert_eq!(controller.pod_directories()?, Vec::<String>::new());

        // An ingress qdisc that is somebody else's stays, and is said to be in the way.
        netns.run("ip link del eth1; tc qdisc add dev eth0 ingress").await?;
        let refused = controller.start_pod("taken", &config, &netns).await.unwrap_err();
        assert!(refused.message().contains("eth0 has an ingress"), "{}", refused.message());
        assert!(left_by_pericarp(&netns.path()).await?.contains("ingress"));
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_netns_that_is_gone_is_a_clear_error() -> Result<()> {
    on_pericarp(async |node| {
        let mut controller = Controller::serve("").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        let config = pod_config("gone");
        on_the_node(&format!("ip netns delete {}", node.name())).await?;
        let refused = controller.start_pod("gone", &config, &netns).await.unwrap_err();
        let text = refused.message();
        assert!(text.contains(&netns.path()) && text.contains("CNI"), "{text}");
        assert_eq!(controller.pod_directories()?, Vec::<String>::new());
        controller.stop().await
    })
}

#[test]
fn a_host_without_taps_is_a_clear_error() -> Result<()> {
    on_pericarp(async |node| {
        let mut controller = Controller::serve_where("mount --bind /dev/null /dev/net/tun", "").await?;
        let netns = NetworkNamespace::new(node.name()).await?;
        netns.run(VETH).await?;
        let config = pod_config("no-tun");
        let refused = controller.start_pod("no-tun", &config, &netns).await.unwrap_err();
        assert!(refused.message().contains("tap"), "{}", refused.message());
        assert_eq!(left_by_pericarp(&netns.path()).await?, "");
        assert_eq!(controller.pod_directories()?, Vec::<String>::new());
        netns.remove().await?;
        controller.stop().await
    })
}

#[test]
fn a_pod_lives_on_when_its_interface_is_removed() -> Result<()> {
    on_pericarp(async |node| {
        let server = Server::new(node, "server").await?;
        assert_eq!(ask(server.address()?, "name").await?, "server");
        let netns = netns_of(&server.pod).await?;
        on_the_node(&format!("nsenter --net={netns} ip link delete eth0")).await?;
        // The controller hears of it a moment later.
        wait_until("the interface to be told as removed", async || {
            Ok(server.pod.info().await?["pericarp"]["interfaces"][0]["removed"] == true)
        })
        .await?;
        assert!(server.pod.is_ready().await?);
        assert_eq!(server.container.shell("hostname").await?, "server");
        server.pod.stop().await?;
        server.pod.remove().await
    })
}

#[test]
fn a_pod_lives_on_when_its_tap_is_removed() -> Result<()> {
    on_pericarp(async |node| {
        let server = Server::new(node, "server").await?;
        let netns = netns_of(&server.pod).await?;
        on_the_node(&format!("nsenter --net={netns} ip link delete pericarp0")).await?;
        assert!(server.pod.is_ready().await?);
        assert_eq!(server.container.shell("hostname").await?, "server");
        let log = format!("/run/pericarp/{}/vmm.log", server.pod.id);
        wait_until("the machine to notice", async || {
            let log = fs::read_to_string(&log)?;
            ensure!(log.contains("the tap is gone"), "{log}");
            Ok(true)
        })
        .await?;
        server.pod.stop().await?;
        server.pod.remove().await
    })
}

#[test]
fn a_pod_ends_well_when_its_netns_has_gone_before_it() -> Result<()> {
    on_pericarp(async |node| {
        let server = Server::new(node, "server").await?;
        let netns = netns_of(&server.pod).await?;
        // As a node's clean-up by hand would: the name is gone, the namespace lives for as long as the machine.
        on_the_node(&format!("umount {netns} && rm {netns}")).await?;
        assert_eq!(server.container.shell("hostname").await?, "server");
        server.pod.stop().await?;
        server.pod.remove().await
    })
}
