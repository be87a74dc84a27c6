//! The mounts of a spec: what stays the guest's own, and what comes from the host as a volume.

use std::{
    cell::LazyCell,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use pericarp_protos::{
    guest::{ETC_DIR, SHARE_DIR, SHM_DIR, VOLUMES},
    host::MemoryVolume,
};
use serde_json::{Map, Value, json};

use super::{Error, MAPPINGS, Pod, huge_pages, is_given, memory_volumes, text, unsupported};
use crate::host::{
    mounts::MountTable,
    share::volume::{IdMapping, Propagation, ReadOnly, Volume},
    user_namespace::IdMap,
};

/// Files that are the pod's, not the image's.
const POD_FILES: [&str; 3] = ["hosts", "resolv.conf", "hostname"];

const SHM: &str = "/dev/shm";

/// File systems that the guest's kernel makes itself.
const GUEST_TYPES: [&str; 8] = ["proc", "sysfs", "tmpfs", "ramfs", "mqueue", "devpts", "cgroup", "cgroup2"];

/// Rewrites `mounts`; returns what has to be mounted on the host for it, and the volumes that the guest makes itself.
pub(super) fn translate(
    root: &mut Map<String, Value>,
    read_only_root: bool,
    pod: &Pod,
) -> Result<(Vec<Volume>, Vec<MemoryVolume>), Error> {
    let list = match root.remove("mounts") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(Error::Malformed("mounts is not a list")),
    };
    let huge_directory = Some(pod.huge_directory).filter(|_| huge_pages::are_allowed(root));
    let (mut volumes, mut in_memory) = (Vec::new(), Vec::new());
    let mut kept = Vec::with_capacity(list.len() + 4);
    let mut destinations = Vec::with_capacity(list.len());
    // Read only if a volume asks for it. It can always be read.
    let table = LazyCell::new(|| MountTable::read().ok());
    let any_below = |path: &Path| table.as_ref().is_some_and(|table| table.any_below(path));
    for mut entry in list {
        let mount = entry.as_object_mut().ok_or(Error::Malformed("a mount is not an object"))?;
        let destination = clean(text(mount, "destination"));
        if !destination.starts_with('/') {
            return Err(Error::Malformed("a mount's destination is not an absolute path"));
        }
        let options = options(mount)?;
        let kind = text(mount, "type");
        if matches!(kind, "bind" | "rbind")
            || options.iter().any(|option| option == "bind" || option == "rbind")
        {
            let volume = volume(mount, destination.clone(), &options, pod.id_map.as_ref(), &any_below)?;
            if let Some(directory) = huge_directory.and_then(|find| find(&volume.source)) {
                directory.mount(mount, &volume.name, volume.read_only != ReadOnly::No);
            } else if let Some(memory_volume) = memory_volumes::translate(mount, &volume, pod)? {
                in_memory.push(memory_volume);
            } else {
                let path = format!("{SHARE_DIR}/{VOLUMES}/{}", volume.name);
                mount.insert("source".into(), path.into());
                if volume.read_only == ReadOnly::TopOfTree {
                    let options = options.iter().filter(|option| *option != "ro");
                    mount.insert("options".into(), options.cloned().collect());
                }
                volumes.push(volume);
            }
            forget_ids(mount);
        } else if !GUEST_TYPES.contains(&kind) {
            return unsupported(
                format!("a mount of type {kind:?} at {destination}"),
                "only binds of the host's directories and the kernel's own file systems can be mounted",
            );
        } else if destination == SHM {
            // containerd's default: a tmpfs of this container alone. In a pod it is shared.
            continue;
        }
        destinations.push(destination);
        kept.push(entry);
    }
    add_pod_files(&mut kept, &destinations, read_only_root);
    root.insert("mounts".into(), Value::Array(kept));
    Ok((volumes, in_memory))
}

fn options(mount: &Map<String, Value>) -> Result<Vec<String>, Error> {
    match mount.get("options") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list
            .iter()
            .map(|option| option.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .ok_or(Error::Malformed("a mount option is not a string")),
        Some(_) => Err(Error::Malformed("a mount's options are not a list")),
    }
}

/// The host has mapped a volume's ids when the guest sees it.
fn forget_ids(mount: &mut Map<String, Value>) {
    for mappings in MAPPINGS {
        mount.remove(mappings);
    }
    if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
        options.retain(|option| option != "idmap" && option != "ridmap");
    }
}

