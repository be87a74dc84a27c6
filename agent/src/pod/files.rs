//! The pod's files: `hostname`, `hosts`, `resolv.conf` and shared memory.

use std::{ffi::CString, fmt::Write, fs, io, os::unix::fs::chown, path::Path};

use pericarp_protos::{
    agent::{ConfigureRequest, Dns, Interface},
    guest::SHM_DIR,
};
use rustix::mount::{MountFlags, mount};

use super::{configuration::PodError, network};

/// Writes the pod's `hostname`, `hosts` and `resolv.conf` into `directory`.
pub fn write(directory: &Path, request: &ConfigureRequest) -> Result<(), PodError> {
    let hostname = if request.hostname.is_empty() { "localhost" } else { &request.hostname };
    let create = |name: &str, content: &str| {
        let path = directory.join(name);
        let written = fs::write(&path, content).and_then(|()| match request.user_namespace.as_ref() {
            // The pod's root may write the files, as with runc.
            Some(user) => chown(&path, Some(user.uids.outside), Some(user.gids.outside)),
            None => Ok(()),
        });
        written.map_err(|source| PodError::File { path, source })
    };
    fs::create_dir_all(directory).map_err(|source| PodError::File { path: directory.to_owned(), source })?;
    create("hostname", &format!("{hostname}\n"))?;
    create("hosts", &hosts(hostname, &request.interfaces))?;
    create("resolv.conf", &resolv_conf(&request.dns))
}

/// The content of `/etc/hosts`, by which the pod finds its own addresses.
fn hosts(hostname: &str, interfaces: &[Interface]) -> String {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if hostname == "localhost" {
        return hosts;
    }
    let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
    let addresses: Vec<_> = addresses.filter_map(|address| network::parse_ip(&address.ip)).collect();
    // The first address of each family is the pod's, as kubelet has it.
    let own = [addresses.iter().find(|ip| ip.is_ipv4()), addresses.iter().find(|ip| ip.is_ipv6())];
    for ip in own.into_iter().flatten() {
        let _ = writeln!(hosts, "{ip}\t{hostname}");
    }
    if addresses.is_empty() {
        // Debian does the same on a machine without a permanent address.
        let _ = writeln!(hosts, "127.0.1.1\t{hostname}");
    }
    hosts
}

/// The content of `/etc/resolv.conf`, from CRI's `DNSConfig`.
fn resolv_conf(dns: &Dns) -> String {
    let mut content = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(content, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(content, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(content, "options {}", dns.options.join(" "));
    }
    content
}

/// Mounts the file system that is `/dev/shm` in the pod's containers.
pub fn mount_shared_memory(request: &ConfigureRequest) -> io::Result<()> {
    fs::create_dir_all(SHM_DIR)?;
    let mut options = "mode=1777".to_owned();
    if request.shm_bytes > 0 {
        let _ = write!(options, ",size={}", request.shm_bytes);
    }
    // containerd mounts its own with the same flags (`podsandbox.Controller.setupSandboxFiles`). A bind mount in a
    // container drops them, except in a user namespace.
    let flags = if request.user_namespace.is_some() {
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC
    } else {
        MountFlags::empty()
    };
    let options = CString::new(options)?;
    mount("shm", SHM_DIR, "tmpfs", flags, options.as_c_str())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_files_hold_its_name_and_its_dns() {
        let directory = tempfile::tempdir().unwrap();
        let mut request = ConfigureRequest::new();
        request.hostname = "web-0".into();
        let dns = request.dns.mut_or_insert_default();
        dns.servers = vec!["10.0.0.10".into(), "fd00::10".into()];
        dns.searches = vec!["default.svc".into(), "svc".into()];
        dns.options = vec!["ndots:5".into()];
        write(directory.path(), &request).unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(
            read("resolv.conf"),
            "search default.svc svc\nnameserver 10.0.0.10\nnameserver fd00::10\noptions ndots:5\n"
        );
        let hosts = read("hosts");
        assert!(hosts.contains("127.0.0.1\tlocalhost\n") && hosts.contains("::1\tlocalhost"), "{hosts}");
        assert!(hosts.contains("\tweb-0\n"), "{hosts}");
    }

    #[test]
    fn a_pod_with_addresses_finds_itself_at_the_first_of_each_family() {
        let mut interface = Interface::new();
        for ip in ["10.0.0.7", "10.0.0.8", "fd00::7"] {
            let ip: std::net::IpAddr = ip.parse().unwrap();
            let mut address = pericarp_protos::agent::Address::new();
            address.ip = match ip {
                std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
                std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            interface.addresses.push(address);
        }
        let hosts = hosts("web-0", &[interface]);
        assert!(hosts.ends_with("\n10.0.0.7\tweb-0\nfd00::7\tweb-0\n"), "{hosts}");
    }
}
