//! The namespaces of a pod that has a user namespace.
//!
//! The pod's root may change a network, a host name or message queues only if their namespace was created in the pod's
//! user namespace. So a helper process creates all of these namespaces, enters them, and configures them with the
//! rights that a container's root has. The namespaces exist as long as their mounts, so no process has to stay in them.

use std::{
    fs::{self, File},
    io,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Child,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::{Uid, setfsuid},
};
use pericarp_protos::{
    agent::{ConfigureRequest, IdRange, UserNamespace},
    guest::{IPC_NAMESPACE, NETWORK_NAMESPACE, USER_NAMESPACE, UTS_NAMESPACE},
};

use super::{configuration, network};
use crate::{
    init,
    launch::{BoxError, pause, user_namespace},
};

/// The namespaces that belong to the user namespace: their files in `/proc/<pid>/ns`, and where they are mounted.
const OWNED_NAMESPACES: [(&str, &str, CloneFlags); 3] = [
    ("net", NETWORK_NAMESPACE, CloneFlags::CLONE_NEWNET),
    ("ipc", IPC_NAMESPACE, CloneFlags::CLONE_NEWIPC),
    ("uts", UTS_NAMESPACE, CloneFlags::CLONE_NEWUTS),
];

/// Creates the pod's namespaces, enters them, and gives them the pod's host name, network and sysctls. This must run in
/// a helper process, that of the launch of this name.
pub fn create(launch: &str, request: &ConfigureRequest) -> Result<(), BoxError> {
    let user = request.user_namespace.as_ref().ok_or("the pod has no user namespace")?;
    create_and_mount(launch, user)?;
    let owned: Vec<_> =
        OWNED_NAMESPACES.iter().map(|(_, path, _)| File::open(path)).collect::<io::Result<_>>()?;
    // The runtime must not start threads: a process that has several cannot enter a user namespace.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(network::move_to(&owned[0], request))?;
    user_namespace::enter()?;
    for (namespace, (_, _, kind)) in owned.iter().zip(OWNED_NAMESPACES) {
        setns(namespace, kind)?;
    }
    init::bring_loopback_up()?;
    Ok(runtime.block_on(configuration::configure_namespaces(request))?)
}

/// Creates the namespaces with a process in them, and mounts them, so that they stay when that process ends.
fn create_and_mount(launch: &str, user: &UserNamespace) -> Result<(), BoxError> {
    let flags = OWNED_NAMESPACES.iter().fold(CloneFlags::CLONE_NEWUSER, |flags, (_, _, kind)| flags | *kind);
    let mut command = pause::hold_command(launch);
    let root = Uid::from_raw(user.uids.outside);
    let enter = move || {
        // The directory of message queues belongs to this user, as with runc.
        setfsuid(root);
        Ok(unshare(flags)?)
    };
    // SAFETY: the closure only makes system calls. It does not allocate memory or take a lock.
    unsafe { command.pre_exec(enter) };
    let holder = NamespaceHolder(command.spawn()?);
    let proc = PathBuf::from(format!("/proc/{}", holder.0.id()));
    for (file, range) in [("uid_map", &user.uids), ("gid_map", &user.gids)] {
        let IdRange { inside, outside, length, .. } = &**range;
        fs::write(proc.join(file), format!("{inside} {outside} {length}"))?;
    }
    bind_mount(&proc.join("ns/user"), Path::new(USER_NAMESPACE))?;
    for (file, path, _) in OWNED_NAMESPACES {
        bind_mount(&proc.join("ns").join(file), Path::new(path))?;
    }
    Ok(())
}

/// A process that holds namespaces, and is killed when this is dropped.
struct NamespaceHolder(Child);

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        // These fail if the process has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bind-mounts a namespace at `path`, so that it exists as long as the mount.
pub fn bind_mount(namespace: &Path, path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, "")?;
    Ok(rustix::mount::mount_bind(namespace, path)?)
}
