//! The guest's mounts.

use std::{
    ffi::CStr,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use pericarp_protos::guest::{CGROUP_PARENT, SHARE_DIR, SHARE_TAG};
use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};

use super::{AGENT_PATH, BootError};
use crate::resources;

/// Where the new root is assembled, in the initial ramfs.
const NEW_ROOT: &str = "/newroot";

/// Moves from the initial ramfs to a tmpfs. Every container needs `pivot_root`, which the kernel refuses in a mount
/// namespace whose root is the initial ramfs (kernel: `fs/namespace.c`).
///
/// The agent's binary is bind-mounted read-only into the new root. The processes that create containers run it, and a
/// container that finds it in `/proc/<pid>/exe` must not be able to change it.
pub fn move_to_new_root() -> Result<(), BootError> {
    let step = |what: &str| BootError::new(format!("move to the new root: {what}"));
    fs::create_dir(NEW_ROOT).map_err(step("create it"))?;
    mount_at("tmpfs", NEW_ROOT, "tmpfs", MountFlags::empty(), Some(c"mode=0755"))?;
    let binary = PathBuf::from(format!("{NEW_ROOT}{AGENT_PATH}"));
    fs::write(&binary, "").map_err(step("create the agent's mount point"))?;
    bind("/init", &binary).map_err(step("mount the agent"))?;
    for directory in ["proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir(Path::new(NEW_ROOT).join(directory)).map_err(step(directory))?;
    }
    std::env::set_current_dir(NEW_ROOT).map_err(step("enter it"))?;
    mount_move(".", "/").map_err(|errno| step("move it")(errno.into()))?;
    rustix::process::chroot(".").map_err(|errno| step("chroot")(errno.into()))?;
    std::env::set_current_dir("/").map_err(step("enter it"))
}

fn bind(source: &str, target: &Path) -> io::Result<()> {
    mount_bind(source, target)?;
    mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "")?;
    Ok(())
}

/// Mounts the kernel's file systems.
pub fn mount_file_systems() -> Result<(), BootError> {
    let kernel_only = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let devices = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("proc", "/proc", "proc", kernel_only, None)?;
    mount_at("sysfs", "/sys", "sysfs", kernel_only, None)?;
    mount_at("devtmpfs", "/dev", "devtmpfs", devices, Some(c"mode=0755"))?;
    for directory in ["/dev/pts", "/dev/mqueue", "/dev/shm"] {
        fs::create_dir(directory).map_err(BootError::new(format!("create {directory}")))?;
    }
    mount_at("devpts", "/dev/pts", "devpts", devices, Some(c"ptmxmode=0666,mode=0620,gid=5"))?;
    mount_at("mqueue", "/dev/mqueue", "mqueue", kernel_only, None)?;
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        symlink(target, link).map_err(BootError::new(format!("create {link}")))?;
    }
    mount_at("cgroup2", resources::ROOT, "cgroup2", kernel_only, Some(c"nsdelegate,memory_recursiveprot"))?;
    resources::delegate(CGROUP_PARENT).map_err(BootError::new("set cgroups up"))
}

/// Mounts the pod's share. This waits for the device's first answer, so it must not delay the pod's start.
pub fn mount_share() -> Result<(), BootError> {
    fs::create_dir_all(SHARE_DIR).map_err(BootError::new(format!("create {SHARE_DIR}")))?;
    mount_at(SHARE_TAG, SHARE_DIR, "virtiofs", MountFlags::empty(), None)
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: Option<&CStr>,
) -> Result<(), BootError> {
    mount(source, target, kind, flags, options)
        .map_err(|errno| BootError::new(format!("mount {kind} on {target}"))(errno.into()))
}
