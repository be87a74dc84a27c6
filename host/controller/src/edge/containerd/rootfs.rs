//! A container's root file system, from the mounts that containerd's snapshotters give.
//!
//! Up to containerd 2.1 that is one mount, an overlay or a bind mount. From 2.2 on it may be several, each of which may
//! name those before it (containerd: `docs/mounts.md`): the erofs snapshotter gives one of each layer's image and,
//! last, a
//! `format/mkdir/overlay` of them.

use std::path::PathBuf;

use thiserror::Error;

use crate::host::{
    rootfs::{Bind, HostMount, HostMountKind, ImageLayers, Overlay, RootFs},
    user_namespace::IdMap,
};

/// One entry of what a snapshotter gives (`containerd.types.Mount`).
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

/// The image of a layer beside its mount point (containerd: `plugins/snapshots/erofs`, `layerBlobPath`).
const IMAGE: &str = "layer.erofs";

/// Most mounts that a root file system may be made of: the kernel takes no more layers.
const MOUNTS_MAX: usize = 512;

/// The types of mounts that are read here and that containerd is not to do anything about on the host before it calls
/// the agent, from 2.2 on: not mount layers, and not fill templates in. Any other type that its mount manager knows,
/// such as `mkfs/ext4`, is nothing that a guest can be given either (containerd: `core/mount/manager`, `Activate`,
/// which compares whole types). An option such as `loop` is only for whoever mounts.
pub const ALLOWED_MOUNT_TYPES: [&str; 4] = ["erofs", "format/bind", "format/overlay", "format/mkdir/overlay"];

/// Why a root file system cannot be served to a guest.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum RootFsError {
    /// It is made of mounts that are not understood.
    #[error(
        "the snapshotter {snapshotter:?} gives {kinds}, which cannot be served to a guest; use the overlayfs, native \
         or erofs snapshotter for this runtime"
    )]
    Unsupported { snapshotter: String, kinds: String },
    /// It is asked for with an option that is not understood.
    #[error("the snapshotter {snapshotter:?} gives a mount of type {kind:?} with {what}: {remedy}")]
    Option { snapshotter: String, kind: String, what: String, remedy: &'static str },
    /// Its ids are to be mapped, and not as the pod's are.
    #[error(
        "the snapshotter {snapshotter:?} wants ids mapped by {mapping:?}, which is not how the pod's user namespace \
         maps them"
    )]
    Mapping { snapshotter: String, mapping: String },
}

/// Reads what a snapshotter gives for a container of a pod with these ids.
pub fn root_fs(snapshotter: &str, mounts: &[Mount], id_map: Option<IdMap>) -> Result<RootFs, RootFsError> {
    Reader { snapshotter, id_map }.read(mounts)
}

struct Reader<'a> {
    snapshotter: &'a str,
    id_map: Option<IdMap>,
}

