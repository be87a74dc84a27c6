//! Translates a container's OCI runtime spec, which containerd made for a process on the host, for
//! the guest.
//!
//! The spec is handled as JSON and not through typed structures: what a structure has no field for would be lost
//! without a word, and is refused instead ([`unsupported`]).

mod devices;
mod huge_pages;
mod memory_volumes;
mod mounts;
mod unsupported;

pub use devices::{BlockVolume, GivenDevice, GivenDevices};
pub use huge_pages::HugeDirectory;

use std::{io, path::Path};

use pericarp_protos::guest::{
    CGROUP_PARENT, IPC_NAMESPACE, NETWORK_NAMESPACE, PID_NAMESPACE, SHARE_DIR, USER_NAMESPACE, UTS_NAMESPACE,
};
use pericarp_protos::host::MemoryVolume;
use pericarp_protos::id::ContainerId;
use serde_json::{Map, Value};

use crate::host::{empty_dir::MemoryEmptyDir, share::volume::Volume, user_namespace::IdMap};

/// Where a spec, or a mount of it, says how ids are mapped.
const MAPPINGS: [&str; 2] = ["uidMappings", "gidMappings"];

/// containerd's name for its default `AppArmor` profile (`internal/cri/server`, `appArmorDefaultProfileName`).
const DEFAULT_APPARMOR_PROFILE: &str = "cri-containerd.apparmor.d";

/// `SELinux` process types that a container engine assigns by itself.
pub const SELINUX_DEFAULT_TYPES: [&str; 4] = ["container_t", "container_init_t", "container_kvm_t", "spc_t"];

/// What to do about a profile of the host's.
pub const APPARMOR_REMEDY: &str =
    "the host's profiles do not exist in the guest; use RuntimeDefault or Unconfined";

/// What to do about a label that somebody chose.
pub const SELINUX_REMEDY: &str = "the guest has no SELinux policy; remove seLinuxOptions from the pod";

/// Why a spec cannot be run in a guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a spec at all.
    #[error("the container's OCI spec is not valid JSON")]
    Json(#[from] serde_json::Error),
    /// Nothing that says what CRI was asked for.
    #[error("containerd's record of the container is not valid JSON")]
    Record(#[source] serde_json::Error),
    /// A field has another type than the OCI runtime spec gives it.
    #[error("the container's OCI spec is malformed: {0}")]
    Malformed(&'static str),
    /// The OCI runtime spec wants an absolute one.
    #[error("the container's working directory {0:?} is not an absolute path")]
    WorkingDirectory(String),
    /// The host's devices have been numbered anew since containerd made the spec.
    #[error(
        "the block device of the volume at {path} is not the one that it was when the container was made; make \
         the container again"
    )]
    OtherDevice {
        /// In the container.
        path: String,
    },
    /// An emptyDir in memory that kubelet has changed meanwhile, or that the kernel says nothing about.
    #[error(
        "the emptyDir in memory at {destination} cannot be looked at; the controller's log on the node says why"
    )]
    MemoryVolume {
        /// In the container.
        destination: String,
        #[source]
        source: io::Error,
    },
    /// The spec asks for something that a pod in a machine of its own cannot have.
    #[error("{what} cannot be used in a pericarp pod: {remedy}")]
    Unsupported {
        /// What the spec asks for.
        what: String,
        /// Why not, and what to do.
        remedy: &'static str,
    },
}

pub fn unsupported<T>(what: impl Into<String>, remedy: &'static str) -> Result<T, Error> {
    Err(Error::Unsupported { what: what.into(), remedy })
}

/// A spec for the guest, and what has to be in the share before the guest can use it.
#[derive(Debug)]
pub struct TranslatedSpec {
    /// The guest's OCI runtime spec, JSON.
    pub spec: Vec<u8>,
    /// Directories and files of the host that the spec mounts.
    pub volumes: Vec<Volume>,
    /// Volumes that the guest makes itself, one entry for each mount of one.
    pub memory_volumes: Vec<MemoryVolume>,
    /// Block devices of the host that the guest gets as disks.
    pub disks: Vec<BlockVolume>,
}

/// What a container's spec depends on beside itself.
#[derive(Clone, Debug)]
pub struct Pod {
    /// containerd made every namespace path of the spec from this process id (`internal/cri/opts`,
    /// `WithPodNamespaces`).
    pub machine_pid: u32,
    /// The map of the pod's user namespace, if it has one.
    pub id_map: Option<IdMap>,
    /// Is asked about the sources of a container's volumes if it may have huge pages.
    pub huge_directory: fn(&Path) -> Option<HugeDirectory>,
    /// kubelet's id of the pod; empty if nobody knows it.
    pub uid: String,
    /// Is asked about the sources of a container's volumes, and gets that id.
    pub memory_empty_dir: fn(&Path, &str) -> io::Result<Option<MemoryEmptyDir>>,
}

