//! Where a container writes whose image layers are disks: two directories for the overlay that the guest makes of them.
//!
//! Both are made inside the snapshot's own `fs`, and that is all of the snapshot that the guest sees. With the
//! directory that holds `fs`, a guest could put a symbolic link in the place of `fs`, and containerd would follow it:
//! it unmounts and mounts there when the snapshot is removed or used again (`plugins/snapshots/erofs`, `Remove` and
//! `mounts`). The inside of `fs` containerd only counts and removes, and does not follow links for that.

use std::{os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, mkdirat, openat2},
    io::Errno,
};

use crate::host::mounts::{self, MountError, SetPropagation};

/// The overlay's upper directory.
pub const UPPER: &str = "fs";
/// The overlay's work directory. An overlay needs both on the same mount.
pub const WORK: &str = "work";

/// Nobody but the overlay has business there; as containerd makes its own (`prepareDirectory`).
const WORK_MODE: Mode = Mode::from_raw_mode(0o711);

/// Makes both directories in a snapshot's `fs`, and a mount of it that is attached nowhere yet.
pub fn mount(snapshot: &Path) -> Result<OwnedFd, MountError> {
    let place = mounts::open_trusted_place(snapshot).map_err(MountError::new("open", snapshot))?;
    // A root directory's owner and permissions are those of the overlay's upper directory.
    let root = fstat(&place).map_err(MountError::new("look at", snapshot))?;
    let owner = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
    let mode = Mode::from_raw_mode(root.st_mode);
    for (name, mode) in [(UPPER, mode), (WORK, WORK_MODE)] {
        make(&place, name, owner, mode).map_err(MountError::new("make", &snapshot.join(name)))?;
    }
    let mount = mounts::clone_tree(&place, false).map_err(MountError::new("bind", snapshot))?;
    mounts::set_propagation(&mount, SetPropagation::Private).map_err(MountError::new("bind", snapshot))?;
    Ok(mount)
}

/// Makes a directory, or takes the one that an earlier attempt has made. The guest may have had it since then, and put
/// something else there.
fn make(place: &OwnedFd, name: &str, (user, group): (Uid, Gid), mode: Mode) -> rustix::io::Result<()> {
    match mkdirat(place, name, Mode::RWXU) {
        Err(Errno::EXIST) | Ok(()) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let directory = openat2(place, name, flags, Mode::empty(), resolve)?;
    fchown(&directory, Some(user), Some(group))?;
    // After the owner, whose change takes some bits away.
    fchmod(&directory, mode)
}

/// These mount for real, so they need root.
#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
        path::PathBuf,
    };

    use super::*;
    use crate::host::share::{Share, SharedRoot, WRITABLE, testing::JailedProcess};

    /// A snapshot as containerd's erofs snapshotter makes it, a share, and a directory of the host that is neither.
    struct Place {
        directory: tempfile::TempDir,
        machine: JailedProcess,
        share: Share,
    }

    impl Place {
        fn new() -> Place {
            let directory = tempfile::tempdir().unwrap();
            for path in ["snapshot/fs", "snapshot/work", "host"] {
                fs::create_dir_all(directory.path().join(path)).unwrap();
            }
            fs::write(directory.path().join("snapshot/.erofslayer"), "").unwrap();
            fs::write(directory.path().join("host/secret"), "secret").unwrap();
            let machine = JailedProcess::start();
            let share = machine.share(directory.path());
            Place { directory, machine, share }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn seen_by_guest(&self, name: &str) -> PathBuf {
            self.machine.host_path("c1").join(WRITABLE).join(name)
        }

        fn add(&self) -> Result<(), String> {
            let root = SharedRoot::Disks(Some(self.path("snapshot/fs")));
            self.share
                .add(&"c1".parse().unwrap(), &root, &[], None)
                .map_err(|error| crate::telemetry::error_chain::chain(&error))
        }

        /// What is there of the host, apart from the inside of `fs`: kind, owner, permissions and content of each
        /// entry.
        fn manifest(&self) -> BTreeMap<PathBuf, (u32, u32, u64)> {
            ["snapshot", "snapshot/fs", "snapshot/work", "snapshot/.erofslayer", "host", "host/secret"]
                .into_iter()
                .map(|name| {
                    let metadata = fs::symlink_metadata(self.path(name)).unwrap();
                    (name.into(), (metadata.mode(), metadata.uid(), metadata.ino()))
                })
                .collect()
        }
    }

    #[test]
    fn a_guest_sees_two_directories_inside_the_snapshots_fs_and_nothing_else_of_it() {
        let place = Place::new();
        fs::set_permissions(place.path("snapshot/fs"), fs::Permissions::from_mode(0o1755)).unwrap();
        chown(place.path("snapshot/fs"), Some(7), Some(8)).unwrap();
        place.add().unwrap();
        let mut seen: Vec<_> =
            fs::read_dir(place.seen_by_guest("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        seen.sort();
        assert_eq!(seen, [UPPER, WORK]);
        let upper = fs::metadata(place.seen_by_guest(UPPER)).unwrap();
        assert_eq!((upper.mode() & 0o7777, upper.uid(), upper.gid()), (0o1755, 7, 8));
        fs::write(place.seen_by_guest("fs/new"), "written").unwrap();
        assert_eq!(fs::read_to_string(place.path("snapshot/fs/fs/new")).unwrap(), "written");
        // Once more, as after a container that could not be started.
        place.share.remove_container(&"c1".parse().unwrap()).unwrap();
        place.add().unwrap();
        assert_eq!(fs::read_to_string(place.seen_by_guest("fs/new")).unwrap(), "written");
    }

    #[test]
    fn what_containerd_mounts_on_and_removes_cannot_be_replaced_by_the_guest() {
        let place = Place::new();
        place.add().unwrap();
        let before = place.manifest();
        for name in [UPPER, WORK] {
            let seen = place.seen_by_guest(name);
            fs::remove_dir(&seen).unwrap();
            symlink(place.path("host"), &seen).unwrap();
        }
        // The place itself is a mount, of a share that cannot be written.
        assert!(fs::remove_dir(place.seen_by_guest("")).is_err());
        assert!(fs::rename(place.seen_by_guest(""), place.machine.host_path("c1/other")).is_err());
        assert_eq!(place.manifest(), before);
    }

    /// Puts something at the first path; the second is the host's.
    type Plant = fn(&Path, &Path);

    #[test]
    fn whatever_a_guest_has_put_in_a_directorys_place_is_refused() {
        let planted: [(&str, Plant); 4] = [
            ("a link to the host", |at, host| symlink(host, at).unwrap()),
            ("a link upwards", |at, _| symlink("../work", at).unwrap()),
            ("a dangling link", |at, _| symlink("/no/such/place", at).unwrap()),
            ("a file", |at, _| fs::write(at, "").unwrap()),
        ];
        for (what, plant) in planted {
            for name in [UPPER, WORK] {
                let place = Place::new();
                let before = place.manifest();
                plant(&place.path("snapshot/fs").join(name), &place.path("host"));
                let error = place.add().unwrap_err();
                assert!(error.contains(&format!("snapshot/fs/{name}")), "{what}: {error}");
                assert_eq!(place.manifest(), before, "{what}");
                assert!(
                    !place.machine.host_path("c1").exists(),
                    "{what}: nothing of it is left in the share"
                );
            }
        }
    }
}
