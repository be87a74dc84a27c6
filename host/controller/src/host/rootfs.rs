//! A container's root file system: an overlay or a directory that is mounted on the host, or images that the guest
//! mounts.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};

use thiserror::Error;

use crate::host::{
    mounts::{self, MountError, SetPropagation, descriptor_path},
    user_namespace::UserNamespace,
};

/// Where a container's root file system is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootFs {
    /// It is mounted on the host, for the guest to see through the share.
    Mounted(HostMount),
    /// Its layers are images of file systems, which the guest can have as a disk.
    Images {
        layers: ImageLayers,
        /// A mount of the host's with the same files, where there is one: for a machine that has no room for another
        /// disk.
        mounted: Option<HostMount>,
    },
}

/// A mount that the host makes of files of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMount {
    pub kind: HostMountKind,
    /// Whether the ids in it are those that the pod's user namespace has for the host's. Else they are taken as they
    /// are.
    pub has_mapped_ids: bool,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostMountKind {
    Overlay(Overlay),
    Bind(Bind),
}

/// A directory of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    /// Mounts below the source appear too.
    pub recursive: bool,
    pub read_only: bool,
}

/// The longest value that `fsconfig(2)` takes, without its NUL.
const LONGEST_VALUE: usize = 255;

/// Bytes of the kernel's explanation that are read.
const LOG_LIMIT: usize = 512;

/// Why a root file system cannot be mounted.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// A path that cannot be opened.
    #[error(transparent)]
    Path(#[from] MountError),
    /// Its ids are mapped, and the pod has the host's.
    #[error("its ids are to be mapped, and the pod has no user namespace")]
    NoUserNamespace,
    /// The kernel refused to map the ids of a layer.
    #[error(
        "the ids of {layer_path} cannot be mapped for the pod's user namespace; keep containerd's root on a file \
         system that the kernel can do this for, or remove hostUsers: false from the pod", layer_path = path.display()
    )]
    MapIds {
        /// The layer.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// No thread for it.
    #[error("cannot mount it aside")]
    Aside(#[from] io::Error),
    /// The kernel refused to mount.
    #[error("the kernel refuses the {kind} mount{explanation}")]
    Mount {
        /// "overlay" or "bind".
        kind: &'static str,
        /// What the kernel said about it, or nothing.
        explanation: String,
        #[source]
        source: io::Error,
    },
}

impl RootfsError {
    fn mount<E: Into<io::Error>>(kind: &'static str) -> impl FnOnce(E) -> RootfsError {
        move |source| RootfsError::Mount { kind, explanation: String::new(), source: source.into() }
    }
}

/// A root file system whose layers are images of file systems, as the erofs snapshotter keeps them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageLayers {
    /// The images, topmost first.
    pub images: Vec<PathBuf>,
    /// The snapshot's own `fs`, where the container writes; `None` if it may not.
    pub writable: Option<PathBuf>,
    /// Whether the guest has to map the ids in the images as the pod's user namespace does.
    pub map_ids: bool,
}

/// Makes the mount of a root file system, of a pod with that user namespace if it has one. It is attached nowhere yet.
/// Blocks.
pub fn mount(mount: &HostMount, user_namespace: Option<&UserNamespace>) -> Result<OwnedFd, RootfsError> {
    let mapped_by = match (mount.has_mapped_ids, user_namespace) {
        (false, _) => None,
        (true, Some(namespace)) => Some(&namespace.descriptor),
        (true, None) => return Err(RootfsError::NoUserNamespace),
    };
    match (&mount.kind, mapped_by) {
        (HostMountKind::Overlay(layers), Some(namespace)) => overlay_of_mapped_layers(layers, namespace),
        (HostMountKind::Overlay(layers), None) => overlay(layers),
        (HostMountKind::Bind(directory), mapped_by) => bind(directory, mapped_by),
    }
}

fn bind(directory: &Bind, mapped_by: Option<&OwnedFd>) -> Result<OwnedFd, RootfsError> {
    let source = directory.source.as_path();
    let opened = mounts::open_trusted_place(source).map_err(MountError::new("open", source))?;
    let tree = mounts::clone_tree(opened, directory.recursive).map_err(RootfsError::mount("bind"))?;
    if let Some(namespace) = mapped_by {
        map_ids(source, &tree, namespace)?;
    }
    if directory.read_only {
        mounts::set_read_only(&tree, false).map_err(RootfsError::mount("bind"))?;
    }
    mounts::set_propagation(&tree, SetPropagation::Private).map_err(RootfsError::mount("bind"))?;
    Ok(tree)
}

/// An overlay (Documentation/filesystems/overlayfs.rst).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// Topmost first.
    pub lower: Vec<PathBuf>,
    pub upper: Option<PathBuf>,
    pub work: Option<PathBuf>,
    /// Other `key=value` options.
    pub values: Vec<(String, String)>,
    /// Other options without a value.
    pub flags: Vec<String>,
    pub read_only: bool,
}

fn map_ids(path: &Path, mount: &OwnedFd, user_namespace: &OwnedFd) -> Result<(), RootfsError> {
    mounts::map_ids(mount, user_namespace, false)
        .map_err(|source| RootfsError::MapIds { path: path.to_owned(), source })
}

