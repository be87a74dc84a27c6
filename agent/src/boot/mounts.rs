//! The guest's mounts.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use pericarp_protos::guest::{CGROUP_PARENT, SHARE_DIR, SHARE_TAG};

use super::BootError;
use crate::{cgroup, runtime::AGENT_PATH};

/// Where the new root is put together, in the initial ramfs.
const NEW_ROOT: &str = "/newroot";

/// Leaves the initial ramfs for a tmpfs: `pivot_root`, which every container needs, is refused in
/// a mount namespace whose root is the initial ramfs (kernel: `fs/namespace.c`).
///
/// The agent's binary goes along as a read-only bind mount. Containers are made by processes that
/// run it, and one of them that finds it in `/proc/<pid>/exe` must not be able to change it.
pub fn move_to_new_root() -> Result<(), BootError> {
    let step = |what: &str| BootError::new(format!("move to the new root: {what}"));
    fs::create_dir(NEW_ROOT).map_err(step("create it"))?;
    attach("tmpfs", NEW_ROOT, "tmpfs", MsFlags::empty(), Some("mode=0755"))?;
    let binary = PathBuf::from(format!("{NEW_ROOT}{AGENT_PATH}"));
    fs::write(&binary, "").map_err(step("make a place for the agent"))?;
    bind("/init", &binary).map_err(step("bring the agent along"))?;
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir(Path::new(NEW_ROOT).join(directory)).map_err(step(directory))?;
    }
    std::env::set_current_dir(NEW_ROOT).map_err(step("enter it"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|errno| step("move it")(errno.into()))?;
    nix::unistd::chroot(".").map_err(|errno| step("chroot")(errno.into()))?;
    std::env::set_current_dir("/").map_err(step("enter it"))
}

fn bind(source: &str, target: &Path) -> io::Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, read_only, None::<&str>)?;
    Ok(())
}

/// Mounts the kernel's file systems.
pub fn mount_file_systems() -> Result<(), BootError> {
    let kernel_only = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let devices = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    attach("proc", "/proc", "proc", kernel_only, None)?;
    attach("sysfs", "/sys", "sysfs", kernel_only, None)?;
    attach("devtmpfs", "/dev", "devtmpfs", devices, Some("mode=0755"))?;
    for directory in ["/dev/pts", "/dev/mqueue", "/dev/shm"] {
        fs::create_dir(directory).map_err(BootError::new(format!("create {directory}")))?;
    }
    attach("devpts", "/dev/pts", "devpts", devices, Some("ptmxmode=0666,mode=0620,gid=5"))?;
    attach("mqueue", "/dev/mqueue", "mqueue", kernel_only, None)?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).map_err(BootError::new(format!("create {link}")))?;
    }
    attach("cgroup2", cgroup::ROOT, "cgroup2", kernel_only, Some("nsdelegate,memory_recursiveprot"))?;
    cgroup::delegate(CGROUP_PARENT).map_err(BootError::new("set cgroups up"))
}

/// Mounts the pod's share. Waits for the device's first answer, so it is called where nobody waits.
pub fn mount_share() -> Result<(), BootError> {
    fs::create_dir_all(SHARE_DIR).map_err(BootError::new(format!("create {SHARE_DIR}")))?;
    attach(SHARE_TAG, SHARE_DIR, "virtiofs", MsFlags::empty(), None)
}

fn attach(
    source: &str,
    target: &str,
    kind: &str,
    flags: MsFlags,
    options: Option<&str>,
) -> Result<(), BootError> {
    mount(Some(source), target, Some(kind), flags, options)
        .map_err(|errno| BootError::new(format!("mount {kind} on {target}"))(errno.into()))
}
