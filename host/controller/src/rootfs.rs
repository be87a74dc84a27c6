//! A container's root file system, from the mounts that containerd's snapshotter answers.

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

use crate::{
    mounts::{self, MountError, SetPropagation, descriptor_path},
    user_namespace::UserNamespace,
};

/// One entry of what containerd's snapshotter answers (`containerd.types.Mount`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// File system type; "bind" for a bind mount.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// As in fstab(5).
    pub options: Vec<String>,
}

/// Options by which a snapshotter wants ids to be mapped (containerd: `core/mount`, `parseMountOptions`).
const UID_MAP: &str = "uidmap=";
const GID_MAP: &str = "gidmap=";

/// The longest value that `fsconfig(2)` takes, without its NUL.
const LONGEST_VALUE: usize = 255;

/// Bytes of the kernel's explanation that are read.
const LOG_LIMIT: usize = 512;

/// Why a root file system cannot be mounted.
#[derive(Debug, Error)]
pub enum RootfsError {
    /// Not one overlay or bind mount.
    #[error(
        "the snapshotter {snapshotter:?} answers with {kinds}, and only a single overlay or bind mount can be \
             served to a guest; use the overlayfs or native snapshotter for this runtime"
    )]
    Unsupported {
        /// The snapshotter.
        snapshotter: String,
        /// What it answered, for example "a mount of type erofs".
        kinds: String,
    },
    /// A path that cannot be opened.
    #[error(transparent)]
    Path(#[from] MountError),
    /// Its ids are to be mapped, but not as the pod's are.
    #[error(
        "the snapshotter {snapshotter:?} wants ids mapped by {mapping:?}, which is not how the pod's user namespace \
         maps them"
    )]
    Mapping {
        /// The snapshotter.
        snapshotter: String,
        /// The options.
        mapping: String,
    },
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
}

impl ImageLayers {
    /// The file beside a layer's mount point (containerd: `plugins/snapshots/erofs`, `layerBlobPath`).
    const IMAGE: &'static str = "layer.erofs";

    /// Recognizes an overlay all of whose layers are images, by the files: containerd's erofs snapshotter mounts each
    /// and answers with an overlay of the mounts. `None` for anything else, which is then mounted as it is.
    pub fn of(mounts: &[Mount]) -> Option<ImageLayers> {
        let [mount] = mounts else { return None };
        if mount.kind != "overlay" {
            return None;
        }
        let overlay = Overlay::parse(&mount.options);
        let image = |layer: &PathBuf| Some(layer.parent()?.join(Self::IMAGE)).filter(|image| image.is_file());
        let images = overlay.lower.iter().map(image).collect::<Option<Vec<_>>>()?;
        let writable = match (&overlay.upper, &overlay.work) {
            (None, None) => None,
            (Some(upper), Some(work)) if upper.ends_with("fs") && work.ends_with("work") => {
                Some((upper.parent() == work.parent()).then(|| upper.clone())?)
            }
            _ => return None,
        };
        (!images.is_empty()).then_some(ImageLayers { images, writable })
    }
}

/// Mounts a root file system at a place, of a pod with that user namespace if it has one.
pub fn mount(
    at: &OwnedFd,
    snapshotter: &str,
    mounts: &[Mount],
    user_namespace: Option<&UserNamespace>,
) -> Result<(), RootfsError> {
    match mounts {
        [mount] if mount.kind == "overlay" => match mapping(snapshotter, mount, user_namespace)? {
            Some(namespace) => overlay_of_mapped_layers(at, &mount.options, namespace),
            None => overlay(at, &Overlay::parse(&mount.options)),
        },
        [mount] if is_bind(mount) => bind(at, mount, mapping(snapshotter, mount, user_namespace)?),
        _ => Err(RootfsError::Unsupported { snapshotter: snapshotter.to_owned(), kinds: describe(mounts) }),
    }
}

fn describe(mounts: &[Mount]) -> String {
    match mounts {
        [] => "no mount".to_owned(),
        [mount] => format!("a mount of type {:?}", mount.kind),
        _ => {
            let kinds: Vec<_> = mounts.iter().map(|mount| mount.kind.as_str()).collect();
            format!("{} mounts of types {}", mounts.len(), kinds.join(", "))
        }
    }
}

fn is_bind(mount: &Mount) -> bool {
    matches!(mount.kind.as_str(), "bind" | "rbind")
}