impl Reader<'_> {
    fn read(&self, mounts: &[Mount]) -> Result<RootFs, RootFsError> {
        match mounts {
            [mount] if mount.kind == "overlay" => self.overlay(mount),
            [mount] if matches!(mount.kind.as_str(), "bind" | "rbind") => {
                let mount = HostMount {
                    kind: HostMountKind::Bind(Bind {
                        source: PathBuf::from(&mount.source),
                        recursive: mount.kind == "rbind" || has(mount, "rbind"),
                        read_only: has(mount, "ro"),
                    }),
                    has_mapped_ids: self.has_mapped_ids(mount)?,
                };
                Ok(RootFs::Mounted(mount))
            }
            [image] if image.kind == "erofs" => Ok(images(vec![self.image(image)?], None, false)),
            [images @ .., last] if !images.is_empty() && mounts.len() <= MOUNTS_MAX => {
                self.stack(images, last)
            }
            _ => Err(self.unsupported(mounts)),
        }
    }

    /// One overlay, all of whose layers may be mounts of images.
    fn overlay(&self, mount: &Mount) -> Result<RootFs, RootFsError> {
        let overlay = parse_overlay(&mount.options);
        let mounted = HostMount {
            kind: HostMountKind::Overlay(overlay.clone()),
            has_mapped_ids: self.has_mapped_ids(mount)?,
        };
        // containerd has mounted them, and the host can map their ids.
        let layers = if mounted.has_mapped_ids { None } else { mounted_images(&overlay) };
        Ok(match layers {
            Some(layers) => RootFs::Images { layers, mounted: Some(mounted) },
            None => RootFs::Mounted(mounted),
        })
    }

    /// Images, and what is made of them.
    fn stack(&self, lower: &[Mount], last: &Mount) -> Result<RootFs, RootFsError> {
        if lower.iter().any(|mount| mount.kind != "erofs") {
            let mounts: Vec<_> = lower.iter().chain([last]).cloned().collect();
            return Err(self.unsupported(&mounts));
        }
        let all = lower.iter().map(|mount| self.image(mount)).collect::<Result<Vec<_>, _>>()?;
        let map_ids = self.has_mapped_ids(last)?;
        match last.kind.as_str() {
            "format/bind" => {
                let number = template(&last.source, "mount").and_then(|numbers| match numbers[..] {
                    [number] => all.get(number).cloned(),
                    _ => None,
                });
                match number {
                    Some(image) if has(last, "ro") => Ok(images(vec![image], None, map_ids)),
                    _ => Err(self.option(last, "another source than one of its images", REPORT)),
                }
            }
            "format/mkdir/overlay" | "format/overlay" => {
                let known = [
                    "lowerdir=",
                    "upperdir=",
                    "workdir=",
                    "index=",
                    "userxattr",
                    "ro",
                    "rw",
                    UID_MAP,
                    GID_MAP,
                ];
                if let Some(option) =
                    last.options.iter().find(|option| !known.iter().any(|known| option.starts_with(known)))
                {
                    return Err(self.option(last, &format!("the option {option:?}"), REPORT));
                }
                let overlay = parse_overlay(&last.options);
                let lower = last.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
                let chosen = lower.and_then(|lower| chosen_images(lower, &all));
                let chosen = chosen
                    .ok_or_else(|| self.option(last, "layers that are not all images of its own", REPORT))?;
                let writable = match writable(&overlay) {
                    Writable::Nowhere => None,
                    Writable::InSnapshot(directory) => Some(directory),
                    Writable::Elsewhere => {
                        let what = "an upper directory that is not the snapshot's own";
                        return Err(self.option(last, what, REPORT));
                    }
                };
                Ok(images(chosen, writable, map_ids))
            }
            _ => Err(self.unsupported(std::slice::from_ref(last))),
        }
    }

    /// The file of a layer's image.
    fn image(&self, mount: &Mount) -> Result<PathBuf, RootFsError> {
        for option in &mount.options {
            let (what, remedy) = match option.split_once('=').map_or(option.as_str(), |(key, _)| key) {
                "ro" | "loop" => continue,
                "X-containerd.dmverity" => (
                    "dm-verity",
                    "a guest does not check its layers yet; set dmverity_mode = \"off\" for the erofs snapshotter, or \
                     use another",
                ),
                "device" => (
                    "several devices",
                    "merged layers cannot be served to a guest; use layers without an fsmeta.erofs, or the overlayfs \
                     snapshotter",
                ),
                other => return Err(self.option(mount, &format!("the option {other:?}"), REPORT)),
            };
            return Err(self.option(mount, what, remedy));
        }
        Ok(PathBuf::from(&mount.source))
    }

    /// Whether the ids are to be mapped as the pod's are. A snapshotter that cannot have that done has changed its
    /// files' ids already.
    fn has_mapped_ids(&self, mount: &Mount) -> Result<bool, RootFsError> {
        let value = |key| mount.options.iter().find_map(|option| option.strip_prefix(key));
        let (uids, gids) = match (value(UID_MAP), value(GID_MAP)) {
            (None, None) => return Ok(false),
            (uids, gids) => (uids.unwrap_or_default(), gids.unwrap_or_default()),
        };
        match self.id_map {
            Some(map) if uids.parse() == Ok(map.uids) && gids.parse() == Ok(map.gids) => Ok(true),
            _ => Err(RootFsError::Mapping {
                snapshotter: self.snapshotter.to_owned(),
                mapping: format!("{UID_MAP}{uids},{GID_MAP}{gids}"),
            }),
        }
    }

    fn unsupported(&self, mounts: &[Mount]) -> RootFsError {
        let kinds = match mounts {
            [] => "no mount".to_owned(),
            [mount] => format!("a mount of type {:?}", mount.kind),
            _ => {
                let kinds: Vec<_> = mounts.iter().map(|mount| mount.kind.as_str()).collect();
                format!("{} mounts of types {}", mounts.len(), kinds.join(", "))
            }
        };
        RootFsError::Unsupported { snapshotter: self.snapshotter.to_owned(), kinds }
    }

    fn option(&self, mount: &Mount, what: &str, remedy: &'static str) -> RootFsError {
        RootFsError::Option {
            snapshotter: self.snapshotter.to_owned(),
            kind: mount.kind.clone(),
            what: what.to_owned(),
            remedy,
        }
    }
}

