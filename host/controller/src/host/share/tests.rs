//! These mount for real, so they need root, as everything does that the share is for.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, chown, symlink},
};

use super::{testing::JailedProcess, *};
use crate::host::{
    process::Process,
    rootfs::{Bind, HostMount, HostMountKind, Overlay},
    user_namespace,
};

struct Place {
    directory: tempfile::TempDir,
    machine: JailedProcess,
    share: Share,
}

impl Place {
    fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let machine = JailedProcess::start();
        let share = machine.share(directory.path());
        Place { directory, machine, share }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn shared(&self, name: &str) -> PathBuf {
        self.machine.host_path(name)
    }

    fn unmount(&self, name: &str) {
        self.share.place.enter(|share| Ok(mounts::detach(&share.join(name))?)).unwrap();
    }

    /// A directory with one file, mounted as the native snapshotter's would be.
    fn root(&self) -> SharedRoot {
        fs::create_dir_all(self.path("root")).unwrap();
        fs::write(self.path("root/init"), "root").unwrap();
        let bind = Bind { source: self.path("root"), recursive: true, read_only: false };
        SharedRoot::Mounted(HostMount { kind: HostMountKind::Bind(bind), has_mapped_ids: false })
    }

    fn volume(&self, name: &str, read_only: ReadOnly) -> Volume {
        Volume {
            name: name.into(),
            source: self.path(name),
            destination: format!("/{name}"),
            recursive: true,
            read_only,
            propagation: Propagation::Private,
            ids: IdMapping::Host,
        }
    }
}

fn id(text: &str) -> ContainerId {
    text.parse().unwrap()
}

fn mounts_below(path: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts
        .lines()
        .filter(|line| line.split(' ').nth(4).is_some_and(|at| Path::new(at).starts_with(path)))
        .count()
}