/// The user namespace by which a mount's ids are to be mapped. A snapshotter that cannot have that done has changed its
/// files' ids already.
fn mapping<'a>(
    snapshotter: &str,
    mount: &Mount,
    user_namespace: Option<&'a UserNamespace>,
) -> Result<Option<&'a OwnedFd>, RootfsError> {
    let value = |key| mount.options.iter().find_map(|option| option.strip_prefix(key));
    let (uids, gids) = match (value(UID_MAP), value(GID_MAP)) {
        (None, None) => return Ok(None),
        (uids, gids) => (uids.unwrap_or_default(), gids.unwrap_or_default()),
    };
    match user_namespace {
        Some(namespace)
            if uids.parse() == Ok(namespace.map.uids) && gids.parse() == Ok(namespace.map.gids) =>
        {
            Ok(Some(&namespace.descriptor))
        }
        _ => Err(RootfsError::Mapping {
            snapshotter: snapshotter.to_owned(),
            mapping: format!("{UID_MAP}{uids},{GID_MAP}{gids}"),
        }),
    }
}

fn bind(at: &OwnedFd, mount: &Mount, user_namespace: Option<&OwnedFd>) -> Result<(), RootfsError> {
    let source = Path::new(&mount.source);
    let has = |name: &str| mount.options.iter().any(|option| option == name);
    let place = mounts::open_trusted_place(source).map_err(MountError::new("open", source))?;
    let recursive = mount.kind == "rbind" || has("rbind");
    let tree = mounts::clone_tree(place, recursive).map_err(RootfsError::mount("bind"))?;
    if let Some(namespace) = user_namespace {
        map_ids(source, &tree, namespace)?;
    }
    if has("ro") {
        mounts::set_read_only(&tree, false).map_err(RootfsError::mount("bind"))?;
    }
    mounts::set_propagation(&tree, SetPropagation::Private).map_err(RootfsError::mount("bind"))?;
    mounts::attach(&tree, at).map_err(RootfsError::mount("bind"))
}

/// An overlay's options, taken apart.
#[derive(Debug, Default, PartialEq, Eq)]
struct Overlay {
    lower: Vec<PathBuf>,
    upper: Option<PathBuf>,
    work: Option<PathBuf>,
    /// Other `key=value` options.
    values: Vec<(String, String)>,
    /// Other options without a value.
    flags: Vec<String>,
    read_only: bool,
}

impl Overlay {
    fn parse(options: &[String]) -> Overlay {
        let mut overlay = Overlay::default();
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", value)) => overlay.lower = split_lower(value),
                Some(("upperdir", value)) => overlay.upper = Some(value.into()),
                Some(("workdir", value)) => overlay.work = Some(value.into()),
                // No options of the kernel's.
                _ if option.starts_with(UID_MAP) || option.starts_with(GID_MAP) => {}
                Some((key, value)) => overlay.values.push((key.to_owned(), value.to_owned())),
                None if option == "ro" => overlay.read_only = true,
                None if matches!(option.as_str(), "rw" | "") => {}
                None => overlay.flags.push(option.clone()),
            }
        }
        overlay
    }
}

/// Splits `a:b:c`, where `\` escapes a colon in a path (Documentation/filesystems/overlayfs.rst).
fn split_lower(value: &str) -> Vec<PathBuf> {
    let mut paths = vec![String::new()];
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match (character, paths.last_mut()) {
            (':', _) => paths.push(String::new()),
            ('\\', Some(path)) => path.extend(characters.next()),
            (_, Some(path)) => path.push(character),
            (_, None) => {}
        }
    }
    paths.into_iter().filter(|path| !path.is_empty()).map(PathBuf::from).collect()
}

fn map_ids(path: &Path, mount: &OwnedFd, user_namespace: &OwnedFd) -> Result<(), RootfsError> {
    mounts::map_ids(mount, user_namespace, false)
        .map_err(|source| RootfsError::MapIds { path: path.to_owned(), source })
}

/// An overlay cannot be mapped itself, but its lower layers can; in the upper one the container writes by its own ids.
///
/// For layers, the kernel takes only mounts that are attached somewhere (until Linux 6.15). Each is put over its own
/// place, where it is found by the overlay's own options.
fn overlay_of_mapped_layers(
    at: &OwnedFd,
    options: &[String],
    user_namespace: &OwnedFd,
) -> Result<(), RootfsError> {
    let parsed = Overlay::parse(options);
    let Some(top) = parsed.lower.first() else { return overlay(at, &parsed) };
    let open = |path: &Path| mounts::open_trusted_place(path).map_err(MountError::new("open", path));
    let mount = mounts::aside(|| -> Result<OwnedFd, RootfsError> {
        for path in &parsed.lower {
            let place = open(path)?;
            let layer = mounts::clone_tree(&place, false).map_err(MountError::new("bind", path))?;
            map_ids(path, &layer, user_namespace)?;
            mounts::attach(&layer, &place).map_err(MountError::new("mount", path))?;
        }
        overlay(&open(top)?, &parsed)?;
        mounts::clone_tree(open(top)?, false).map_err(RootfsError::mount("overlay"))
    })?;
    mounts::attach(mount, at).map_err(RootfsError::mount("overlay"))
}

