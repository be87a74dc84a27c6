//! The namespaces of a container's spec, and the PID namespace that containers of a pod may share.

use std::{
    future::pending,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use pericarp_protos::guest::PID_NAMESPACE;

use super::container::DIRECTORIES;
use crate::{
    launch::{self, Action, Descriptors, LaunchError, Reaper, Request},
    pod::namespaces,
};

/// The name of a namespace's file in `/proc/<pid>/ns`.
pub fn file_name(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// A spec's namespace of this type; `None` if the container is in the guest's.
pub fn of_type(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}

/// Creates the PID namespace that the pod's containers share, if the spec names it and no container has before.
pub async fn ensure_shared_pid_namespace(reaper: &Reaper, spec: &Spec) -> Result<(), LaunchError> {
    static EXISTS: tokio::sync::Mutex<bool> = tokio::sync::Mutex::const_new(false);
    if !shares_pid_namespace(spec) {
        return Ok(());
    }
    let mut exists = EXISTS.lock().await;
    if !*exists {
        let of_user_namespace = of_type(spec, LinuxNamespaceType::User).is_some();
        let request = Request {
            id: String::new(),
            directory: PathBuf::from(DIRECTORIES),
            action: Action::PidNamespace { of_user_namespace },
        };
        let first = launch::launch(reaper, &request, Descriptors::null()?, pending()).await?;
        namespaces::bind_mount(&PathBuf::from(format!("/proc/{first}/ns/pid")), Path::new(PID_NAMESPACE))?;
        *exists = true;
    }
    Ok(())
}

fn shares_pid_namespace(spec: &Spec) -> bool {
    let path = of_type(spec, LinuxNamespaceType::Pid).and_then(|namespace| namespace.path().as_ref());
    path.is_some_and(|path| path.as_os_str() == PID_NAMESPACE)
}