/// Translates the spec of `container`. `given`: the devices that were asked for, if that is on record.
pub fn translate(
    spec: &[u8],
    container: &ContainerId,
    pod: &Pod,
    given: Option<&GivenDevices>,
) -> Result<TranslatedSpec, Error> {
    let mut spec: Value = serde_json::from_slice(spec)?;
    unsupported::check(&spec)?;
    let root = spec.as_object_mut().ok_or(Error::Malformed("it is not an object"))?;
    refuse_hooks(root)?;
    // These belong to the UTS namespace, which is the pod's and is set by the agent.
    root.remove("hostname");
    root.remove("domainname");
    check_working_directory(root)?;
    let read_only_root = set_root_path(root, container)?;
    security_labels(root)?;
    // First, because containerd shares the root file system for the sake of a volume, which is what the user knows.
    let (volumes, memory_volumes) = mounts::translate(root, read_only_root, pod)?;
    let disks = linux(root, container, pod, given)?;
    Ok(TranslatedSpec { spec: serde_json::to_vec(&spec)?, volumes, memory_volumes, disks })
}

/// Where the guest sees a container's part of the share.
fn guest_directory(container: &ContainerId) -> String {
    format!("{SHARE_DIR}/{container}")
}

fn object<'a>(
    parent: &'a mut Map<String, Value>,
    key: &str,
    malformed: &'static str,
) -> Result<Option<&'a mut Map<String, Value>>, Error> {
    match parent.get_mut(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(Error::Malformed(malformed)),
    }
}

/// Whether a list of mappings says anything.
fn is_given(list: &Value) -> bool {
    list.as_array().is_some_and(|list| !list.is_empty())
}

fn text<'a>(parent: &'a Map<String, Value>, key: &str) -> &'a str {
    parent.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn refuse_hooks(root: &Map<String, Value>) -> Result<(), Error> {
    let hooks = root.get("hooks").and_then(Value::as_object);
    let named =
        hooks.into_iter().flatten().find(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty()));
    match named {
        Some((name, _)) => unsupported(
            format!("the OCI hook {name}"),
            "hooks run on the host, where the container is not; remove them from the base spec or the NRI plugin",
        ),
        None => Ok(()),
    }
}

/// runc refuses this too (`validate.go`, `cwd`); libcontainer would only fail to go there.
fn check_working_directory(root: &mut Map<String, Value>) -> Result<(), Error> {
    let Some(process) = object(root, "process", "process is not an object")? else { return Ok(()) };
    match text(process, "cwd") {
        absolute if absolute.starts_with('/') => Ok(()),
        other => Err(Error::WorkingDirectory(other.to_owned())),
    }
}

/// Points the root at the share; says whether it is read-only.
fn set_root_path(root: &mut Map<String, Value>, container: &ContainerId) -> Result<bool, Error> {
    let root = object(root, "root", "root is not an object")?.ok_or(Error::Malformed("it has no root"))?;
    root.insert("path".into(), format!("{}/rootfs", guest_directory(container)).into());
    Ok(root.get("readonly").and_then(Value::as_bool).unwrap_or(false))
}

/// Drops the labels that engines add on their own and refuses those that somebody chose.
fn security_labels(root: &mut Map<String, Value>) -> Result<(), Error> {
    if let Some(process) = object(root, "process", "process is not an object")? {
        let profile = process.remove("apparmorProfile");
        match profile.as_ref().and_then(Value::as_str) {
            None | Some("" | "unconfined" | DEFAULT_APPARMOR_PROFILE) => {}
            Some(profile) => {
                return unsupported(format!("the AppArmor profile {profile:?}"), APPARMOR_REMEDY);
            }
        }
        check_selinux(process.remove("selinuxLabel").as_ref())?;
    }
    if let Some(linux) = object(root, "linux", "linux is not an object")? {
        linux.remove("mountLabel");
    }
    Ok(())
}

fn check_selinux(label: Option<&Value>) -> Result<(), Error> {
    let label = label.and_then(Value::as_str).unwrap_or_default();
    let kind = label.split(':').nth(2);
    if label.is_empty() || kind.is_some_and(|kind| SELINUX_DEFAULT_TYPES.contains(&kind)) {
        return Ok(());
    }
    unsupported(format!("the SELinux label {label:?}"), SELINUX_REMEDY)
}

