//! Mounts on the host, below the pods' shares, by system call.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
        UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_bind,
        mount_change, move_mount, open_tree, unmount,
    },
};
use thiserror::Error;

/// One entry of what containerd's snapshotter answers (`containerd.types.Mount`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub kind: String,
    pub source: String,
    pub options: Vec<String>,
}

/// A root filesystem or a volume cannot be mounted.
#[derive(Debug, Error)]
pub enum MountError {
    #[error(
        "cannot serve a root filesystem of type {kind:?}; use a snapshotter that gives overlay or bind mounts, such as overlayfs"
    )]
    Kind { kind: String },
    #[error("cannot serve a root filesystem made of {count} mounts; one is supported")]
    Count { count: usize },
    #[error("mount option {option:?} of a root filesystem cannot be used")]
    Option { option: String },
    #[error("cannot mount {what} on {target}")]
    Mount {
        what: String,
        target: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Mounts a root filesystem on `target`, a directory of ours.
pub fn mount_rootfs(mounts: &[Mount], target: &Path) -> Result<(), MountError> {
    let [mount] = mounts else { return Err(MountError::Count { count: mounts.len() }) };
    let failed = |source| MountError::Mount {
        what: format!("the {} root filesystem", mount.kind),
        target: target.into(),
        source,
    };
    match mount.kind.as_str() {
        "overlay" => overlay(&mount.options, target).map_err(|error| match error {
            OverlayError::Option(option) => MountError::Option { option },
            OverlayError::System(source) => failed(source),
        }),
        "bind" | "rbind" => {
            let read_only = mount.options.iter().any(|option| option == "ro");
            let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
            bind(Path::new(&mount.source), target, true, access, false).map_err(failed)
        }
        kind => Err(MountError::Kind { kind: kind.into() }),
    }
}

enum OverlayError {
    Option(String),
    System(io::Error),
}

/// Mounts an overlay. The options go in one by one, so that an image with many layers is not limited
/// by the one page that `mount(2)` takes.
fn overlay(options: &[String], target: &Path) -> Result<(), OverlayError> {
    let system = |errno: rustix::io::Errno| OverlayError::System(errno.into());
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(system)?;
    let mut attributes = MountAttrFlags::empty();
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", layers)) => lower_layers(&context, layers)?,
            Some((key, value)) => fsconfig_set_string(&context, key, value).map_err(system)?,
            None => match option.as_str() {
                "ro" => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY,
                "rw" => {}
                flag @ ("userxattr" | "volatile") => fsconfig_set_flag(&context, flag).map_err(system)?,
                other => return Err(OverlayError::Option(other.into())),
            },
        }
    }
    fsconfig_create(&context).map_err(system)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(system)?;
    move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(system)
}

/// Long lists of layers go in one at a time where the kernel (6.7 and later) can, as one string
/// otherwise.
fn lower_layers(context: impl std::os::fd::AsFd, layers: &str) -> Result<(), OverlayError> {
    /// Most that one string parameter of the new mount API holds.
    const STRING_MAX: usize = 255;
    if layers.len() <= STRING_MAX {
        return fsconfig_set_string(&context, "lowerdir", layers)
            .map_err(|errno| OverlayError::System(errno.into()));
    }
    for layer in layers.split(':') {
        fsconfig_set_string(&context, "lowerdir+", layer)
            .map_err(|errno| OverlayError::System(errno.into()))?;
    }
    Ok(())
}

/// What may be done through a bind mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    /// The mount itself is read-only; mounts below it keep their own setting.
    ReadOnly,
    /// All mounts below it are read-only too.
    RecursiveReadOnly,
}

/// Binds `source` on `target`. Nothing that is mounted below it later spreads to the host; what the host
/// mounts below `source` later appears only if the mount is a slave.
pub fn bind(source: &Path, target: &Path, recursive: bool, access: Access, slave: bool) -> io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    // Changed while it is in no tree yet: nobody ever sees it with more rights.
    let tree = open_tree(CWD, source, flags)?;
    let mut attributes =
        libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    if slave {
        attributes.propagation = libc::MS_SLAVE;
    }
    set_attributes(&tree, &attributes, true)?;
    if access != Access::ReadWrite {
        attributes.attr_set = libc::MOUNT_ATTR_RDONLY;
        set_attributes(&tree, &attributes, access == Access::RecursiveReadOnly)?;
    }
    Ok(move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// `mount_setattr(2)` on a mount that a descriptor stands for.
fn set_attributes(mount: &OwnedFd, attributes: &libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the attributes live for the call and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes `directory` a mount of its own whose mounts stay where they are made.
pub fn make_private(directory: &Path) -> io::Result<()> {
    mount_bind(directory, directory)?;
    mount_change(directory, MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    Ok(())
}

/// Unmounts everything on and below `directory`, the last mounted first. A mount that is still in use
/// is detached: it disappears from the tree now and ends with its last user.
pub fn unmount_tree(directory: &Path) -> io::Result<()> {
    // More rounds than one only for mounts that others make below meanwhile.
    const ROUNDS: usize = 3;
    for _ in 0..ROUNDS {
        let mounts = mounts_below(directory)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts.iter().rev() {
            match unmount(mount, UnmountFlags::NOFOLLOW) {
                // INVAL: it went with another that was detached.
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(_) => unmount(mount, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?,
            }
        }
    }
    match mounts_below(directory)?.first() {
        None => Ok(()),
        Some(left) => {
            Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is still mounted", left.display())))
        }
    }
}

/// Removes `directory` and all in it, but only if nothing is mounted there: a mount's contents belong
/// to somebody else.
pub fn remove_tree(directory: &Path) -> io::Result<()> {
    if let Some(mount) = mounts_below(directory)?.first() {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("{} is mounted", mount.display())));
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Mount points on and below a directory, in the order in which they were made.
fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    use std::io::BufRead as _;
    let mut mounts = Vec::new();
    for line in io::BufReader::new(File::open("/proc/self/mountinfo")?).lines() {
        let line = line?;
        // Field 5 (proc_pid_mountinfo(5)). Blanks in it are escaped; no path of ours has any.
        if let Some(point) = line.split(' ').nth(4)
            && Path::new(point).starts_with(directory)
        {
            mounts.push(PathBuf::from(point));
        }
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_filesystem_of_another_type_is_refused_by_name() {
        let mount = Mount { kind: "erofs".into(), source: "/x".into(), options: Vec::new() };
        let error = mount_rootfs(&[mount], Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("erofs"), "{error}");
    }

    #[test]
    fn a_root_filesystem_of_several_mounts_is_refused() {
        let mount = Mount { kind: "overlay".into(), source: "overlay".into(), options: Vec::new() };
        let error = mount_rootfs(&[mount.clone(), mount], Path::new("/nowhere")).unwrap_err();
        assert!(matches!(error, MountError::Count { count: 2 }));
    }
}