#[test]
fn a_containers_root_and_volumes_appear_and_disappear() {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    fs::write(place.path("file"), "content").unwrap();
    let volumes = [place.volume("data", ReadOnly::No), place.volume("file", ReadOnly::Top)];
    place.share.add(&id("c1"), &place.root(), &volumes, None).unwrap();

    assert_eq!(fs::read_to_string(place.shared("c1/rootfs/init")).unwrap(), "root");
    fs::write(place.shared(".volumes/data/new"), "written").unwrap();
    assert_eq!(fs::read_to_string(place.path("data/new")).unwrap(), "written");
    assert_eq!(fs::read_to_string(place.shared(".volumes/file")).unwrap(), "content");
    let error = fs::write(place.shared(".volumes/file"), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    assert_eq!(place.share.containers(), [id("c1")]);

    place.share.remove_container(&id("c1")).unwrap();
    assert!(!place.shared("c1").exists());
    assert_eq!(place.machine.mounts(), 1);
    assert_eq!(fs::read_to_string(place.path("data/new")).unwrap(), "written");
    place.share.remove_container(&id("c1")).unwrap();
}

#[test]
fn containers_with_the_same_volume_have_one_mount_of_it_which_is_writable_if_one_may_write() {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    let add = |container: &str, read_only| {
        place.share.add(&id(container), &place.root(), &[place.volume("data", read_only)], None).unwrap();
        fs::write(place.shared(".volumes/data/file"), container)
    };
    assert_eq!(add("c1", ReadOnly::Top).unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    add("c2", ReadOnly::No).unwrap();
    add("c3", ReadOnly::Top).unwrap();
    // The share, three root file systems and one volume.
    assert_eq!(place.machine.mounts(), 5);
    let mut containers = place.share.containers();
    containers.sort();
    assert_eq!(containers, ["c1", "c2", "c3"].map(id));

    place.share.remove_container(&id("c2")).unwrap();
    place.share.remove_container(&id("c1")).unwrap();
    assert!(place.shared(".volumes/data/file").exists(), "c3 has it still");
    place.share.remove_container(&id("c3")).unwrap();
    assert!(!place.shared(".volumes/data").exists());
    assert_eq!(place.machine.mounts(), 1);
    assert_eq!(fs::read_to_string(place.path("data/file")).unwrap(), "c3");
}

#[test]
fn the_end_of_the_machine_takes_the_mounts_and_nothing_of_the_host() {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    fs::write(place.path("data/precious"), "kept").unwrap();
    place.share.add(&id("c1"), &place.root(), &[place.volume("data", ReadOnly::No)], None).unwrap();
    let Place { directory, machine, share } = place;
    drop(machine);
    assert_eq!(share.containers(), []);
    share.remove_container(&id("c1")).unwrap();
    let error = share.add(&id("c1"), &SharedRoot::Disks(None), &[], None).unwrap_err();
    assert!(matches!(error, ShareError::Gone), "{error:?}");
    let kept = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    assert_eq!((kept("data/precious").as_str(), kept("root/init").as_str()), ("kept", "root"));
}

#[test]
fn the_hosts_mount_table_has_nothing_of_a_pod_and_its_places_can_be_removed() {
    let place = Place::new();
    fs::create_dir_all(place.path("data/below")).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", place.path("data/below"), "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
    place.share.add(&id("c1"), &place.root(), &[place.volume("data", ReadOnly::No)], None).unwrap();
    fs::write(place.shared(".volumes/data/below/file"), "").unwrap();
    assert_eq!(mounts_below(place.directory.path()), 1, "only what this test has mounted itself");
    mounts::detach(&place.path("data/below")).unwrap();
    // While the pod still has what was mounted there. With its place, the kernel takes it from the pod.
    assert!(place.shared(".volumes/data/below/file").exists());
    fs::remove_dir(place.path("data/below")).unwrap();
    assert!(!place.shared(".volumes/data/below").exists());
}

#[test]
fn a_device_node_in_an_image_or_a_volume_is_no_device_of_the_hosts() {
    let place = Place::new();
    let root = place.root();
    fs::create_dir(place.path("data")).unwrap();
    for name in ["root/null", "data/null"] {
        let mode = rustix::fs::Mode::from_raw_mode(0o666);
        let device = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(CWD, place.path(name), FileType::CharacterDevice, mode, device).unwrap();
    }
    place.share.add(&id("c1"), &root, &[place.volume("data", ReadOnly::No)], None).unwrap();
    for name in ["c1/rootfs/null", ".volumes/data/null"] {
        // It is there, for the guest to make of it what its own kernel does.
        assert!(fs::symlink_metadata(place.shared(name)).is_ok());
        let error = fs::File::open(place.shared(name)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{name}");
    }
    fs::File::open(place.path("data/null")).unwrap();
}

#[test]
fn a_process_that_has_not_left_the_hosts_files_has_no_share() {
    let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let place = super::place::Place::Machine(Process::of(child.id()).unwrap());
    let share = Share::new(place, directory.path().join("volumes.json"));
    let error = share.add(&id("c1"), &SharedRoot::Disks(None), &[], None).unwrap_err();
    assert!(matches!(error, ShareError::Gone), "{error:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Makes a share as older versions have it: a directory of the host that is mounted on itself.
fn make_older(path: &Path) -> Share {
    fs::create_dir(path).unwrap();
    let place = mounts::open_place(path).unwrap();
    let mount = mounts::clone_tree(&place, false).unwrap();
    mounts::set_read_only(&mount, false).unwrap();
    mounts::attach(&mount, &place).unwrap();
    mounts::set_propagation(&mount, SetPropagation::Private).unwrap();
    Share::new(super::place::Place::Host(path.to_owned()), path.with_file_name("volumes.json"))
}

#[test]
fn the_share_of_a_machine_that_an_older_version_has_started_is_used_and_removed() {
    let place = Place::new();
    let path = place.path("share");
    let share = make_older(&path);
    fs::create_dir(place.path("data")).unwrap();
    fs::write(place.path("data/precious"), "kept").unwrap();
    share.add(&id("c1"), &place.root(), &[place.volume("data", ReadOnly::No)], None).unwrap();
    assert_eq!(fs::read_to_string(path.join("c1/rootfs/init")).unwrap(), "root");
    assert_eq!(fs::read_to_string(path.join(".volumes/data/precious")).unwrap(), "kept");
    assert_eq!(share.containers(), [id("c1")]);
    assert!(mounts::remove_tree(&path).is_err(), "a mounted tree is never emptied");
    share.remove_container(&id("c1")).unwrap();
    assert_eq!(mounts_below(&path), 1);
    mounts::detach(&path).unwrap();
    mounts::remove_tree(&path).unwrap();
    share.remove_container(&id("c1")).unwrap();
    assert_eq!(fs::read_to_string(place.path("data/precious")).unwrap(), "kept");
}

#[test]
fn a_guest_can_make_nothing_in_the_share_itself() {
    let place = Place::new();
    place.share.add(&id("c1"), &place.root(), &[], None).unwrap();
    for name in ["x", "c1/x"] {
        let error = fs::create_dir(place.shared(name)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{name}");
    }
    assert!(symlink("/etc", place.shared("c2")).is_err());
    assert!(fs::rename(place.shared("c1"), place.shared("c3")).is_err());
    // Its own root file system it may write.
    fs::write(place.shared("c1/rootfs/x"), "").unwrap();
}

#[test]
fn a_failed_preparation_leaves_nothing() {
    let place = Place::new();
    let volumes = [place.volume("missing", ReadOnly::No)];
    let error = place.share.add(&id("c1"), &place.root(), &volumes, None).unwrap_err();
    assert!(matches!(error, ShareError::VolumeMissing { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("/missing") && text.contains(&place.path("missing").display().to_string()),
        "{text}"
    );
    assert!(!place.shared("c1").exists());
    assert_eq!(place.machine.mounts(), 1);
}

#[test]
fn a_socket_is_refused_as_a_volume_by_its_kind() {
    let place = Place::new();
    let _listener = std::os::unix::net::UnixListener::bind(place.path("socket")).unwrap();
    let volumes = [place.volume("socket", ReadOnly::No)];
    let error = place.share.add(&id("c1"), &place.root(), &volumes, None).unwrap_err();
    assert!(matches!(error, ShareError::VolumeKind { kind: "socket", .. }), "{error:?}");
}

#[test]
fn a_source_that_became_a_symbolic_link_is_not_followed() {
    let place = Place::new();
    symlink("/etc", place.path("link")).unwrap();
    let volumes = [place.volume("link", ReadOnly::No)];
    assert!(place.share.add(&id("c1"), &place.root(), &volumes, None).is_err());
    assert!(!place.shared("c1").exists());
}

#[test]
fn nothing_mounted_in_the_share_spreads() {
    let place = Place::new();
    place.share.add(&id("c1"), &place.root(), &[], None).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", place.machine.process().pid)).unwrap();
    assert!(mounts.contains("/share/c1/rootfs") && !mounts.contains("shared:"), "{mounts}");
}

#[test]
fn an_overlay_with_more_layers_than_fit_a_page_is_mounted() {
    let place = Place::new();
    // On a tmpfs, because an overlay cannot lie on another one, which the test's own root may be.
    let disk = place.path("disk");
    fs::create_dir(&disk).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &disk, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
    let long = "d".repeat(120);
    let layers: Vec<PathBuf> = (0..60)
        .map(|number| {
            let layer = disk.join(&long).join(number.to_string());
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join(format!("from-{number}")), "").unwrap();
            layer
        })
        .collect();
    for name in ["upper", "work"] {
        fs::create_dir(disk.join(name)).unwrap();
    }
    assert!(layers.iter().map(|layer| layer.as_os_str().len()).sum::<usize>() > 4096);
    let overlay = Overlay {
        lower: layers,
        upper: Some(disk.join("upper")),
        work: Some(disk.join("work")),
        values: vec![("index".into(), "off".into())],
        ..Overlay::default()
    };
    let root =
        SharedRoot::Mounted(HostMount { kind: HostMountKind::Overlay(overlay), has_mapped_ids: false });
    let added = place.share.add(&id("c1"), &root, &[], None);
    let seen = (0..60).all(|number| place.shared(&format!("c1/rootfs/from-{number}")).exists());
    let written = fs::write(place.shared("c1/rootfs/new"), "");
    let kept = disk.join("upper/new").exists();
    place.share.remove_container(&id("c1")).unwrap();
    mounts::detach(&disk).unwrap();
    added.unwrap();
    written.unwrap();
    assert!(seen && kept);
}

#[test]
fn volumes_and_layers_show_the_ids_of_the_pods_user_namespace() {
    let place = Place::new();
    let namespace = user_namespace::for_tests();
    for directory in ["data", "lower", "upper", "work"] {
        fs::create_dir(place.path(directory)).unwrap();
    }
    fs::write(place.path("data/roots"), "").unwrap();
    fs::write(place.path("lower/tool"), "").unwrap();
    chown(place.path("lower/tool"), Some(1000), Some(2000)).unwrap();
    chown(place.path("upper"), Some(65536), Some(65536)).unwrap();
    let overlay = Overlay {
        lower: vec![place.path("lower")],
        upper: Some(place.path("upper")),
        work: Some(place.path("work")),
        ..Overlay::default()
    };
    let root = SharedRoot::Mounted(HostMount { kind: HostMountKind::Overlay(overlay), has_mapped_ids: true });
    let volume = |name: &str, ids| Volume { name: name.into(), ids, ..place.volume("data", ReadOnly::No) };
    let volumes = [volume("plain", IdMapping::Host), volume("mapped", IdMapping::Pod)];
    place.share.add(&id("c1"), &root, &volumes, Some(&namespace)).unwrap();

    let owner = |name: &str| {
        let metadata = fs::metadata(place.shared(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("c1/rootfs/tool"), (66536, 67536));
    assert_eq!(owner("c1/rootfs"), (65536, 65536));
    assert_eq!(owner(".volumes/plain/roots"), (0, 0));
    assert_eq!(owner(".volumes/mapped/roots"), (65536, 65536));
    chown(place.shared(".volumes/mapped/roots"), Some(65543), None).unwrap();
    assert_eq!(fs::metadata(place.path("data/roots")).unwrap().uid(), 7);
    assert_eq!(fs::metadata(place.path("lower/tool")).unwrap().uid(), 1000, "nothing of it is seen here");
    place.share.remove_container(&id("c1")).unwrap();
    assert_eq!(place.machine.mounts(), 1);

    let error = chain(&place.share.add(&id("c1"), &root, &[], None).unwrap_err());
    assert!(error.contains("no user namespace"), "{error}");
}

/// A controller that is killed in between leaves a volume's user on record, and the volume not mounted.
#[test]
fn a_volume_that_is_on_record_and_not_mounted_is_mounted_for_the_next_container() {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    fs::write(place.path("data/file"), "x").unwrap();
    let root = place.root();
    let (read_only, writable) =
        (place.volume("data", ReadOnly::Recursive), place.volume("data", ReadOnly::No));
    place.share.add(&id("c1"), &root, std::slice::from_ref(&read_only), None).unwrap();
    place.unmount(".volumes/data");
    assert!(!place.shared(".volumes/data/file").exists());
    place.share.add(&id("c2"), &root, std::slice::from_ref(&read_only), None).unwrap();
    assert!(place.shared(".volumes/data/file").exists());
    // Nor is it taken for writable because that is on record.
    place.share.add(&id("c3"), &root, std::slice::from_ref(&writable), None).unwrap();
    fs::write(place.shared(".volumes/data/new"), "").unwrap();
    place.unmount(".volumes/data");
    place.share.add(&id("c4"), &root, std::slice::from_ref(&read_only), None).unwrap();
    place.share.add(&id("c5"), &root, std::slice::from_ref(&writable), None).unwrap();
    fs::write(place.shared(".volumes/data/newer"), "").unwrap();
    for container in ["c1", "c2", "c3", "c4", "c5"] {
        place.share.remove_container(&id(container)).unwrap();
    }
}
