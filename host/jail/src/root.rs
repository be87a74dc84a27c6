//! The root of a machine: an empty file system with one directory, the share, in a mount namespace of its own.
//!
//! The process calls [`enter`] itself when it has opened all that it needs, because what executes a program needs the
//! host's files: its libraries and their loader. Mounts are put into the share from outside, by whoever may enter the
//! namespace. The kernel takes all of them away with the process.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{CWD, Mode, mkdirat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change,
        mount_remount, move_mount, open_tree, unmount,
    },
    process::{chdir, fchdir, pivot_root},
    thread::{UnshareFlags, unshare_unsafe},
};

/// The share's place in the machine's mount namespace. Only whoever enters the namespace can write into it, and not
/// through this path: it is mounted read-only.
pub const SHARE: &str = "/share";

/// A directory that every host has. The new root is put over it until it is the root.
const PLACE: &CStr = c"/proc";

/// The most directories and files that the share can have: a few for each container and each volume.
const SHARE_FILES: &str = "65536";
/// Bytes that the share itself can have. Its files are empty places of mounts.
const SHARE_SIZE: &str = "1m";
/// The root has the share's directory and nothing else.
const ROOT_FILES: &str = "4";
const ROOT_SIZE: &str = "4k";

/// Gives this process an empty root in a mount namespace of its own. It must have no other threads, which would stay
/// outside, and needs `CAP_SYS_ADMIN` in its user namespace.
///
/// Returns the directory `/proc/self/fd`, which has no name inside. Nothing else of the host's can be reached from it.
///
/// # Errors
///
/// What the kernel has refused. The process may then be in a half-made root, and should end.
pub fn enter() -> io::Result<File> {
    // A copy of the mount, of which that directory is the root: there is no way up from it.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let descriptors = open_tree(CWD, c"/proc/self/fd", flags)?;
    // SAFETY: the memory and the descriptors of this process, and all else except its mounts, stay as they are.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Not private: what the host unmounts in the meantime must not be kept by this copy. What is mounted from here on
    // propagates to nobody, and is nobody's copy.
    mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
    let root = tmpfs(ROOT_SIZE, ROOT_FILES, MountAttrFlags::empty())?;
    let share = tmpfs(SHARE_SIZE, SHARE_FILES, MountAttrFlags::MOUNT_ATTR_RDONLY)?;
    move_mount(&root, c"", CWD, PLACE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let share_name = SHARE.trim_start_matches('/');
    mkdirat(&root, share_name, Mode::from_raw_mode(0o755))?;
    move_mount(&share, c"", &root, share_name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&root)?;
    // The old root lies over the new one then, from which it is unmounted.
    pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    chdir(c"/")?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount(c"/", flags | MountFlags::NOEXEC, c"")?;
    Ok(descriptors.into())
}

/// A new, empty file system in memory, attached nowhere.
fn tmpfs(size: &str, files: &str, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("source", "pericarp"), ("mode", "755"), ("size", size), ("nr_inodes", files)] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = attributes
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
