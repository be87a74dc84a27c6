//! With real network namespaces: these tests need root, veth, tun and traffic control.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{IpAddr, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::{Duration, Instant},
};

use rtnetlink::{
    LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute},
        tc::{TcAttribute, TcMessage},
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use tempfile::TempDir;
use tokio_stream::StreamExt as _;

use super::*;

/// `struct virtio_net_hdr`, which precedes every frame of a tap.
const HEADER: usize = 10;
const POD_MAC: [u8; 6] = [2, 0x42, 10, 9, 0, 2];
const POD_IP: [u8; 4] = [10, 9, 0, 2];
const PEER_IP: [u8; 4] = [10, 9, 0, 1];

/// A network namespace, mounted as CNI has them.
pub(super) struct Netns {
    directory: TempDir,
}

impl Netns {
    pub fn new() -> Netns {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("netns");
        File::create(&path).unwrap();
        thread::spawn(move || {
            // SAFETY: only this thread changes its namespace, and it ends here.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("network namespaces need root");
            mount_bind("/proc/thread-self/ns/net", &path).unwrap();
        })
        .join()
        .unwrap();
        let netns = Netns { directory };
        netns.with(async |handle| up(handle, "lo").await);
        netns
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("netns")
    }

    pub fn with<T: Send>(&self, work: impl AsyncFnOnce(&Handle) -> T + Send) -> T {
        inside(&self.path(), async |handle| Ok(work(&handle).await)).unwrap()
    }

    fn unmount(&self) {
        let _ = unmount(self.path(), UnmountFlags::DETACH);
    }