fn linux(
    root: &mut Map<String, Value>,
    container: &ContainerId,
    pod: &Pod,
    given: Option<&GivenDevices>,
) -> Result<Vec<BlockVolume>, Error> {
    let linux = object(root, "linux", "linux is not an object")?
        .ok_or(Error::Malformed("it has no linux section"))?;
    linux.insert("cgroupsPath".into(), format!("{CGROUP_PARENT}/{container}").into());
    check_mappings(linux, pod.id_map.as_ref())?;
    namespaces(linux, pod)?;
    let disks = devices::translate(linux, given)?;
    if let (Some(disk), Some(_)) = (disks.first(), pod.id_map) {
        return unsupported(
            format!("the raw block volume {}", disk.path),
            "device nodes cannot be made in a user namespace; use a file system, or remove hostUsers: false from the \
             pod",
        );
    }
    if linux.remove("intelRdt").is_some_and(|rdt| !rdt.is_null()) {
        return unsupported("an RDT class", "the guest has no resctrl; remove the RDT annotations");
    }
    // For slaves, containerd sets the root's too. Mounts that the host makes later come through the share anyway.
    let propagation = linux.remove("rootfsPropagation");
    if propagation.as_ref().and_then(Value::as_str).is_some_and(|kind| kind.ends_with("shared")) {
        return mounts::refuse_shared("the root file system");
    }
    if let Some(resources) = object(linux, "resources", "linux.resources is not an object")? {
        huge_pages::check(resources)?;
        if let Some(cpu) = object(resources, "cpu", "linux.resources.cpu is not an object")? {
            // Numbers of the host's CPUs and memory nodes, for the whole machine (`Pod::pin`): the guest has its own.
            cpu.remove("cpus");
            cpu.remove("mems");
        }
    }
    Ok(disks)
}

/// A container's ids are those of its pod.
fn check_mappings(linux: &Map<String, Value>, id_map: Option<&IdMap>) -> Result<(), Error> {
    let [uids, gids] = MAPPINGS.map(|key| linux.get(key).filter(|list| is_given(list)));
    match (uids, gids, id_map) {
        (None, None, _) => Ok(()),
        (Some(uids), Some(gids), Some(id_map)) if id_map.is(uids, gids) => Ok(()),
        _ => refuse_user_namespace(),
    }
}

fn namespaces(linux: &mut Map<String, Value>, pod: &Pod) -> Result<(), Error> {
    let Pod { machine_pid, id_map, .. } = pod;
    let has_user_namespace = id_map.is_some();
    let Some(list) = linux.get_mut("namespaces") else { return Ok(()) };
    let list = match list {
        Value::Array(list) => list,
        Value::Null => return Ok(()),
        _ => return Err(Error::Malformed("linux.namespaces is not a list")),
    };
    let of_pod = |kind: &str| format!("/proc/{machine_pid}/ns/{kind}");
    let (pod_pid, pod_user) = (of_pod("pid"), of_pod("user"));
    let mut kept = Vec::with_capacity(list.len());
    for mut entry in std::mem::take(list) {
        let namespace = entry.as_object_mut().ok_or(Error::Malformed("a namespace is not an object"))?;
        let path = text(namespace, "path").to_owned();
        match text(namespace, "type") {
            // The machine is the pod: its containers share the guest's own, or those of its user namespace.
            "network" | "ipc" | "uts" if !has_user_namespace => continue,
            "network" => at(namespace, NETWORK_NAMESPACE),
            "ipc" => at(namespace, IPC_NAMESPACE),
            "uts" => at(namespace, UTS_NAMESPACE),
            "user" if has_user_namespace && path == pod_user => at(namespace, USER_NAMESPACE),
            "pid" if path == pod_pid => at(namespace, PID_NAMESPACE),
            // Any other process id is one that the agent reported for the container that is the
            // target, so the path holds in the guest as it is.
            "pid" if path.is_empty() || is_pid_namespace(&path) => {}
            "mount" | "cgroup" | "time" if path.is_empty() => {}
            "user" => return refuse_user_namespace(),
            kind => {
                return unsupported(
                    format!("a {kind} namespace at {path:?}"),
                    "a namespace of the host cannot be joined from inside the machine",
                );
            }
        }
        kept.push(entry);
    }
    *list = kept;
    Ok(())
}

fn at(namespace: &mut Map<String, Value>, path: &str) {
    namespace.insert("path".into(), path.into());
}

fn is_pid_namespace(path: &str) -> bool {
    let pid = path.strip_prefix("/proc/").and_then(|path| path.strip_suffix("/ns/pid"));
    pid.is_some_and(|pid| pid.parse::<u32>().is_ok())
}

fn refuse_user_namespace<T>() -> Result<T, Error> {
    unsupported("a user namespace of the container's own", "a container can only have that of its pod")
}

#[cfg(test)]
mod tests;
