//! A container's root file system, which the guest mounts from image layers on disks.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

use super::{DeviceError, UndoStep};

/// Where each container with layers has a directory. It is in the guest's memory, because the share is read-only.
const ROOTS_DIR: &str = "/run/pericarp/roots";

/// The file system of image layers.
const LAYER_FS: &str = "erofs";

/// The directories of an overlay that can be written to (kernel: `Documentation/filesystems/overlayfs.rst`).
pub struct WritableLayer<'a> {
    /// Where the container's changes are stored.
    pub upper: &'a str,
    /// The overlay's own work directory, on the same file system.
    pub work: &'a str,
}

/// The image layers of a container.
pub struct Lower<'a> {
    /// Nodes of block devices, topmost first.
    pub layers: &'a [PathBuf],
    /// The user namespace that maps the ids in the images, if they are mapped.
    pub user_namespace: Option<&'a File>,
}

/// Mounts the layers and an overlay of them, and returns the overlay's path. `number` must be different for each
/// container.
pub fn mount_root(
    number: u64,
    lower: &Lower<'_>,
    writable: Option<&WritableLayer<'_>>,
    undo: &mut Vec<UndoStep>,
) -> Result<PathBuf, DeviceError> {
    let directory = Path::new(ROOTS_DIR).join(number.to_string());
    let root = make_directory(directory.join("root"))?;
    undo.push(UndoStep::RemoveDirectory(directory.clone()));
    let Lower { layers, user_namespace } = *lower;
    let mut lower = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        // A single layer that cannot be written to needs no overlay.
        let is_only_layer = layers.len() == 1 && writable.is_none();
        let target =
            if is_only_layer { root.clone() } else { make_directory(directory.join(index.to_string()))? };
        mount_layer(layer, user_namespace, &target)
            .map_err(|source| DeviceError::Image { layer: layer.clone(), source })?;
        undo.push(UndoStep::Unmount(target.clone()));
        if is_only_layer {
            return Ok(root);
        }
        lower.push(target);
    }
    mount_overlay(&lower, writable, &root).map_err(|source| DeviceError::Overlay { source })?;
    undo.push(UndoStep::Unmount(root.clone()));
    Ok(root)
}

fn make_directory(path: PathBuf) -> Result<PathBuf, DeviceError> {
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(DeviceError::Directory { path, source }),
    }
}

fn mount_layer(layer: &Path, user_namespace: Option<&File>, target: &Path) -> io::Result<()> {
    let image = fsopen(LAYER_FS, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&image, "source", layer)?;
    fsconfig_set_flag(&image, "ro")?;
    fsconfig_create(&image)?;
    // Device nodes of an image are ignored; the runtime creates those that a container needs.
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mounted = fsmount(&image, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    if let Some(user_namespace) = user_namespace {
        map_ids(&mounted, user_namespace)?;
    }
    Ok(move_mount(&mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Has a detached mount show its files' ids as a user namespace has them outside: `mount_setattr(2)`, for which rustix
/// has no function yet.
fn map_ids(mount: &OwnedFd, user_namespace: &File) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the path is an empty C string, the attributes live for the call and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts the overlay by the system calls that take each layer by itself, because mount(2) limits the string with all
/// of them to a page.
fn mount_overlay(lower: &[PathBuf], writable: Option<&WritableLayer<'_>>, root: &Path) -> io::Result<()> {
    let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&overlay, "source", "overlay")?;
    for layer in lower {
        fsconfig_set_string(&overlay, "lowerdir+", layer)?;
    }
    let mut attributes = MountAttrFlags::empty();
    match writable {
        Some(writable) => {
            fsconfig_set_string(&overlay, "upperdir", writable.upper)?;
            fsconfig_set_string(&overlay, "workdir", writable.work)?;
        }
        None => attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY,
    }
    fsconfig_create(&overlay)?;
    let mounted = fsmount(&overlay, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(&mounted, "", CWD, root, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}