/// What to do about a form that no released containerd has.
const REPORT: &str =
    "this version of Pericarp does not know it; use the overlayfs snapshotter, and report this";

fn images(images: Vec<PathBuf>, writable: Option<PathBuf>, map_ids: bool) -> RootFs {
    RootFs::Images { layers: ImageLayers { images, writable, map_ids }, mounted: None }
}

fn has(mount: &Mount, name: &str) -> bool {
    mount.options.iter().any(|option| option == name)
}

fn parse_overlay(options: &[String]) -> Overlay {
    let mut overlay = Overlay::default();
    for option in options {
        match option.split_once('=') {
            Some(("lowerdir", value)) => overlay.lower = split_lower(value),
            Some(("upperdir", value)) => overlay.upper = Some(value.into()),
            Some(("workdir", value)) => overlay.work = Some(value.into()),
            // These are not the kernel's.
            _ if option.starts_with(UID_MAP) || option.starts_with(GID_MAP) => {}
            Some((key, value)) => overlay.values.push((key.to_owned(), value.to_owned())),
            None if option == "ro" => overlay.read_only = true,
            None if matches!(option.as_str(), "rw" | "") => {}
            None => overlay.flags.push(option.clone()),
        }
    }
    overlay
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

/// The images of an overlay all of whose layers are images, by the files: containerd 2.1's erofs snapshotter mounts
/// each and gives an overlay of the mounts. `None` for anything else, which is then mounted as it is.
fn mounted_images(overlay: &Overlay) -> Option<ImageLayers> {
    let image = |layer: &PathBuf| Some(layer.parent()?.join(IMAGE)).filter(|image| image.is_file());
    let images = overlay.lower.iter().map(image).collect::<Option<Vec<_>>>()?;
    let writable = match writable(overlay) {
        Writable::Nowhere => None,
        Writable::InSnapshot(directory) => Some(directory),
        Writable::Elsewhere => return None,
    };
    (!images.is_empty()).then_some(ImageLayers { images, writable, map_ids: false })
}

/// Where a container writes.
enum Writable {
    /// It may not.
    Nowhere,
    /// In its snapshot's own directory.
    InSnapshot(PathBuf),
    Elsewhere,
}

fn writable(overlay: &Overlay) -> Writable {
    match (&overlay.upper, &overlay.work) {
        (None, None) => Writable::Nowhere,
        (Some(upper), Some(work))
            if upper.ends_with("fs") && work.ends_with("work") && upper.parent() == work.parent() =>
        {
            Writable::InSnapshot(upper.clone())
        }
        _ => Writable::Elsewhere,
    }
}

/// The numbers in `{{ name 1 2 }}`, which is a template of Go's.
fn template(text: &str, name: &str) -> Option<Vec<usize>> {
    let inner = text.strip_prefix("{{")?.strip_suffix("}}")?.trim();
    let mut words = inner.split_whitespace();
    if words.next() != Some(name) {
        return None;
    }
    words.map(|word| word.parse().ok()).collect()
}

/// The images that a `lowerdir` names, topmost first: `{{ mount 0 }}`, or `{{ overlay 0 2 }}` for those from one to the
/// other.
fn chosen_images(lower: &str, images: &[PathBuf]) -> Option<Vec<PathBuf>> {
    if let Some(numbers) = template(lower, "mount") {
        let [number] = numbers[..] else { return None };
        return Some(vec![images.get(number)?.clone()]);
    }
    let numbers = template(lower, "overlay")?;
    let [first, last] = numbers[..] else { return None };
    if first <= last {
        Some(images.get(first..=last)?.to_vec())
    } else {
        Some(images.get(last..=first)?.iter().rev().cloned().collect())
    }
}

#[cfg(test)]
#[path = "rootfs_tests.rs"]
mod tests;
