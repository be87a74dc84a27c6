//! The namespaces of a pod that has a user namespace.
//!
//! What the pod's root may do to a network, a host name or message queues, it may do where the namespace of these was made
//! in its own user namespace. So a helper makes them all, and then makes them into the pod's as one of its containers
//! could. Nobody has to stay there: the namespaces live as long as their mounts.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Child,
};

use nix::{
    mount::MsFlags,
    sched::{CloneFlags, setns, unshare},
    unistd::{Gid, Uid, setfsuid, setgid, setuid},
};
use oci_spec::runtime::{LinuxIdMapping, Spec};
use pericarp_protos::{
    agent::{ConfigureRequest, IdRange, UserNamespace},
    guest::{IPC_NAMESPACE, NETWORK_NAMESPACE, USER_NAMESPACE, UTS_NAMESPACE},
};

use super::{BoxError, pause};
use crate::{boot, network, pod};

/// Those that belong to the user namespace: their files in `/proc/<pid>/ns`, and where they are kept.
const OWNED: [(&str, &str, CloneFlags); 3] = [
    ("net", NETWORK_NAMESPACE, CloneFlags::CLONE_NEWNET),
    ("ipc", IPC_NAMESPACE, CloneFlags::CLONE_NEWIPC),
    ("uts", UTS_NAMESPACE, CloneFlags::CLONE_NEWUTS),
];

/// Makes the pod's namespaces, and enters them to give them the pod's name, network and sysctls.
pub fn make(request: &ConfigureRequest) -> Result<(), BoxError> {
    let user = request.user_namespace.as_ref().ok_or("the pod has no user namespace")?;
    hold(user)?;
    let owned: Vec<_> = OWNED.iter().map(|(_, path, _)| File::open(path)).collect::<io::Result<_>>()?;
    // No threads: a process with more than one enters no user namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(network::move_to(&owned[0], request))?;
    enter_user_namespace()?;
    for (namespace, (_, _, kind)) in owned.iter().zip(OWNED) {
        setns(namespace, kind)?;
    }
    boot::bring_loopback_up()?;
    Ok(runtime.block_on(pod::settle(request))?)
}

/// Makes the namespaces by means of a process in them, and keeps them without it.
fn hold(user: &UserNamespace) -> Result<(), BoxError> {
    let flags = OWNED.iter().fold(CloneFlags::CLONE_NEWUSER, |flags, (_, _, kind)| flags | *kind);
    let mut command = pause::command_to_hold();
    let root = Uid::from_raw(user.uids.outside);
    let enter = move || {
        // To whom the directory of message queues belongs, as with runc.
        setfsuid(root);
        Ok(unshare(flags)?)
    };
    // SAFETY: these are system calls, which allocate nothing and take no lock.
    unsafe { command.pre_exec(enter) };
    let holder = Holder(command.spawn()?);
    let proc = PathBuf::from(format!("/proc/{}", holder.0.id()));
    for (file, range) in [("uid_map", &user.uids), ("gid_map", &user.gids)] {
        let IdRange { inside, outside, length, .. } = &**range;
        fs::write(proc.join(file), format!("{inside} {outside} {length}"))?;
    }
    keep(&proc.join("ns/user"), Path::new(USER_NAMESPACE))?;
    for (file, path, _) in OWNED {
        keep(&proc.join("ns").join(file), Path::new(path))?;
    }
    Ok(())
}

/// A process that ends with this.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended by itself, which is no harm.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Keeps a namespace by mounting it.
pub fn keep(namespace: &Path, path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, "")?;
    Ok(nix::mount::mount(Some(namespace), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Makes this process, which has one thread, the root of the pod's user namespace.
pub fn enter_user_namespace() -> Result<(), BoxError> {
    setns(File::open(USER_NAMESPACE)?, CloneFlags::CLONE_NEWUSER)?;
    setgid(Gid::from_raw(0))?;
    setuid(Uid::from_raw(0))?;
    Ok(())
}

/// What a user of a container is in the guest; `None` for one that the container's user namespace does not have.
pub fn uid(spec: &Spec, uid: u32) -> Option<u32> {
    outside(spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_deref()), uid)
}

/// The same for a group.
pub fn gid(spec: &Spec, gid: u32) -> Option<u32> {
    outside(spec.linux().as_ref().and_then(|linux| linux.gid_mappings().as_deref()), gid)
}

fn outside(mappings: Option<&[LinuxIdMapping]>, id: u32) -> Option<u32> {
    let mappings = mappings.unwrap_or_default();
    if mappings.is_empty() {
        return Some(id);
    }
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_container_are_others_in_the_guest_if_it_has_a_user_namespace() {
        let spec = |linux: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0","linux":{linux}}}"#)).unwrap()
        };
        let plain = spec("{}");
        assert_eq!((uid(&plain, 1000), gid(&plain, 7)), (Some(1000), Some(7)));
        let mapped = spec(
            r#"{"uidMappings":[{"containerID":0,"hostID":65536,"size":1000}],
                "gidMappings":[{"containerID":5,"hostID":131072,"size":10}]}"#,
        );
        assert_eq!(
            (uid(&mapped, 0), uid(&mapped, 999), uid(&mapped, 1000)),
            (Some(65536), Some(66535), None)
        );
        assert_eq!((gid(&mapped, 4), gid(&mapped, 5), gid(&mapped, 15)), (None, Some(131_072), None));
    }
}