/// An overlay cannot be mapped itself, but its lower layers can; in the upper one the container writes by its own ids.
///
/// For layers, the kernel takes only mounts that are attached somewhere (until Linux 6.15). Each is put over its own
/// place, where it is found by the overlay's own options.
fn overlay_of_mapped_layers(layers: &Overlay, user_namespace: &OwnedFd) -> Result<OwnedFd, RootfsError> {
    mounts::in_own_mount_namespace(|| {
        for path in &layers.lower {
            let place = mounts::open_trusted_place(path).map_err(MountError::new("open", path))?;
            let layer = mounts::clone_tree(&place, false).map_err(MountError::new("bind", path))?;
            map_ids(path, &layer, user_namespace)?;
            mounts::attach(&layer, &place).map_err(MountError::new("mount", path))?;
        }
        overlay(layers)
    })
}

fn overlay(overlay: &Overlay) -> Result<OwnedFd, RootfsError> {
    match overlay_by_layers(overlay) {
        // Kernels before 6.8 know no lower layers one by one.
        Err(RootfsError::Mount { source, .. })
            if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) =>
        {
            overlay_by_descriptors(overlay)
        }
        other => other,
    }
}

/// One option per layer, so that the number of layers has no limit but the kernel's 500.
fn overlay_by_layers(overlay: &Overlay) -> Result<OwnedFd, RootfsError> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(RootfsError::mount("overlay"))?;
    let fail = |source: Errno| RootfsError::Mount {
        kind: "overlay",
        explanation: explanation(&context),
        source: source.into(),
    };
    let set = |key: &str, path: &Path| {
        // A long path goes in by its descriptor, which has to live until the file system is made.
        if path.as_os_str().len() <= LONGEST_VALUE {
            return fsconfig_set_string(&context, key, path).map(|()| None);
        }
        let place = mounts::open_trusted_place(path)?;
        fsconfig_set_string(&context, key, descriptor_path(&place))?;
        Ok(Some(place))
    };
    let mut places = Vec::new();
    fsconfig_set_string(&context, "source", "overlay").map_err(fail)?;
    for path in &overlay.lower {
        places.extend(set("lowerdir+", path).map_err(fail)?);
    }
    if let Some(path) = &overlay.upper {
        places.extend(set("upperdir", path).map_err(fail)?);
    }
    if let Some(path) = &overlay.work {
        places.extend(set("workdir", path).map_err(fail)?);
    }
    for (key, value) in &overlay.values {
        fsconfig_set_string(&context, key.as_str(), value.as_str()).map_err(fail)?;
    }
    for flag in &overlay.flags {
        fsconfig_set_flag(&context, flag.as_str()).map_err(fail)?;
    }
    fsconfig_create(&context).map_err(fail)?;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, overlay.read_only);
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(fail)
}

/// The classic `mount(2)`, whose options must fit one page. A layer given as `/proc/self/fd/<n>`
/// takes 17 bytes of it, so more than 200 of them fit. It attaches the mount, which is done where nobody sees it: over
/// the topmost layer.
fn overlay_by_descriptors(overlay: &Overlay) -> Result<OwnedFd, RootfsError> {
    let mut places = Vec::new();
    let mut open = |path: &Path| -> Result<String, RootfsError> {
        let place = mounts::open_trusted_place(path).map_err(MountError::new("open", path))?;
        let short = descriptor_path(&place).display().to_string();
        places.push(place);
        Ok(short)
    };
    let lower = overlay.lower.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let mut options = vec![format!("lowerdir={}", lower.join(":"))];
    if let Some(path) = &overlay.upper {
        options.push(format!("upperdir={}", open(path)?));
    }
    if let Some(path) = &overlay.work {
        options.push(format!("workdir={}", open(path)?));
    }
    options.extend(overlay.values.iter().map(|(key, value)| format!("{key}={value}")));
    options.extend(overlay.flags.iter().cloned());
    let mut options = options.join(",").into_bytes();
    options.retain(|byte| *byte != 0);
    // The bytes hold no NUL any more.
    let options = std::ffi::CString::new(options).unwrap_or_default();
    let mut flags = MountFlags::empty();
    flags.set(MountFlags::RDONLY, overlay.read_only);
    let top = overlay.lower.first().ok_or(Errno::INVAL).map_err(RootfsError::mount("overlay"))?;
    let open_top = || mounts::open_trusted_place(top).map_err(MountError::new("open", top));
    mounts::in_own_mount_namespace(|| {
        let at = open_top()?;
        rustix::mount::mount("overlay", descriptor_path(&at), "overlay", flags, options.as_c_str())
            .map_err(RootfsError::mount("overlay"))?;
        mounts::clone_tree(open_top()?, false).map_err(RootfsError::mount("overlay"))
    })
}

/// What the kernel has to say about a failed call on a file system context (`fsopen(2)`).
fn explanation(context: &OwnedFd) -> String {
    let mut buffer = [0; LOG_LIMIT];
    let length = rustix::io::read(context, &mut buffer).unwrap_or(0);
    let text = String::from_utf8_lossy(&buffer[..length.min(LOG_LIMIT)]);
    // A message begins with its level: "e ", "w " or "i ".
    let text = text.trim().trim_start_matches(['e', 'w', 'i']).trim();
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}