    /// Links and qdiscs.
    fn inventory(&self) -> Vec<String> {
        self.with(async |handle| {
            let mut inventory: Vec<String> = survey::links(handle)
                .await
                .unwrap()
                .iter()
                .map(|link| format!("link {} {} {:?}", link.index, link.name, link.kind))
                .collect();
            let qdiscs: Vec<TcMessage> =
                handle.qdisc().get().execute().collect::<Result<_, _>>().await.unwrap();
            for qdisc in qdiscs {
                let kind = qdisc.attributes.iter().find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
                inventory.push(format!("qdisc {} {:?} {kind:?}", qdisc.header.index, qdisc.header.parent));
            }
            inventory
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.unmount();
    }
}

async fn index(handle: &Handle, name: &str) -> u32 {
    let links = survey::links(handle).await.unwrap();
    links.iter().find(|link| link.name == name).unwrap().index
}

async fn up(handle: &Handle, name: &str) {
    let link = LinkUnspec::new_with_index(index(handle, name).await).up().build();
    handle.link().set(link).execute().await.unwrap();
}

pub(super) async fn add_address(handle: &Handle, link: &str, ip: &str, prefix_length: u8) {
    let index = index(handle, link).await;
    let ip: IpAddr = ip.parse().unwrap();
    handle.address().add(index, ip, prefix_length).execute().await.unwrap();
}

/// A pod's namespace with an `eth0` whose other end, `peer`, is in a second one.
fn pod_with_veth(mtu: u32) -> (Netns, Netns) {
    let (pod, outside) = (Netns::new(), Netns::new());
    add_veth(&pod, &outside, "eth0", "peer", POD_MAC, mtu);
    pod.with(async |handle| add_address(handle, "eth0", "10.9.0.2", 24).await);
    outside.with(async |handle| add_address(handle, "peer", "10.9.0.1", 24).await);
    (pod, outside)
}

fn add_veth(pod: &Netns, outside: &Netns, name: &str, peer: &str, mac: [u8; 6], mtu: u32) {
    let there = File::open(outside.path()).unwrap();
    pod.with(async |handle| {
        handle
            .link()
            .add(LinkVeth::new(name, peer).address(mac.into()).mtu(mtu).build())
            .execute()
            .await
            .expect("these tests need the module veth");
        let away = LinkUnspec::new_with_index(index(handle, peer).await).setns_by_fd(there.as_raw_fd());
        handle.link().set(away.build()).execute().await.unwrap();
        up(handle, name).await;
    });
    outside.with(async |handle| up(handle, peer).await);
}

async fn set_up_with(pod: &Netns, vcpus: u8) -> PodNetwork {
    set_up(&pod.path(), vcpus)
        .await
        .expect("these tests need the modules tun, sch_ingress, cls_u32 and act_mirred")
}

/// The next frame of a tap that `wanted` takes.
fn receive(tap: &mut File, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut buffer = vec![0; 65536];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        let ready = poll(&mut [PollFd::new(&tap.as_fd(), PollFlags::IN)], Some(&timeout)).unwrap();
        assert!(ready > 0, "no such frame came");
        let length = tap.read(&mut buffer).unwrap();
        let frame = &buffer[HEADER..length];
        if wanted(frame) {
            return frame.to_vec();
        }
    }
}

fn is_arp(frame: &[u8], operation: u8) -> bool {
    frame.len() >= 42 && frame[12..14] == [8, 6] && frame[21] == operation
}

#[tokio::test]
async fn a_veth_with_both_families_is_surveyed() {
    let (pod, _outside) = pod_with_veth(1400);
    pod.with(async |handle| {
        add_address(handle, "eth0", "fd00::2", 64).await;
        let index = index(handle, "eth0").await;
        let gateways = [
            RouteMessageBuilder::<IpAddr>::new()
                .destination_prefix("0.0.0.0".parse().unwrap(), 0)
                .unwrap()
                .gateway("10.9.0.1".parse().unwrap())
                .unwrap(),
            RouteMessageBuilder::<IpAddr>::new()
                .destination_prefix("fd01::".parse().unwrap(), 48)
                .unwrap()
                .gateway("fd00::1".parse().unwrap())
                .unwrap(),
        ];
        for route in gateways {
            handle.route().add(route.output_interface(index).build()).execute().await.unwrap();
        }
        let neighbour = handle.neighbours().add(index, "10.9.0.1".parse().unwrap());
        neighbour.link_layer_address(&[2, 0, 0, 0, 0, 1]).execute().await.unwrap();
    });

    let network = set_up_with(&pod, 1).await;
    let expected =
        NetConfig { netns: pod.path(), tap: "pericarp0".into(), mac: POD_MAC, mtu: 1400, queue_pairs: 1 };
    assert_eq!(network.nets, [expected]);
    assert_eq!(
        network.status(),
        [InterfaceStatus {
            name: "eth0".into(),
            mac: "02:42:0a:09:00:02".into(),
            mtu: 1400,
            removed: false,
            addresses: vec!["10.9.0.2/24".into(), "fd00::2/64".into()],
        }]
    );
    let routes: Vec<_> = network
        .routes
        .iter()
        .map(|route| {
            let gateway = ip_text(&route.gateway);
            format!(
                "{} {}/{} via {gateway}",
                route.interface,
                ip_text(&route.destination),
                route.prefix_length
            )
        })
        .collect();
    assert_eq!(routes, ["eth0 0.0.0.0/0 via 10.9.0.1", "eth0 fd01::/48 via fd00::1"]);
    let neighbours: Vec<_> = network.neighbours.iter().map(|n| (n.ip.clone(), n.mac.clone())).collect();
    assert_eq!(neighbours, [(PEER_IP.to_vec(), vec![2, 0, 0, 0, 0, 1])]);
}

#[tokio::test]
async fn each_of_several_interfaces_gets_a_tap() {
    let (pod, outside) = pod_with_veth(1500);
    add_veth(&pod, &outside, "net1", "peer1", [2, 0, 0, 0, 0, 9], 9000);
    let network = set_up_with(&pod, 1).await;
    let taps: Vec<_> = network.nets.iter().map(|net| (net.tap.as_str(), net.mtu)).collect();
    assert_eq!(taps.len(), 2);
    assert!(taps.contains(&("pericarp0", 1500)) || taps.contains(&("pericarp1", 1500)), "{taps:?}");
    assert!(taps.contains(&("pericarp0", 9000)) || taps.contains(&("pericarp1", 9000)), "{taps:?}");
}

#[tokio::test]
async fn a_pod_without_interfaces_has_an_empty_network() {
    let pod = Netns::new();
    let before = pod.inventory();
    for netns in [pod.path(), PathBuf::new()] {
        let network = set_up(&netns, 1).await.unwrap();
        assert!(network.nets.is_empty() && network.interfaces.is_empty() && network.routes.is_empty());
        remove(&netns).unwrap();
    }
    assert_eq!(pod.inventory(), before);
}

async fn frames_cross(pod: &Netns, outside: &Netns, vcpus: u8) {
    let network = set_up_with(pod, vcpus).await;
    let name = network.nets[0].tap.clone();
    let flags = if vcpus > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut tap = pod.with(async |_| tap::attach(&name, flags).unwrap());

    // To the guest: who looks for the pod's address asks the guest, and nobody else answers.
    outside.with(async |_| {
        UdpSocket::bind("10.9.0.1:0").unwrap().send_to(b"x", "10.9.0.2:9").unwrap();
    });
    let question = receive(&mut tap, |frame| is_arp(frame, 1) && frame[38..42] == POD_IP);

    // And back: the guest's question for its neighbour is answered by that one.
    let peer_mac = &question[6..12];
    let mut frame = vec![0; HEADER];
    frame.extend([0xff; 6]);
    frame.extend(POD_MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(POD_MAC);
    frame.extend(POD_IP);
    frame.extend([0; 6]);
    frame.extend(PEER_IP);
    tap.write_all(&frame).unwrap();
    let answer = receive(&mut tap, |frame| is_arp(frame, 2));
    assert_eq!((&answer[0..6], &answer[6..12]), (&POD_MAC[..], peer_mac));

    // From that the peer has learned who has the pod's address, so that its packet follows.
    outside.with(async |_| {
        UdpSocket::bind("10.9.0.1:0").unwrap().send_to(b"hello", "10.9.0.2:9").unwrap();
    });
    receive(&mut tap, |frame| frame[..6] == POD_MAC && frame.ends_with(b"hello"));
}

#[tokio::test]
async fn undo_leaves_the_netns_as_it_was() {
    let (pod, _outside) = pod_with_veth(1500);
    let before = pod.inventory();
    set_up_with(&pod, 1).await;
    assert_ne!(pod.inventory(), before);
    remove(&pod.path()).unwrap();
    assert_eq!(pod.inventory(), before);
}

#[tokio::test]
async fn a_set_up_that_fails_midway_is_undone() {
    let (pod, outside) = pod_with_veth(1500);
    add_veth(&pod, &outside, "net1", "peer1", [2, 0, 0, 0, 0, 9], 1500);
    let before = pod.inventory();
    let error = pod.with(async |handle| {
        let eth0 = index(handle, "eth0").await;
        let tap = tap::make(handle, "pericarp0", 1500, 1).await.unwrap();
        let tap = End { index: tap, name: "pericarp0" };
        redirect::redirect(handle, End { index: eth0, name: "eth0" }, tap).await.unwrap();
        let net1 = index(handle, "net1").await;
        handle.link().del(net1).execute().await.unwrap();
        redirect::redirect(handle, End { index: net1, name: "net1" }, tap).await.unwrap_err()
    });
    assert!(matches!(&error, NetworkError::Removed { interface } if interface == "net1"), "{error:?}");
    remove(&pod.path()).unwrap();
    let left: Vec<_> = before.into_iter().filter(|line| pod.inventory().contains(line)).collect();
    assert_eq!(pod.inventory(), left);
}

#[tokio::test]
async fn setting_up_twice_or_removing_twice_is_harmless() {
    let (pod, _outside) = pod_with_veth(1500);
    let before = pod.inventory();
    let first = set_up_with(&pod, 1).await;
    let second = set_up_with(&pod, 1).await;
    assert_eq!(first.nets, second.nets);
    remove(&pod.path()).unwrap();
    remove(&pod.path()).unwrap();
    remove(&pod.path()).unwrap();
    assert_eq!(pod.inventory(), before);
}

#[tokio::test]
async fn an_interface_removed_under_a_running_pod_does_not_hinder_its_end() {
    let (pod, _outside) = pod_with_veth(1500);
    set_up_with(&pod, 1).await;
    pod.with(async |handle| {
        let eth0 = index(handle, "eth0").await;
        handle.link().del(eth0).execute().await.unwrap();
    });
    remove(&pod.path()).unwrap();
    assert!(!pod.inventory().iter().any(|line| line.contains("pericarp") || line.contains("eth0")));
}

#[tokio::test]
async fn a_netns_that_is_gone_is_named() {
    let pod = Netns::new();
    pod.unmount();
    // Unmounted, it is a plain file; then not even that.
    for _ in 0..2 {
        let error = set_up(&pod.path(), 1).await.unwrap_err();
        assert!(matches!(error, NetworkError::Missing { .. }), "{error:?}");
        assert!(error.to_string().contains(pod.path().to_str().unwrap()), "{error}");
        remove(&pod.path()).unwrap();
        let _ = std::fs::remove_file(pod.path());
    }
}

#[tokio::test]
async fn a_netns_that_went_after_the_set_up_does_not_hinder_the_pods_end() {
    let (pod, _outside) = pod_with_veth(1500);
    set_up_with(&pod, 1).await;
    pod.unmount();
    remove(&pod.path()).unwrap();
}

#[tokio::test]
async fn the_controllers_own_namespace_is_never_touched() {
    let own = Path::new("/proc/self/ns/net");
    let error = set_up(own, 1).await.unwrap_err();
    assert!(matches!(error, NetworkError::Own { .. }), "{error:?}");
    remove(own).unwrap();
}

#[tokio::test]
async fn an_ingress_qdisc_of_somebody_else_is_left_alone() {
    let (pod, _outside) = pod_with_veth(1500);
    pod.with(async |handle| {
        let eth0 = index(handle, "eth0").await.cast_signed();
        handle.qdisc().add(eth0).ingress().execute().await.unwrap();
    });
    let before = pod.inventory();
    let error = set_up(&pod.path(), 1).await.unwrap_err();
    assert!(matches!(error, NetworkError::IngressTaken { .. }), "{error:?}");
    remove(&pod.path()).unwrap();
    assert_eq!(pod.inventory(), before);
}

#[tokio::test]
async fn a_tap_makes_itself_no_ipv6_address() {
    let (pod, _outside) = pod_with_veth(1500);
    let name = set_up_with(&pod, 1).await.nets[0].tap.clone();
    let links = pod.with(async |handle| {
        let links = handle.link().get().match_name(name).execute();
        links.collect::<Result<Vec<_>, _>>().await.unwrap()
    });
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let is_none = |spec: &AfSpecUnspec| matches!(spec, AfSpecUnspec::Inet6(all) if all.contains(&none));
    let found = links[0].attributes.iter().any(
        |attribute| matches!(attribute, LinkAttribute::AfSpecUnspec(specs) if specs.iter().any(is_none)),
    );
    assert!(found, "{links:?}");
}

#[tokio::test]
async fn a_tap_has_a_queue_for_each_vcpu_up_to_a_limit() {
    for (vcpus, expected) in [(0, 1), (1, 1), (2, 2), (255, NetConfig::QUEUE_PAIRS_MAX)] {
        let (pod, _outside) = pod_with_veth(1500);
        let network = set_up_with(&pod, vcpus).await;
        assert_eq!(network.nets[0].queue_pairs, expected);
        let name = &network.nets[0].tap;
        pod.with(async |_| {
            let (right, wrong) =
                if expected > 1 { (libc::IFF_MULTI_QUEUE, 0) } else { (0, libc::IFF_MULTI_QUEUE) };
            assert!(tap::attach(name, wrong).is_err());
            let attached: Result<Vec<_>, _> = (0..expected).map(|_| tap::attach(name, right)).collect();
            assert!(attached.is_ok(), "{attached:?}");
        });
    }
}

#[tokio::test]
async fn frames_cross_a_tap_which_has_no_qdisc_but_ours_however_many_queues_it_has() {
    for vcpus in [1, 2] {
        let (pod, outside) = pod_with_veth(1500);
        let before = pod.inventory();
        let network = set_up_with(&pod, vcpus).await;
        let index = pod.with(async |handle| index(handle, &network.nets[0].tap).await);
        let qdiscs: Vec<_> =
            pod.inventory().into_iter().filter(|line| line.starts_with(&format!("qdisc {index} "))).collect();
        assert_eq!(qdiscs.len(), 2, "{qdiscs:?}");
        assert!(qdiscs.iter().any(|line| line.contains("noqueue")), "{qdiscs:?}");
        assert!(qdiscs.iter().any(|line| line.contains("ingress")), "{qdiscs:?}");
        remove(&pod.path()).unwrap();
        assert_eq!(pod.inventory(), before);
        frames_cross(&pod, &outside, vcpus).await;
    }
}

#[tokio::test]
async fn a_link_that_is_removed_is_told_by_its_name() {
    let (pod, outside) = pod_with_veth(1500);
    add_veth(&pod, &outside, "net1", "peer1", [2, 0, 0, 0, 0, 9], 1500);
    let mut watch = Watch::new(&pod.path()).await.unwrap();
    // Changes that are no removal are not told.
    pod.with(async |handle| {
        let eth0 = index(handle, "eth0").await;
        handle.link().set(LinkUnspec::new_with_index(eth0).mtu(1400).build()).execute().await.unwrap();
        let net1 = index(handle, "net1").await;
        handle.link().del(net1).execute().await.unwrap();
    });
    assert_eq!(watch.removed().await.unwrap(), ["net1"]);
}

#[test]
fn taps_get_short_names_that_nobody_has() {
    let taken = ["pericarp1", "eth0"].map(String::from).into();
    let names: Vec<_> = tap::names(&taken).take(2).collect();
    assert_eq!(names, ["pericarp0", "pericarp2"]);
    assert!(tap::names(&taken).all(|name| name.len() <= 15));
}
