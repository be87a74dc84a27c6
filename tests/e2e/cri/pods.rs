//! Pods: their life, and what their containers share.

use std::{
    fs,
    process::{Child, Command},
};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use pericarp_tests::{
    HANG_LIMIT, api,
    node::{
        controller::{NODE_RUN_DIR, warnings_about},
        machine::MachineProcess,
    },
    on_node, on_pericarp,
};
use tokio::time::timeout;

use crate::machine::resize;

#[test]
fn a_pod_is_ready_until_it_is_stopped_and_gone_when_it_is_removed() -> Result<()> {
    on_node(async |node| {
        let pod = node
            .pod("life")
            .label("tier", "back")
            .with(|config| {
                config.annotations.insert("note".to_owned(), "kept".to_owned());
            })
            .run()
            .await?;
        let status = pod.status().await?.context("a pod that was just made")?;
        assert_eq!(status.state(), api::PodSandboxState::SandboxReady);
        assert_eq!(status.metadata.as_ref(), pod.config.metadata.as_ref());
        assert_eq!(status.labels["tier"], "back");
        assert_eq!(status.annotations["note"], "kept");
        assert_eq!(status.runtime_handler, node.runtime.to_string());
        let network = status.network.context("a pod has an address")?;
        assert!(network.ip.starts_with("10.88."), "address {:?} is from the node's CNI network", network.ip);

        let container = pod.idle_container("idle").await?;
        pod.stop().await?;
        assert_eq!(container.status().await?.state(), api::ContainerState::ContainerExited);
        let status = pod.status().await?.context("a stopped pod is still known")?;
        assert_eq!(status.state(), api::PodSandboxState::SandboxNotready);
        pod.stop().await.context("stopping a stopped pod")?;

        pod.remove().await?;
        assert_eq!(pod.status().await?, None);
        pod.remove().await.context("removing a removed pod")?;
        // Nobody would read a log any more that has warnings about each pod.
        assert_eq!(warnings_about(&pod.id)?, Vec::<String>::new());
        assert_eq!(node.pods().await?, []);
        Ok(())
    })
}

#[test]
fn containers_of_a_pod_share_network_ipc_and_host_name_but_not_processes() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("shared").run().await?;
        let one = pod.idle_container("one").await?;
        let two = pod.container("two").command(["sleep", "424242"]).start().await?;
        let namespaces = "for n in net ipc uts pid mnt; do readlink /proc/self/ns/$n; done";
        let (of_one, of_two) = (one.shell(namespaces).await?, two.shell(namespaces).await?);
        let (of_one, of_two): (Vec<&str>, Vec<&str>) = (of_one.lines().collect(), of_two.lines().collect());
        assert_eq!(of_one[..3], of_two[..3], "net, ipc and uts are the pod's");
        assert_ne!(of_one[3], of_two[3], "pid is the container's");
        assert_ne!(of_one[4], of_two[4], "mnt is the container's");

        // By use, not by name only: a listener, shared memory, a process.
        one.shell("nc -l -p 8080 -e echo over-loopback > /dev/null 2>&1 & sleep 0.3").await?;
        assert_eq!(two.shell("nc 127.0.0.1 8080 < /dev/null").await?, "over-loopback");
        one.shell("echo in-memory > /dev/shm/note").await?;
        assert_eq!(two.shell("cat /dev/shm/note").await?, "in-memory");
        assert!(!one.shell("ps -o args").await?.contains("424242"), "one sees no process of two");
        assert_eq!(two.shell("cat /proc/1/comm").await?, "sleep");
        assert_eq!(one.shell("hostname").await?, "shared");
        assert_eq!(two.shell("hostname").await?, "shared");
        Ok(())
    })
}

