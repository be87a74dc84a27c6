//! A container's root file system, which the guest mounts from image layers on disks.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_string, fsmount, fsopen, mount, move_mount,
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

/// Mounts the layers (nodes of block devices, topmost first) and an overlay of them, and returns the overlay's path.
/// `number` must be different for each container.
pub fn mount_root(
    number: u64,
    layers: &[PathBuf],
    writable: Option<&WritableLayer<'_>>,
    undo: &mut Vec<UndoStep>,
) -> Result<PathBuf, DeviceError> {
    let directory = Path::new(ROOTS_DIR).join(number.to_string());
    let root = make_directory(directory.join("root"))?;
    undo.push(UndoStep::RemoveDirectory(directory.clone()));
    let mut lower = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        // A single layer that cannot be written to needs no overlay.
        let is_only_layer = layers.len() == 1 && writable.is_none();
        let target =
            if is_only_layer { root.clone() } else { make_directory(directory.join(index.to_string()))? };
        mount_layer(layer, &target)?;
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

fn mount_layer(layer: &Path, target: &Path) -> Result<(), DeviceError> {
    // Device nodes of an image are ignored; the runtime creates those that a container needs.
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(layer, target, LAYER_FS, flags, None)
        .map_err(|errno| DeviceError::Image { layer: layer.to_owned(), source: errno.into() })
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
