//! Makes the guest into one particular pod: `Agent.Configure`.
//!
//! The pod's network, IPC and UTS namespaces are the guest's own: the machine is the pod. A pod with a user namespace has
//! its own ones, which belong to that.

use std::{
    collections::HashMap,
    fmt::Write,
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use async_trait::async_trait;
use nix::mount::MsFlags;
use pericarp_protos::{
    agent::{
        Agent, CheckRequest, CheckResponse, ConfigureRequest, ConfigureResponse, Dns, Interface,
        ResizeRequest, ResizeResponse,
    },
    guest::{ETC_DIR, SHM_DIR},
    ttrpc::{self, Code, r#async::TtrpcContext},
};

use protobuf::Message as _;
use tokio::sync::watch;

use crate::{
    boot, devices,
    network::{self, NetworkError},
    runtime::{self, Action, Descriptors, Request, RuntimeError},
    server, stdio,
    task::Exits,
};

/// Why the guest cannot be made into the pod.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// `Configure` was called before.
    #[error("this guest has already been configured")]
    AlreadyConfigured,
    /// Not a host name.
    #[error("cannot set the hostname {0:?}")]
    Hostname(String, #[source] io::Error),
    /// A sysctl that this kernel does not have.
    #[error("sysctl {0:?} does not exist in the guest")]
    UnknownSysctl(String),
    /// A sysctl that refuses its value.
    #[error("cannot set sysctl {key:?} to {value:?}: {source}")]
    Sysctl {
        /// The sysctl's name.
        key: String,
        /// The value that was refused.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// One of the pod's files cannot be written.
    #[error("cannot write {path:?}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The pod's network cannot be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The pod's user namespace cannot be made, or those that belong to it, or what was to be done in them.
    #[error("cannot make a user namespace into the pod's: {0}")]
    Namespaces(#[from] RuntimeError),
    /// The shared memory file system cannot be mounted.
    #[error("cannot mount the pod's shared memory: {0}")]
    SharedMemory(io::Error),
}

impl From<PodError> for ttrpc::Error {
    fn from(error: PodError) -> Self {
        let code = match error {
            PodError::AlreadyConfigured => Code::FAILED_PRECONDITION,
            PodError::Hostname(..) | PodError::UnknownSysctl(_) | PodError::Sysctl { .. } => {
                Code::INVALID_ARGUMENT
            }
            PodError::File { .. }
            | PodError::SharedMemory(_)
            | PodError::Network(_)
            | PodError::Namespaces(_) => Code::INTERNAL,
        };
        server::status(code, error.to_string())
    }
}

/// Whose network, IPC and UTS namespaces the pod's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// The guest's.
    Guest,
    /// Its own: they belong to its user namespace.
    Own,
}

/// The pod that this guest is.
#[derive(Default)]
pub struct Pod {
    exits: Arc<Exits>,
    begun: AtomicBool,
    configured: watch::Sender<Option<Namespaces>>,
    share: OnceLock<Result<(), String>>,
}

impl Pod {
    /// A guest that is not yet a pod.
    pub fn new(exits: Arc<Exits>) -> Arc<Self> {
        Arc::new(Self { exits, ..Self::default() })
    }

    /// Whether `Configure` has succeeded, so that containers may be made.
    pub fn is_configured(&self) -> bool {
        self.configured.borrow().is_some()
    }

    /// Waits until `Configure` has succeeded; `None` if it never will.
    pub async fn configured(&self) -> Option<Namespaces> {
        *self.configured.subscribe().wait_for(Option::is_some).await.ok()?
    }

    /// Mounts the pod's share, once; containers' files are there.
    pub fn mount_share(&self) -> Result<(), String> {
        // In tests there is no share.
        let mount = || if std::process::id() == 1 { boot::mount_share() } else { Ok(()) };
        self.share.get_or_init(|| mount().map_err(|error| error.to_string())).clone()
    }

    /// Mounts the share as soon as nobody waits for the pod any more: the device takes its time.
    pub async fn mount_share_when_idle(self: Arc<Self>) {
        if self.configured().await.is_some() {
            tokio::task::yield_now().await;
            if let Err(error) = self.mount_share() {
                tracing::error!("{error}");
            }
        }
    }

    async fn apply(&self, request: &ConfigureRequest) -> Result<(), PodError> {
        if self.begun.swap(true, Ordering::Relaxed) {
            return Err(PodError::AlreadyConfigured);
        }
        write_files(Path::new(ETC_DIR), request)?;
        mount_shared_memory(request).map_err(PodError::SharedMemory)?;
        let namespaces = if request.user_namespace.is_some() {
            self.settle_in_namespaces(request).await?;
            Namespaces::Own
        } else {
            settle(request).await?;
            Namespaces::Guest
        };
        self.configured.send_replace(Some(namespaces));
        Ok(())
    }

    /// Has a helper make the namespaces and settle there: this process is not to leave its own.
    async fn settle_in_namespaces(&self, request: &ConfigureRequest) -> Result<(), RuntimeError> {
        let request = request.write_to_bytes().map_err(io::Error::other)?;
        let request = Request {
            id: String::new(),
            directory: PathBuf::from(ETC_DIR),
            action: Action::Namespaces(request),
        };
        let stdio = [stdio::null()?, stdio::null()?, stdio::null()?];
        runtime::launch(&self.exits, &request, Descriptors { stdio, console: None }).await?;
        Ok(())
    }
}

/// Gives the namespaces that the caller is in the pod's name, network and sysctls.
pub async fn settle(request: &ConfigureRequest) -> Result<(), PodError> {
    if !request.hostname.is_empty() {
        nix::unistd::sethostname(&request.hostname)
            .map_err(|errno| PodError::Hostname(request.hostname.clone(), errno.into()))?;
    }
    network::apply(request).await?;
    // Last, because some are an interface's.
    set_sysctls(Path::new("/proc/sys"), &request.sysctls)
}

/// `pericarp.agent.v1.Agent` without its stream, which [`crate::events`] serves.
#[async_trait]
impl Agent for Pod {
    async fn configure(
        &self,
        _: &TtrpcContext,
        request: ConfigureRequest,
    ) -> ttrpc::Result<ConfigureResponse> {
        let arrival = Instant::now();
        self.apply(&request).await?;
        let mut response = ConfigureResponse::new();
        response.configure_ns = u64::try_from(arrival.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok(response)
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        devices::resize(request).await.map_err(|error| server::status(Code::INTERNAL, error.to_string()))
    }

    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<CheckResponse> {
        Ok(CheckResponse::new())
    }
}

fn write_files(directory: &Path, request: &ConfigureRequest) -> Result<(), PodError> {
    let hostname = if request.hostname.is_empty() { "localhost" } else { &request.hostname };
    let create = |name: &str, content: &str| {
        let path = directory.join(name);
        let written = fs::write(&path, content).and_then(|()| match request.user_namespace.as_ref() {
            // The pod's root may write them, as with runc.
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

/// `/etc/hosts`: where the pod finds itself.
fn hosts(hostname: &str, interfaces: &[Interface]) -> String {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if hostname == "localhost" {
        return hosts;
    }
    let addresses = interfaces.iter().flat_map(|interface| &interface.addresses);
    let addresses: Vec<_> = addresses.filter_map(|address| network::ip(&address.ip)).collect();
    // The first of each family is the pod's own, as for kubelet.
    let own = [addresses.iter().find(|ip| ip.is_ipv4()), addresses.iter().find(|ip| ip.is_ipv6())];
    for ip in own.into_iter().flatten() {
        let _ = writeln!(hosts, "{ip}\t{hostname}");
    }
    if addresses.is_empty() {
        // As Debian has it for a machine without a permanent address.
        let _ = writeln!(hosts, "127.0.1.1\t{hostname}");
    }
    hosts
}

/// `/etc/resolv.conf`, from CRI's `DNSConfig`.
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

fn mount_shared_memory(request: &ConfigureRequest) -> io::Result<()> {
    fs::create_dir_all(SHM_DIR)?;
    let mut options = "mode=1777".to_owned();
    if request.shm_bytes > 0 {
        let _ = write!(options, ",size={}", request.shm_bytes);
    }
    // So is containerd's own (`podsandbox.Controller.setupSandboxFiles`). Binding it into a container frees it of them,
    // but not in a user namespace.
    let flags = if request.user_namespace.is_some() {
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
    } else {
        MsFlags::empty()
    };
    nix::mount::mount(Some("shm"), SHM_DIR, Some("tmpfs"), flags, Some(options.as_str()))?;
    Ok(())
}

/// Sets sysctls; `root` is `/proc/sys`.
fn set_sysctls(root: &Path, sysctls: &HashMap<String, String>) -> Result<(), PodError> {
    for (key, value) in sysctls {
        let path = sysctl_path(root, key).ok_or_else(|| PodError::UnknownSysctl(key.clone()))?;
        // Not `fs::write`: it would create what does not exist, were `root` anything but procfs.
        let written = fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(PodError::UnknownSysctl(key.clone()));
            }
            Err(source) => {
                return Err(PodError::Sysctl { key: key.clone(), value: value.clone(), source });
            }
        }
    }
    Ok(())
}

/// The file of a sysctl, in either notation of sysctl(8): `net.ipv4.ip_forward`, or with slashes
/// where a name contains a dot (`net/ipv4/conf/eth0.1/forwarding`).
fn sysctl_path(root: &Path, key: &str) -> Option<PathBuf> {
    let separator = if key.contains('/') { '/' } else { '.' };
    let parts: Vec<&str> = key.split(separator).collect();
    let names_a_file = parts.iter().all(|part| !matches!(*part, "" | "." | ".."));
    names_a_file.then(|| root.join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory_with_sysctl() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("net/core")).unwrap();
        fs::write(root.path().join("net/core/somaxconn"), "4096").unwrap();
        root
    }

    #[test]
    fn a_sysctl_is_written_in_either_notation() {
        let root = directory_with_sysctl();
        for (key, value) in [("net.core.somaxconn", "17"), ("net/core/somaxconn", "23")] {
            set_sysctls(root.path(), &HashMap::from([(key.into(), value.into())])).unwrap();
            let content = fs::read_to_string(root.path().join("net/core/somaxconn")).unwrap();
            assert!(content.starts_with(value), "{content}");
        }
    }

    #[test]
    fn an_unknown_sysctl_is_named_in_the_error() {
        let root = directory_with_sysctl();
        for key in ["net.core.nonsense", "", "net..core", "net/../../etc/passwd"] {
            let error = set_sysctls(root.path(), &HashMap::from([(key.to_owned(), "1".into())])).unwrap_err();
            assert!(matches!(&error, PodError::UnknownSysctl(name) if name == key), "{error}");
            assert!(error.to_string().contains(key));
        }
        assert!(!root.path().join("net/core/nonsense").exists());
    }

    #[test]
    fn the_pods_files_hold_its_name_and_its_dns() {
        let directory = tempfile::tempdir().unwrap();
        let mut request = ConfigureRequest::new();
        request.hostname = "web-0".into();
        let dns = request.dns.mut_or_insert_default();
        dns.servers = vec!["10.0.0.10".into(), "fd00::10".into()];
        dns.searches = vec!["default.svc".into(), "svc".into()];
        dns.options = vec!["ndots:5".into()];
        write_files(directory.path(), &request).unwrap();
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

    #[tokio::test]
    async fn a_guest_is_configured_only_once() {
        let pod = Pod::default();
        pod.begun.store(true, Ordering::Relaxed);
        assert!(matches!(pod.apply(&ConfigureRequest::new()).await, Err(PodError::AlreadyConfigured)));
    }
}
