//! A container's root file system, from the mounts that containerd's snapshotters give.
//!
//! Up to containerd 2.1 that is one mount, an overlay or a bind mount. From 2.2 on it may be several, each of which may name
//! those before it (containerd: `docs/mounts.md`): the erofs snapshotter gives one of each layer's image and, last, a
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

/// Why a root file system cannot be served to a guest.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum RootFsError {
    /// It is made of mounts that are not understood.
    #[error(
        "the snapshotter {snapshotter:?} gives {kinds}, which cannot be served to a guest; use the overlayfs, native or erofs \
         snapshotter for this runtime"
    )]
    Unsupported { snapshotter: String, kinds: String },
    /// It is asked for with an option that is not understood.
    #[error("the snapshotter {snapshotter:?} gives a mount of type {kind:?} with {what}: {remedy}")]
    Option { snapshotter: String, kind: String, what: String, remedy: &'static str },
    /// Its ids are to be mapped, and not as the pod's are.
    #[error(
        "the snapshotter {snapshotter:?} wants ids mapped by {mapping:?}, which is not how the pod's user namespace maps them"
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
            [image] if image.kind == "erofs" => Ok(images(vec![self.image(image)?], None)),
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
        // Their ids would have to be mapped in the guest.
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
        if self.has_mapped_ids(last)? {
            return Err(self.option(
                last,
                "mapped ids",
                "the guest cannot map the ids of images; use the overlayfs snapshotter for pods with a user namespace",
            ));
        }
        match last.kind.as_str() {
            "format/bind" => {
                let number = template(&last.source, "mount").and_then(|numbers| match numbers[..] {
                    [number] => all.get(number).cloned(),
                    _ => None,
                });
                match number {
                    Some(image) if has(last, "ro") => Ok(images(vec![image], None)),
                    _ => Err(self.option(last, "another source than one of its images", REPORT)),
                }
            }
            "format/mkdir/overlay" | "format/overlay" => {
                let known = ["lowerdir=", "upperdir=", "workdir=", "index=", "userxattr", "ro", "rw"];
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
                Ok(images(chosen, writable))
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
                    "a guest does not check its layers yet; set dmverity_mode = \"off\" for the erofs snapshotter, or use another",
                ),
                "device" => (
                    "several devices",
                    "merged layers cannot be served to a guest; unset max_unmerged_layers for the erofs snapshotter",
                ),
                other => return Err(self.option(mount, &format!("the option {other:?}"), REPORT)),
            };
            return Err(self.option(mount, what, remedy));
        }
        Ok(PathBuf::from(&mount.source))
    }

    /// Whether the ids are to be mapped as the pod's are. A snapshotter that cannot have that done has changed its files' ids
    /// already.
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