#[test]
fn containers_of_a_pod_that_shares_its_processes_see_each_other() -> Result<()> {
    on_node(async |node| {
        let pod = node
            .pod("procs")
            .with_namespaces(|namespaces| namespaces.set_pid(api::NamespaceMode::Pod))
            .run()
            .await?;
        let one = pod.idle_container("one").await?;
        let _two = pod.container("two").command(["sleep", "424242"]).start().await?;
        assert!(one.shell("ps -o args").await?.contains("424242"));
        Ok(())
    })
}

#[test]
fn a_pod_has_its_names_and_its_resolver() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("names").run().await?;
        let container = pod.idle_container("idle").await?;
        assert_eq!(container.shell("cat /etc/hostname").await?, "names");
        let resolver = container.shell("cat /etc/resolv.conf").await?;
        for line in
            ["nameserver 10.96.0.10", "search default.svc.cluster.local cluster.local", "options ndots:5"]
        {
            assert!(resolver.contains(line), "{line:?} in {resolver:?}");
        }
        let hosts = container.shell("cat /etc/hosts").await?;
        assert!(hosts.contains("127.0.0.1") && hosts.contains("localhost"), "hosts: {hosts:?}");
        assert_eq!(container.shell("ip -o link show lo | grep -c 'LOOPBACK,UP'").await?, "1");
        Ok(())
    })
}

#[test]
fn a_pod_without_a_resolver_gets_the_nodes() -> Result<()> {
    on_node(async |node| {
        let pod = node.pod("resolver").with(|config| config.dns_config = None).run().await?;
        let container = pod.idle_container("idle").await?;
        let of_node = std::fs::read_to_string("/etc/resolv.conf")?;
        let of_pod = container.shell("cat /etc/resolv.conf").await?;
        let servers = |text: &str| -> Vec<String> {
            let servers = text.lines().filter(|line| line.starts_with("nameserver"));
            servers.map(str::to_owned).collect()
        };
        assert!(!servers(&of_node).is_empty(), "the node has no resolver: {of_node:?}");
        assert_eq!(servers(&of_pod), servers(&of_node));
        Ok(())
    })
}

#[test]
fn files_that_kubelet_mounts_win_over_the_pods_own() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let mut container = pod.container("mounted");
        let files = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];
        for file in files {
            let ours = node.file(file.trim_start_matches("/etc/"), &format!("kubelet's {file}\n"))?;
            container = container.mount(&ours, file, false);
        }
        let container = container.start().await?;
        for file in files {
            assert_eq!(container.shell(&format!("cat {file}")).await?, format!("kubelet's {file}"));
        }
        Ok(())
    })
}

#[test]
fn safe_sysctls_are_set_in_the_pod() -> Result<()> {
    // https://kubernetes.io/docs/tasks/administer-cluster/sysctl-cluster/: the safe set.
    const SAFE: [(&str, &str); 10] = [
        ("kernel.shm_rmid_forced", "1"),
        ("net.ipv4.ip_local_port_range", "20000\t30000"),
        ("net.ipv4.tcp_syncookies", "0"),
        ("net.ipv4.ping_group_range", "7\t9"),
        ("net.ipv4.ip_unprivileged_port_start", "100"),
        ("net.ipv4.ip_local_reserved_ports", "8080"),
        ("net.ipv4.tcp_keepalive_time", "600"),
        ("net.ipv4.tcp_fin_timeout", "30"),
        ("net.ipv4.tcp_keepalive_intvl", "60"),
        ("net.ipv4.tcp_keepalive_probes", "3"),
    ];
    on_node(async |node| {
        let pod = node.pod("sysctls").with_linux(|linux| {
            let sysctls = SAFE.map(|(key, value)| (key.to_owned(), value.replace('\t', " ")));
            linux.sysctls.extend(sysctls);
        });
        let container = pod.run().await?.idle_container("idle").await?;
        for (key, value) in SAFE {
            let path = format!("/proc/sys/{}", key.replace('.', "/"));
            assert_eq!(container.shell(&format!("cat {path}")).await?, value, "{key}");
        }
        Ok(())
    })
}

