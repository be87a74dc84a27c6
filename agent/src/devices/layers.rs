//! A container's root file system, put together in the guest from image layers on disks.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use rustix::{
    fs::CWD,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string,
        fsmount, fsopen, move_mount,
    },
};

use super::{DeviceError, Undo};

/// Where each container with layers has a directory, in the guest's memory: the share is read-only.
const DIRECTORIES: &str = "/run/pericarp/roots";
const IMAGE: &str = "erofs";

/// Where a container writes, if it may.
pub struct Writable<'a> {
    pub upper: &'a str,
    pub work: &'a str,
}

/// Mounts the layers (nodes of block devices, topmost first) and an overlay of them; answers with its path.
pub fn mount_root(
    number: u64,
    layers: &[PathBuf],
    writable: Option<&Writable<'_>>,
    undo: &mut Vec<Undo>,
) -> Result<PathBuf, DeviceError> {
    let directory = Path::new(DIRECTORIES).join(number.to_string());
    let root = make_directory(directory.join("root"))?;
    undo.push(Undo::Remove(directory.clone()));
    let mut lower = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        // An overlay of a single layer that cannot be written to would be the layer itself.
        let alone = layers.len() == 1 && writable.is_none();
        let target = if alone { root.clone() } else { make_directory(directory.join(index.to_string()))? };
        mount_image(layer, &target)?;
        undo.push(Undo::Unmount(target.clone()));
        if alone {
            return Ok(root);
        }
        lower.push(target);
    }
    mount_overlay(&lower, writable, &root).map_err(|source| DeviceError::Overlay { source })?;
    undo.push(Undo::Unmount(root.clone()));
    Ok(root)
}

fn make_directory(path: PathBuf) -> Result<PathBuf, DeviceError> {
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(DeviceError::Directory { path, source }),
    }
}

fn mount_image(layer: &Path, target: &Path) -> Result<(), DeviceError> {
    // An image has no business with device nodes of its own; a container's are made by the runtime.
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    mount(Some(layer), target, Some(IMAGE), flags, None::<&str>)
        .map_err(|errno| DeviceError::Image { layer: layer.to_owned(), source: errno.into() })
}

/// By the calls that take each layer by itself: one string with all of them has a limit of a page.
fn mount_overlay(lower: &[PathBuf], writable: Option<&Writable<'_>>, root: &Path) -> io::Result<()> {
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