fn images(images: Vec<PathBuf>, writable: Option<PathBuf>) -> RootFs {
    RootFs::Images { layers: ImageLayers { images, writable }, mounted: None }
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

/// The images of an overlay all of whose layers are images, by the files: containerd 2.1's erofs snapshotter mounts each and
/// gives an overlay of the mounts. `None` for anything else, which is then mounted as it is.
fn mounted_images(overlay: &Overlay) -> Option<ImageLayers> {
    let image = |layer: &PathBuf| Some(layer.parent()?.join(IMAGE)).filter(|image| image.is_file());
    let images = overlay.lower.iter().map(image).collect::<Option<Vec<_>>>()?;
    let writable = match writable(overlay) {
        Writable::Nowhere => None,
        Writable::InSnapshot(directory) => Some(directory),
        Writable::Elsewhere => return None,
    };
    (!images.is_empty()).then_some(ImageLayers { images, writable })
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

/// The images that a `lowerdir` names, topmost first: `{{ mount 0 }}`, or `{{ overlay 0 2 }}` for those from one to the other.
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
mod tests {
    use std::path::Path;

    use super::*;
    use crate::host::user_namespace::IdRange;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Mount { kind: kind.into(), source: source.into(), options }
    }

    fn read(mounts: &[Mount]) -> Result<RootFs, String> {
        root_fs("erofs", mounts, None).map_err(|error| error.to_string())
    }

    fn layers(paths: &[&str], writable: Option<&str>) -> RootFs {
        images(paths.iter().map(PathBuf::from).collect(), writable.map(PathBuf::from))
    }

    #[test]
    fn an_overlays_options_are_taken_apart() {
        let options = [
            "index=off",
            "userxattr",
            "workdir=/s/2/work",
            "upperdir=/s/2/fs",
            "lowerdir=/s/1/fs:/s/0/fs",
            "uidmap=0:65536:65536",
            "gidmap=0:65536:65536",
            "rw",
        ];
        let parsed = parse_overlay(&options.map(str::to_owned));
        let expected = Overlay {
            lower: vec!["/s/1/fs".into(), "/s/0/fs".into()],
            upper: Some("/s/2/fs".into()),
            work: Some("/s/2/work".into()),
            values: vec![("index".into(), "off".into())],
            flags: vec!["userxattr".into()],
            read_only: false,
        };
        assert_eq!(parsed, expected);
    }

    #[test]
    fn layers_that_are_images_are_recognized_by_their_files() {
        let directory = tempfile::tempdir().unwrap();
        let snapshot = |name: &str, image: bool| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.join("fs")).unwrap();
            if image {
                std::fs::write(path.join(IMAGE), "").unwrap();
            }
            path
        };
        let (top, base, own, plain) =
            (snapshot("2", true), snapshot("1", true), snapshot("3", false), snapshot("4", false));
        let overlay = |lower: &[&PathBuf], work: &Path| {
            let lower: Vec<_> = lower.iter().map(|path| path.join("fs").display().to_string()).collect();
            let options = [
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={}", own.join("fs").display()),
                format!("workdir={}", work.display()),
            ];
            parse_overlay(&options)
        };
        let work = own.join("work");
        let expected =
            ImageLayers { images: vec![top.join(IMAGE), base.join(IMAGE)], writable: Some(own.join("fs")) };
        assert_eq!(mounted_images(&overlay(&[&top, &base], &work)), Some(expected));
        assert_eq!(mounted_images(&overlay(&[&top, &plain], &work)), None, "one layer is not an image");
        let elsewhere = directory.path().join("elsewhere/work");
        assert_eq!(
            mounted_images(&overlay(&[&top], &elsewhere)),
            None,
            "its directories are not of one snapshot"
        );
        assert_eq!(mounted_images(&Overlay::default()), None);
    }

    #[test]
    fn a_colon_in_a_layers_path_is_escaped() {
        assert_eq!(split_lower(r"/a\:b:/c\\d"), [PathBuf::from("/a:b"), PathBuf::from(r"/c\d")]);
        assert_eq!(split_lower("\\"), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_mounts_of_containerd_2_2_and_later_are_images() {
        let image = |path| mount("erofs", path, &["ro", "loop"]);
        let overlay = |lower: &str| {
            let lower = format!("lowerdir={lower}");
            mount(
                "format/mkdir/overlay",
                "overlay",
                &["workdir=/s/9/work", "upperdir=/s/9/fs", &lower, "index=off"],
            )
        };
        let (top, base) = (image("/s/2/layer.erofs"), image("/s/1/layer.erofs"));
        let both = ["/s/2/layer.erofs", "/s/1/layer.erofs"];
        assert_eq!(
            read(&[top.clone(), base.clone(), overlay("{{ overlay 0 1 }}")]),
            Ok(layers(&both, Some("/s/9/fs")))
        );
        assert_eq!(
            read(&[base.clone(), top.clone(), overlay("{{ overlay 1 0 }}")]),
            Ok(layers(&both, Some("/s/9/fs")))
        );
        assert_eq!(read(&[top.clone(), overlay("{{ mount 0 }}")]), Ok(layers(&both[..1], Some("/s/9/fs"))));
        assert_eq!(read(std::slice::from_ref(&top)), Ok(layers(&both[..1], None)));
        let bind = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
        assert_eq!(read(&[top.clone(), bind]), Ok(layers(&both[..1], None)));
        for lower in ["{{ overlay 0 2 }}", "{{ mount 7 }}", "{{ mount }}", "/etc", "{{ mount 0 }}:/etc", ""] {
            let error = read(&[top.clone(), base.clone(), overlay(lower)]).unwrap_err();
            assert!(error.contains("not all images"), "{lower}: {error}");
        }
    }

    #[test]
    fn what_an_image_would_have_to_be_and_is_not_in_a_guest_is_refused() {
        let overlay = mount("format/mkdir/overlay", "overlay", &["lowerdir={{ mount 0 }}"]);
        for (option, named) in [
            ("X-containerd.dmverity=/s/1/layer.dmverity", "dmverity_mode"),
            ("device=/s/1/layer.erofs", "max_unmerged_layers"),
            ("invented=1", "\"invented\""),
        ] {
            let error = read(&[mount("erofs", "/s/1/layer.erofs", &["ro", "loop", option]), overlay.clone()])
                .unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        let image = mount("erofs", "/s/1/layer.erofs", &["ro"]);
        let unknown = mount("format/mkdir/overlay", "overlay", &["lowerdir={{ mount 0 }}", "metacopy=on"]);
        assert!(read(&[image.clone(), unknown]).unwrap_err().contains("metacopy=on"));
        let written = ["lowerdir={{ mount 0 }}", "upperdir=/etc", "workdir=/tmp/work"];
        let error = read(&[image, mount("format/mkdir/overlay", "overlay", &written)]).unwrap_err();
        assert!(error.contains("upper directory"), "{error}");
    }

    #[test]
    fn other_mounts_are_refused_with_their_types_and_the_snapshotter() {
        let of = |kind: &str| mount(kind, "/dev/loop0", &[]);
        let block = [of("mkfs/ext4"), of("erofs"), of("format/mkdir/overlay")];
        for (mounts, named) in [
            (&[of("ext4")][..], "ext4"),
            (&[of("ext4"), of("overlay")], "ext4, overlay"),
            (&[of("erofs"), of("overlay")], "overlay"),
            (&block, "mkfs/ext4"),
            (&[], "no mount"),
        ] {
            let error = root_fs("blockfile", mounts, None).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("blockfile"), "{error}");
        }
    }

    #[test]
    fn ids_are_mapped_as_the_pods_are_or_not_at_all() {
        let range = |outside| IdRange { inside: 0, outside, length: 65536 };
        let map = IdMap { uids: range(131_072), gids: range(196_608) };
        let with = |options: &[&str], pod| root_fs("overlayfs", &[mount("bind", "/s/1/fs", options)], pod);
        let mapped = ["rbind", "uidmap=0:131072:65536", "gidmap=0:196608:65536"];
        let has_mapped_ids = |root| match root {
            Ok(RootFs::Mounted(mount)) => mount.has_mapped_ids,
            other => panic!("{other:?}"),
        };
        assert!(has_mapped_ids(with(&mapped, Some(map))));
        assert!(!has_mapped_ids(with(&["rbind"], Some(map))));
        for (options, pod) in
            [(&mapped[..], None), (&["uidmap=0:131072:65536"], Some(map)), (&["gidmap=x"], Some(map))]
        {
            assert!(matches!(with(options, pod), Err(RootFsError::Mapping { .. })), "{options:?}");
        }
    }
}