#[test]
fn a_process_without_privileges_may_listen_on_any_port_and_ping() -> Result<()> {
    on_node(async |node| {
        let pod = node.pooled_pod().await?;
        let container = pod
            .container("alice")
            .command(["peer", "serve", "127.0.0.1:80"])
            .with_security(|security| {
                security.run_as_user = Some(api::Int64Value { value: 1000 });
                security.capabilities =
                    Some(api::Capability { drop_capabilities: vec!["ALL".to_owned()], ..Default::default() });
            })
            .start()
            .await?;
        container.shell("until peer tcp 127.0.0.1:80 name; do sleep 0.1; done").await?;
        let range = container.shell("cat /proc/sys/net/ipv4/ping_group_range").await?;
        assert_eq!(range, "0\t2147483647");
        Ok(())
    })
}

#[test]
fn a_second_pod_of_the_same_name_runs_after_the_first_is_gone() -> Result<()> {
    on_node(async |node| {
        let first = node.pod("again").run().await?;
        first.stop().await?;
        first.remove().await?;
        let second = node.pod("again").run().await?;
        ensure!(second.id != first.id, "a pod's id is never used again");
        assert_eq!(second.idle_container("idle").await?.shell("hostname").await?, "again");
        Ok(())
    })
}

#[test]
fn the_same_pod_asked_for_twice_is_refused_and_the_first_lives_on() -> Result<()> {
    on_node(async |node| {
        let first = node.pod("twice").run().await?;
        let error = node.pod("twice").try_run().await?.unwrap_err();
        assert!(error.message().contains("is reserved for"), "{error}");
        assert!(first.is_ready().await?);
        Ok(())
    })
}

#[test]
fn many_pods_run_at_once() -> Result<()> {
    const MANY: usize = 6;
    on_node(async |node| {
        let pods: Vec<_> = (0..MANY).map(|n| node.pod(&format!("many-{n}"))).collect();
        let run = pods.into_iter().map(async |pod| {
            let pod = pod.run().await?;
            let container = pod.idle_container("idle").await?;
            let name = container.shell("hostname").await?;
            assert_eq!(name, pod.config.hostname);
            anyhow::Ok(pod)
        });
        let pods = timeout(HANG_LIMIT, try_join_all(run)).await.context("all pods in time")??;
        assert_eq!(node.pods().await?.len(), MANY);
        try_join_all(pods.iter().map(async |pod| {
            assert!(pod.is_ready().await?);
            pod.stop().await?;
            pod.remove().await
        }))
        .await?;
        assert_eq!(node.pods().await?, []);
        Ok(())
    })
}

/// A process of the node, which ends when this is dropped.
struct Busy(Child);

impl Drop for Busy {
    fn drop(&mut self) {
        // It may have been killed before.
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

#[test]
fn a_pod_that_cannot_be_undone_is_kept_until_it_can_be() -> Result<()> {
    on_pericarp(async |node| {
        let pod = node.pod("busy").run().await?;
        pod.idle_container("idle").await?;
        let cgroup = resize::cgroup(&pod).await?;
        let record = format!("{NODE_RUN_DIR}/{}/state.json", pod.id);
        // A cgroup cannot be removed while somebody is in it.
        let busy = Busy(Command::new("sleep").arg("600").spawn()?);
        fs::write(cgroup.join("cgroup.procs"), busy.0.id().to_string())?;
        // containerd does not ask for a pod to be stopped whose machine has ended, only for it to be removed.
        for attempt in [pod.stop().await, pod.remove().await] {
            let error = format!("{:#}", attempt.err().context("it cannot be stopped, nor removed")?);
            assert!(error.contains("cannot remove the pod's cgroup"), "{error}");
            assert!(fs::exists(&record)?, "the record is gone");
            assert_eq!(MachineProcess::of_pod(&pod.id)?, None);
        }
        drop(busy);
        pod.stop().await?;
        pod.remove().await?;
        assert!(!cgroup.exists() && !fs::exists(&record)?);
        Ok(())
    })
}
