//! What a guest is told of its pod, beside its network.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Read as _,
    path::Path,
};

use pericarp_protos::agent::{self, ConfigureRequest};

use super::{Pod, spec::Dns};
use crate::host::{cgroup, network::PodNetwork};

/// The host's resolver, which a pod gets that asks for none of its own.
const HOST_RESOLVER: &str = "/etc/resolv.conf";
/// The most that is read of it.
const RESOLVER_MAX: u64 = 64 << 10;

/// What containerd sets in the pods that it makes itself (`podsandbox.Controller.sandboxContainerSpec`, with
/// `enable_unprivileged_ports` and `enable_unprivileged_icmp`, which are its defaults): processes without privileges
/// may listen on any port and send echo requests.
const SYSCTLS: [(&str, &str); 2] =
    [("net.ipv4.ip_unprivileged_port_start", "0"), (PING_GROUPS, "0 2147483647")];
const PING_GROUPS: &str = "net.ipv4.ping_group_range";

/// Size of the pod's /dev/shm, as in the pods that containerd makes itself (`podsandbox`, `defaultShmSize`). A pod that
/// needs more mounts an emptyDir there.
const SHM_BYTES: u64 = 64 << 20;

impl Pod {
    pub(super) fn configuration(&self, network: PodNetwork) -> ConfigureRequest {
        let spec = &self.spec;
        let hostname = if spec.hostname.is_empty() {
            // As containerd does for its own sandboxes.
            rustix::system::uname().nodename().to_string_lossy().into_owned()
        } else {
            spec.hostname.clone()
        };
        let Dns { servers, searches, options } = resolver(spec.dns.as_ref(), Path::new(HOST_RESOLVER));
        ConfigureRequest {
            sandbox_id: self.id().to_owned(),
            hostname,
            shm_bytes: SHM_BYTES,
            dns: Some(agent::Dns { servers, searches, options, ..agent::Dns::default() }).into(),
            sysctls: sysctls(&spec.sysctls, spec.id_map.is_some()),
            interfaces: network.interfaces,
            routes: network.routes,
            neighbours: network.neighbours,
            tasks_max: self
                .status
                .borrow()
                .owned
                .cgroup()
                .as_deref()
                .and_then(cgroup::tasks_max)
                .unwrap_or(0),
            user_namespace: spec.id_map.map(|map| map.message()).into(),
            ..ConfigureRequest::default()
        }
    }
}

fn sysctls(requested: &BTreeMap<String, String>, has_user_namespace: bool) -> HashMap<String, String> {
    let mut sysctls: HashMap<_, _> = requested.clone().into_iter().collect();
    for (key, value) in SYSCTLS {
        // Most of these groups do not exist in a user namespace, and containerd leaves it out then, too.
        if has_user_namespace && key == PING_GROUPS {
            continue;
        }
        // Keys may be written with slashes, too: see sysctl(8).
        if !sysctls.contains_key(&key.replace('.', "/")) {
            sysctls.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    sysctls
}

/// The pod's own resolver or, as containerd has it for its own sandboxes, a copy of the host's.
fn resolver(own: Option<&Dns>, host: &Path) -> Dns {
    if let Some(own) = own {
        return own.clone();
    }
    let mut text = String::new();
    let read = File::open(host).and_then(|file| file.take(RESOLVER_MAX).read_to_string(&mut text));
    if let Err(error) = read {
        tracing::warn!(host = %host.display(), %error, "a pod without DNS configuration gets no resolver");
        return Dns::default();
    }
    parse(&text)
}

/// resolv.conf(5), as far as a pod's can say it: the last `search` and every `nameserver` and `options`.
fn parse(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next()),
            Some("search" | "domain") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_resolver_gets_the_hosts() {
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().join("resolv.conf");
        let text = "# made by hand\nsearch old.example\nnameserver 192.0.2.1\nnameserver fd00::53 # second\n\
                    options ndots:2 edns0\nsearch a.example b.example\n";
        std::fs::write(&host, text).unwrap();
        let dns = resolver(None, &host);
        assert_eq!(dns.servers, ["192.0.2.1", "fd00::53"]);
        assert_eq!(dns.searches, ["a.example", "b.example"]);
        assert_eq!(dns.options, ["ndots:2", "edns0"]);
        assert_eq!(resolver(None, &directory.path().join("none")), Dns::default());
    }

    #[test]
    fn a_pods_own_resolver_is_taken_as_it_is() {
        let own = Dns { servers: vec!["10.96.0.10".into()], ..Default::default() };
        assert_eq!(resolver(Some(&own), Path::new("/no/such/file")).servers, ["10.96.0.10"]);
    }

    #[test]
    fn a_sysctl_that_the_pod_asks_for_wins() {
        let ports = "net.ipv4.ip_unprivileged_port_start";
        assert_eq!(sysctls(&BTreeMap::new(), false)[ports], "0");
        let asked_for = BTreeMap::from([(ports.to_owned(), "1024".to_owned())]);
        assert_eq!(sysctls(&asked_for, false)[ports], "1024");
        let with_slashes = BTreeMap::from([(ports.replace('.', "/"), "1024".to_owned())]);
        assert!(!sysctls(&with_slashes, false).contains_key(ports));
    }

    #[test]
    fn a_user_namespace_has_not_all_groups_that_might_ping() {
        assert!(sysctls(&BTreeMap::new(), false).contains_key(PING_GROUPS));
        let own = sysctls(&BTreeMap::new(), true);
        assert!(!own.contains_key(PING_GROUPS) && own.len() == SYSCTLS.len() - 1);
    }
}