fn overlay(at: &OwnedFd, overlay: &Overlay) -> Result<(), RootfsError> {
    match overlay_by_layers(at, overlay) {
        // Kernels before 6.8 know no lower layers one by one.
        Err(RootfsError::Mount { source, .. })
            if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) =>
        {
            overlay_by_descriptors(at, overlay)
        }
        other => other,
    }
}

/// One option per layer, so that the number of layers has no limit but the kernel's 500.
fn overlay_by_layers(at: &OwnedFd, overlay: &Overlay) -> Result<(), RootfsError> {
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
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(fail)?;
    mounts::attach(mount, at).map_err(RootfsError::mount("overlay"))
}

/// The classic `mount(2)`, whose options must fit one page. A layer given as `/proc/self/fd/<n>`
/// takes 17 bytes of it, so more than 200 of them fit.
fn overlay_by_descriptors(at: &OwnedFd, overlay: &Overlay) -> Result<(), RootfsError> {
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
    rustix::mount::mount("overlay", descriptor_path(at), "overlay", flags, options.as_c_str())
        .map_err(RootfsError::mount("overlay"))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn an_overlays_options_are_taken_apart() {
        let parsed = Overlay::parse(&options(&[
            "index=off",
            "userxattr",
            "workdir=/s/2/work",
            "upperdir=/s/2/fs",
            "lowerdir=/s/1/fs:/s/0/fs",
            "uidmap=0:65536:65536",
            "gidmap=0:65536:65536",
            "rw",
        ]));
        assert_eq!(
            parsed,
            Overlay {
                lower: vec!["/s/1/fs".into(), "/s/0/fs".into()],
                upper: Some("/s/2/fs".into()),
                work: Some("/s/2/work".into()),
                values: vec![("index".into(), "off".into())],
                flags: vec!["userxattr".into()],
                read_only: false,
            }
        );
    }

    #[test]
    fn layers_that_are_images_are_recognized_by_their_files() {
        let directory = tempfile::tempdir().unwrap();
        let snapshot = |name: &str, image: bool| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.join("fs")).unwrap();
            if image {
                std::fs::write(path.join("layer.erofs"), "").unwrap();
            }
            path
        };
        let (top, base, own, plain) =
            (snapshot("2", true), snapshot("1", true), snapshot("3", false), snapshot("4", false));
        let overlay = |lower: &[&PathBuf]| {
            let lower: Vec<_> = lower.iter().map(|path| path.join("fs").display().to_string()).collect();
            let (upper, work) = (own.join("fs"), own.join("work"));
            let options = options(&[
                &format!("lowerdir={}", lower.join(":")),
                &format!("upperdir={}", upper.display()),
                &format!("workdir={}", work.display()),
            ]);
            vec![Mount { kind: "overlay".into(), source: "overlay".into(), options }]
        };
        assert_eq!(
            ImageLayers::of(&overlay(&[&top, &base])),
            Some(ImageLayers {
                images: vec![top.join("layer.erofs"), base.join("layer.erofs")],
                writable: Some(own.join("fs")),
            })
        );
        assert_eq!(ImageLayers::of(&overlay(&[&top, &plain])), None, "one layer is no image");
        let mut apart = overlay(&[&top]);
        apart[0].options[2] = format!("workdir={}", directory.path().join("elsewhere/work").display());
        assert_eq!(ImageLayers::of(&apart), None, "its directories are not of one snapshot");
        assert_eq!(ImageLayers::of(&[]), None);
    }

    #[test]
    fn a_colon_in_a_layers_path_is_escaped() {
        assert_eq!(split_lower(r"/a\:b:/c\\d"), [PathBuf::from("/a:b"), PathBuf::from(r"/c\d")]);
        assert_eq!(split_lower("\\"), Vec::<PathBuf>::new());
    }

    #[test]
    fn other_mounts_are_refused_with_their_type_and_the_snapshotter() {
        let at = OwnedFd::from(std::fs::File::open("/").unwrap());
        let mount_of =
            |kind: &str| Mount { kind: kind.to_owned(), source: "/dev/loop0".into(), options: vec![] };
        for (mounts, named) in [
            (vec![mount_of("erofs")], "erofs"),
            (vec![mount_of("ext4"), mount_of("overlay")], "ext4, overlay"),
            (vec![], "no mount"),
        ] {
            let error = mount(&at, "blockfile", &mounts, None).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("blockfile"), "{error}");
        }
    }
}