/// How the ids of a volume are to be mapped: its own mappings, or the pod's if there is only an option (OCI runtime
/// spec, `config.md`). As both are the same from kubelet, only that is done.
fn ids(
    mount: &Map<String, Value>,
    destination: &str,
    options: &[String],
    id_map: Option<&IdMap>,
) -> Result<IdMapping, Error> {
    let has = |name: &str| options.iter().any(|option| option == name);
    let [uids, gids] = MAPPINGS.map(|key| mount.get(key).filter(|list| is_given(list)));
    let ids = if has("ridmap") { IdMapping::PodRecursive } else { IdMapping::Pod };
    match (uids, gids, id_map) {
        (None, None, _) if !has("idmap") && !has("ridmap") => Ok(IdMapping::Host),
        (None, None, Some(_)) => Ok(ids),
        (Some(uids), Some(gids), Some(id_map)) if id_map.is(uids, gids) => Ok(ids),
        _ => unsupported(
            format!("the mapping of the ids of the volume at {destination}"),
            "ids can be mapped only as they are in the pod's own user namespace",
        ),
    }
}

fn volume(
    mount: &Map<String, Value>,
    destination: String,
    options: &[String],
    id_map: Option<&IdMap>,
    any_below: &dyn Fn(&Path) -> bool,
) -> Result<Volume, Error> {
    let source = PathBuf::from(text(mount, "source"));
    if !source.is_absolute() {
        return Err(Error::Malformed("the source of a bind mount is not an absolute path"));
    }
    let ids = ids(mount, &destination, options, id_map)?;
    let has = |name: &str| options.iter().any(|option| option == name);
    let recursive = has("rbind") || text(mount, "type") == "rbind";
    if has("rshared") || has("shared") {
        return refuse_shared(&destination);
    }
    // As with mount(8), the last of two contradicting options wins.
    let mode = options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rw" | "rro"));
    let read_only = match mode.map(String::as_str) {
        Some("rro") => ReadOnly::Recursive,
        Some("ro") if recursive && any_below(&source) => ReadOnly::TopOfTree,
        Some("ro") => ReadOnly::Top,
        _ => ReadOnly::No,
    };
    let propagation = if has("rslave") || has("slave") { Propagation::Slave } else { Propagation::Private };
    let name = name(&source, recursive, read_only, propagation, ids);
    Ok(Volume { name, source, destination, recursive, read_only, propagation, ids })
}

/// A volume's name in the share: equal for equal sources with the same mounts below it. Whether the top may be written
/// makes no difference where the containers' own mounts see to that.
fn name(
    source: &Path,
    recursive: bool,
    read_only: ReadOnly,
    propagation: Propagation,
    ids: IdMapping,
) -> String {
    let mut hash = Fnv::default();
    hash.add(source.as_os_str().as_bytes());
    let kind = [recursive, read_only == ReadOnly::Recursive, propagation == Propagation::Slave].map(u8::from);
    hash.add(&kind);
    match ids {
        IdMapping::Host => {}
        IdMapping::Pod => hash.add(b"ids"),
        IdMapping::PodRecursive => hash.add(b"all ids"),
    }
    if read_only == ReadOnly::TopOfTree {
        hash.add(b"top");
    }
    format!("{:016x}", hash.0)
}

/// FNV-1a: a name has to be the same for every controller, so the standard library's hash, which may change, will not
/// do.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Mounts made in a guest do not exist on the host.
pub(super) fn refuse_shared<T>(what: &str) -> Result<T, Error> {
    unsupported(
        format!("bidirectional mount propagation of {what}"),
        "a mount made in the machine cannot appear on the host; use HostToContainer or None",
    )
}

/// Mounts the pod's own files and shared memory wherever the spec does not mount something itself.
fn add_pod_files(mounts: &mut Vec<Value>, destinations: &[String], read_only_root: bool) {
    let taken = |path: &str| destinations.iter().any(|destination| destination == path);
    let mode = if read_only_root { "ro" } else { "rw" };
    let bind = |destination: &str, source: String, options: &[&str]| {
        let kind = "bind";
        json!({ "destination": destination, "type": kind, "source": source, "options": options })
    };
    for name in POD_FILES {
        let destination = format!("/etc/{name}");
        if !taken(&destination) {
            mounts.push(bind(&destination, format!("{ETC_DIR}/{name}"), &["rbind", "rprivate", mode]));
        }
    }
    let dev_is_a_volume =
        mounts.iter().any(|mount| mount["type"] == "bind" && mount["destination"] == "/dev");
    if !taken(SHM) && !dev_is_a_volume {
        let options = ["rbind", "rprivate", "rw"];
        mounts.push(bind(SHM, SHM_DIR.to_owned(), &options));
    }
}

/// Removes repeated and trailing slashes and `.`, so that destinations can be compared.
fn clean(path: &str) -> String {
    let mut cleaned = String::with_capacity(path.len());
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        cleaned.push('/');
        cleaned.push_str(part);
    }
    match (cleaned.is_empty(), path.starts_with('/')) {
        (true, true) => "/".to_owned(),
        (false, true) => cleaned,
        (_, false) => path.to_owned(),
    }
}
