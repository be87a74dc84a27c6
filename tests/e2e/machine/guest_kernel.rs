//! The features of the guest's kernel (docs/guest-kernel.md), tried with the node's own tools in a privileged
//! container.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Result, ensure};
use pericarp_tests::{BUSYBOX, Container, Node, on_pericarp};

/// The expected result of a row's commands.
enum Answer {
    /// The commands succeed.
    Works,
    /// The commands fail.
    Fails,
    /// The commands succeed and print this.
    Prints(&'static str),
}
use Answer::{Fails, Prints, Works};

/// Each feature with the commands that try it and their expected result. `ip` and the like are the node's own, from its
/// `/usr`.
const CHECKS: [(&str, &str, Answer); 38] = [
    ("NAT with iptables", "iptables -t nat -A POSTROUTING -o lo -j MASQUERADE", Works),
    (
        "a mesh's redirection",
        "iptables -t nat -A OUTPUT -p tcp -m owner ! --uid-owner 1337 -j REDIRECT --to-ports 15001",
        Works,
    ),
    (
        "marks of connections",
        "iptables -t mangle -A OUTPUT -m conntrack --ctstate NEW -j CONNMARK --set-mark 7",
        Works,
    ),
    (
        "transparent proxies",
        "iptables -t mangle -A PREROUTING -p tcp -m socket -j MARK --set-mark 1 && \
        iptables -t mangle -A PREROUTING -p tcp -j TPROXY --on-port 15006 --tproxy-mark 1",
        Works,
    ),
    (
        "several ports",
        "iptables -A INPUT -p tcp -m multiport --dports 80,443 -m comment --comment web -j ACCEPT",
        Works,
    ),
    ("kinds of addresses", "iptables -A INPUT -m addrtype --dst-type LOCAL -j ACCEPT", Works),
    (
        "limits",
        "iptables -A INPUT -m limit --limit 5/s -j ACCEPT && \
        iptables -A INPUT -p udp -m hashlimit --hashlimit-name h --hashlimit-above 5/s -j DROP",
        Works,
    ),
    ("shares of traffic", "iptables -A INPUT -m statistic --mode random --probability 0.5 -j ACCEPT", Works),
    ("recent addresses", "iptables -A INPUT -m recent --name r --set", Works),
    ("refusals", "iptables -A INPUT -p tcp --dport 9 -j REJECT --reject-with tcp-reset", Works),
    ("rules for IPv6", "ip6tables -t nat -A POSTROUTING -o lo -j MASQUERADE", Works),
    (
        "sets of addresses",
        "ipset create s hash:ip && ipset add s 192.0.2.1 && \
        iptables -A INPUT -m set --match-set s src -j DROP",
        Works,
    ),
    ("sets of networks and ports", "ipset create n hash:net,port && ipset create l list:set", Works),
    (
        "tables of nftables",
        "nft 'table inet t { set a { type ipv4_addr; flags interval; }; chain c { type filter hook input priority 0; \
        ct state established accept; ip saddr @a drop; limit rate 5/second accept; fib daddr type local accept; }; }'",
        Works,
    ),
    (
        "rules on a bridge",
        "ip link add br0 type bridge && cat /proc/sys/net/bridge/bridge-nf-call-iptables",
        Prints("1"),
    ),
    ("VXLAN", "ip link add vx0 type vxlan id 7 dstport 4789 dev lo", Works),
    ("WireGuard", "ip link add wg0 type wireguard", Works),
    (
        "veth, macvlan, ipvlan, VLAN",
        "ip link add v0 type veth peer name v1 && ip link add m0 link v0 type macvlan && \
        ip link add i0 link v1 type ipvlan && ip link add link br0 name vlan9 type vlan id 9",
        Works,
    ),
    ("BBR", "sysctl -n -w net.ipv4.tcp_congestion_control=bbr", Prints("bbr")),
    (
        "CUBIC by default",
        "cat /proc/sys/net/ipv4/tcp_available_congestion_control | grep -o cubic",
        Prints("cubic"),
    ),
    (
        "fair queueing",
        "tc qdisc add dev lo root fq && tc qdisc replace dev lo root netem delay 1ms && tc qdisc del dev lo root",
        Works,
    ),
    // ss itself would make do with less, and tell less.
    (
        "sockets are listed with what they do",
        "zcat /proc/config.gz | grep -c -E '^CONFIG_(INET|UNIX)_DIAG=y'",
        Prints("2"),
    ),
    (
        "a file as a disk",
        "truncate -s 8M /disk && mknod -m 600 /dev/loop7 b 7 7; losetup /dev/loop7 /disk && losetup -d /dev/loop7",
        Works,
    ),
    ("XFS", "grep -w xfs /proc/filesystems | tr -d ' \\t'", Prints("xfs")),
    (
        "formats of programs",
        "mount -t binfmt_misc none /mnt && cat /mnt/status && umount /mnt",
        Prints("enabled"),
    ),
    ("pressure", "grep -c avg10 /proc/pressure/memory", Prints("2")),
    ("counters of memory", "grep -c -w pgfault /proc/vmstat", Prints("1")),
    ("its configuration", "zcat /proc/config.gz | grep -w CONFIG_CGROUP_BPF", Prints("CONFIG_CGROUP_BPF=y")),
    ("faults in user space are for the privileged", "cat /proc/sys/vm/unprivileged_userfaultfd", Prints("0")),
    (
        "programs for BPF are for the privileged",
        "cat /proc/sys/kernel/unprivileged_bpf_disabled",
        Prints("2"),
    ),
    (
        "the allocator is hardened",
        "zcat /proc/config.gz | grep -c -E \
        '^CONFIG_(SLAB_FREELIST_RANDOM|SLAB_FREELIST_HARDENED|FORTIFY_SOURCE|VMAP_STACK|JUMP_LABEL|\
        HARDENED_USERCOPY)=y'",
        Prints("6"),
    ),
    (
        "the allocator is not the one for tiny machines",
        "zcat /proc/config.gz | grep CONFIG_SLUB_TINY=y",
        Fails,
    ),
    ("no tunnel is made by itself", "ip link show sit0", Fails),
    ("no machine inside the machine", "ls /dev/kvm || grep -w kvm /proc/misc", Fails),
    // On a file system of the guest's own: none of the host's lets a guest have devices.
    (
        "no memory below the kernel",
        "mknod /dev/memory c 1 1 && head -c 1 /dev/memory 2>&1 | sed 's/.*: //'",
        Prints("No such device or address"),
    ),
    ("no modules", "ls /proc/modules", Fails),
    ("no other tables of segments", "zcat /proc/config.gz | grep CONFIG_MODIFY_LDT_SYSCALL=y", Fails),
    // What core_pattern names would be run by the kernel, as root and outside of every container.
    (
        "the kernel starts no program",
        "echo '|/proc/%P/root/bin/busybox touch /proc/%P/root/escaped' > /proc/sys/kernel/core_pattern && \
        { sh -c 'ulimit -c unlimited; kill -SEGV $$'; sleep 1; ls /escaped; }",
        Fails,
    ),
];

/// A privileged container with the node's tools.
async fn with_tools(node: &Node) -> Result<Container> {
    let pod = node
        .pod("kernel")
        .with_linux(|linux| linux.security_context.get_or_insert_default().privileged = true);
    let container =
        pod.run().await?.container("tools").image(BUSYBOX).mount("/usr", "/node", true).with_security(
            |security| {
                security.privileged = true;
                security.masked_paths.clear();
                security.readonly_paths.clear();
            },
        );
    let container = container.start().await?;
    container.shell("ln -s node/lib /lib; ln -s node/lib64 /lib64; mkdir -p /mnt /run /tmp").await?;
    Ok(container)
}

#[test]
fn a_guest_has_what_pods_expect_of_a_kernel_and_no_more() -> Result<()> {
    on_pericarp(async |node| {
        let container = with_tools(node).await?;
        let mut script = String::from(
            "export PATH=$PATH:/node/sbin:/node/bin XTABLES_LIBDIR=/node/lib/x86_64-linux-gnu/xtables
            ip() { /node/bin/ip \"$@\"; }
            ss() { /node/bin/ss \"$@\"; }
            tc() { /node/sbin/tc \"$@\"; }
            iptables() { /node/sbin/xtables-nft-multi iptables \"$@\"; }
            ip6tables() { /node/sbin/xtables-nft-multi ip6tables \"$@\"; }\n",
        );
        // One command for all of them, because each exec costs more than the checks.
        for (number, (_, command, _)) in CHECKS.iter().enumerate() {
            writeln!(script, "said=$( {{ {command}; }} 2>&1); echo {number} $? $said")?;
        }
        let output = container.shell(&script).await?;
        let seen: BTreeMap<usize, (&str, &str)> = output
            .lines()
            .filter_map(|line| {
                let mut words = line.splitn(3, ' ');
                let number = words.next()?.parse().ok()?;
                Some((number, (words.next()?, words.next().unwrap_or_default())))
            })
            .collect();
        let mut wrong = String::new();
        for (number, (what, _, answer)) in CHECKS.iter().enumerate() {
            let (status, said) = seen.get(&number).copied().unwrap_or(("none", ""));
            let right = match answer {
                Works => status == "0",
                Fails => status != "0" && status != "none",
                Prints(expected) => status == "0" && said == *expected,
            };
            if !right {
                writeln!(wrong, "{what}: status {status}, {said:?}")?;
            }
        }
        ensure!(wrong.is_empty(), "{wrong}");
        Ok(())
    })
}
