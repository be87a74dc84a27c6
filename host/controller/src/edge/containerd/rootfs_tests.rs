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
    images(paths.iter().map(PathBuf::from).collect(), writable.map(PathBuf::from), false)
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
    let expected = ImageLayers {
        images: vec![top.join(IMAGE), base.join(IMAGE)],
        writable: Some(own.join("fs")),
        map_ids: false,
    };
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
fn the_ids_of_images_are_mapped_in_the_guest_as_the_pods_are_or_not_at_all() {
    let image = mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]);
    let overlay = |mapping: &[&str]| {
        let own = ["workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir={{ mount 0 }}"];
        mount("format/mkdir/overlay", "overlay", &[&own[..], mapping].concat())
    };
    let bind = mount("format/bind", "{{ mount 0 }}", &["ro", "uidmap=0:65536:65536", "gidmap=0:65536:65536"]);
    let map = Some(IdMap { uids: "0:65536:65536".parse().unwrap(), gids: "0:65536:65536".parse().unwrap() });
    let map_ids = |last: Mount, map| match root_fs("erofs", &[image.clone(), last], map) {
        Ok(RootFs::Images { layers, .. }) => Ok(layers.map_ids),
        other => Err(format!("{other:?}")),
    };
    let mapping = ["uidmap=0:65536:65536", "gidmap=0:65536:65536"];
    assert_eq!(map_ids(overlay(&mapping), map), Ok(true));
    assert_eq!(map_ids(bind, map), Ok(true));
    assert_eq!(map_ids(overlay(&[]), map), Ok(false));
    for (mapping, map) in
        [(&mapping[..], None), (&mapping[..1], map), (&["uidmap=0:1:1", "gidmap=0:1:1"], map)]
    {
        assert!(map_ids(overlay(mapping), map).unwrap_err().contains("Mapping"), "{mapping:?}");
    }
}

#[test]
fn what_an_image_would_have_to_be_and_is_not_in_a_guest_is_refused() {
    let overlay = mount("format/mkdir/overlay", "overlay", &["lowerdir={{ mount 0 }}"]);
    for (option, named) in [
        ("X-containerd.dmverity=/s/1/layer.dmverity", "dmverity_mode"),
        ("device=/s/1/layer.erofs", "fsmeta.erofs"),
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

/// The index of the first mount that containerd leaves to the runtime, from what mounts' types are and which of them
/// the runtime has asked for; `None` if it leaves all of them as they are (`core/mount/manager`, `Activate`). Of the
/// handlers that there could be, containerd has the one for erofs.
fn first_system_mount(mounts: &[Mount], allowed: &[&str]) -> Option<usize> {
    let mut first = None;
    for (index, mount) in mounts.iter().enumerate() {
        let mut kind = mount.kind.as_str();
        while let Some((transform, rest)) = kind.split_once('/') {
            if !["format", "mkfs", "mkdir"].contains(&transform) {
                break;
            }
            let any = format!("{transform}/*");
            if !allowed.iter().any(|allowed| *allowed == any || *allowed == mount.kind) {
                first = Some(index);
            }
            kind = rest;
        }
        if kind == "erofs" && !allowed.contains(&kind) {
            first = Some(index + 1);
        }
    }
    first
}

#[test]
fn containerd_activates_nothing_on_the_host_of_what_a_guest_is_given() {
    let image = mount("erofs", "/s/1/layer.erofs", &["ro", "loop"]);
    let overlay =
        |kind| mount(kind, "overlay", &["lowerdir={{ mount 0 }}", "upperdir=/s/9/fs", "workdir=/s/9/work"]);
    let bind = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
    let forms = [
        vec![image.clone()],
        vec![image.clone(), bind],
        vec![image.clone(), overlay("format/overlay")],
        vec![image.clone(), overlay("format/mkdir/overlay")],
        vec![image, mount("erofs", "/s/0/layer.erofs", &["ro"]), overlay("format/mkdir/overlay")],
        vec![overlay("overlay")],
        vec![mount("bind", "/s/9/fs", &["rw", "rbind"])],
    ];
    for form in &forms {
        read(form).unwrap_or_else(|error| panic!("{form:?}: {error}"));
        assert_eq!(first_system_mount(form, &ALLOWED_MOUNT_TYPES), None, "{form:?}");
    }
    // There is no type too many.
    for left_out in ALLOWED_MOUNT_TYPES {
        let fewer: Vec<_> = ALLOWED_MOUNT_TYPES.into_iter().filter(|kind| *kind != left_out).collect();
        assert!(forms.iter().any(|form| first_system_mount(form, &fewer).is_some()), "{left_out}");
    }
    // What no guest is given, containerd may do as it likes.
    let block = [mount("mkfs/ext4", "/s/9/rwlayer.img", &["loop"]), mount("format/mkdir/bind", "", &[])];
    assert_eq!(first_system_mount(&block, &ALLOWED_MOUNT_TYPES), Some(1));
    read(&block).unwrap_err();
}
