//! kubelet's emptyDir volumes in memory (`medium: Memory`), as they are on the host.
//!
//! kubelet mounts a tmpfs at `<root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<name>` (kubernetes:
//! `pkg/volume/emptydir`, `setupTmpfs`). For a `subPath`, it makes the directory in there and mounts that at
//! `<root>/pods/<uid>/volume-subpaths/<name>/<container>/<number>` (`pkg/volume/util/subpath`, `doBindSubPath`).

use std::{
    io,
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, fstat, fstatfs},
    io::Errno,
};

use super::mounts::{self, MountEntry};

/// `TMPFS_MAGIC` (linux/magic.h).
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// What the path of a removed directory ends with in the mount table (kernel: `fs/d_path.c`, `dentry_path`).
const REMOVED: &[u8] = b"//deleted";

/// What a mount of a container has of an emptyDir in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryEmptyDir {
    /// kubelet's name of the volume, one component of a path.
    pub name: String,
    /// How many bytes fit into it; 0: it has no limit.
    pub size_bytes: u64,
    /// How many files fit into it; 0: it has no limit.
    pub inodes: u64,
    /// The part of the volume that is mounted; empty if it is the whole.
    pub sub_path: String,
    /// The volume's root, whose path is empty, and each directory on the way to the mounted part.
    pub directories: Vec<PreparedDirectory>,
}

/// A directory that kubelet has prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedDirectory {
    /// Below the volume's root.
    pub path: String,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl MemoryEmptyDir {
    /// The emptyDir in memory that the source of a bind mount is, or is part of; `None` if it is something else:
    /// another kind of volume, an emptyDir on disk, or a volume of another pod than the one with this UID. An empty UID
    /// means that nobody knows it, and is not compared.
    pub fn at(source: &Path, pod_uid: &str) -> io::Result<Option<Self>> {
        let Some(place) = source.to_str().and_then(|source| VolumePath::parse(source, pod_uid)) else {
            return Ok(None);
        };
        let root = match mounts::open_place(&place.volume) {
            // Whatever is missing is told by whoever mounts it.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            root => root?,
        };
        let file_system = fstatfs(&root)?;
        if file_system.f_type != TMPFS {
            return Ok(None);
        }
        // kubelet's own directory may be in a tmpfs, which is no emptyDir's.
        let Some(mount) = mounts::entry_at(&place.volume)?.filter(|mount| mount.root == Path::new("/"))
        else {
            return Ok(None);
        };
        let Some(sub_path) = place.sub_path(source, &mount)? else { return Ok(None) };
        let mut directories = vec![prepared(&root, String::new())?];
        let steps = sub_path.match_indices('/').map(|(end, _)| &sub_path[..end]);
        let leaf = Some(sub_path.as_str()).filter(|path| !path.is_empty());
        for path in steps.chain(leaf) {
            let directory = mounts::open_place_below(&root, Path::new(path))?;
            // A single file may be mounted as well; what is in a file is not the guest's to have.
            if FileType::from_raw_mode(fstat(&directory)?.st_mode) == FileType::Directory {
                directories.push(prepared(&directory, path.to_owned())?);
            }
        }
        Ok(Some(Self {
            name: place.name.to_owned(),
            size_bytes: file_system.f_blocks.saturating_mul(u64::try_from(file_system.f_bsize).unwrap_or(0)),
            inodes: file_system.f_files,
            sub_path,
            directories,
        }))
    }
}

fn prepared(directory: impl std::os::fd::AsFd, path: String) -> io::Result<PreparedDirectory> {
    let stat = fstat(directory)?;
    Ok(PreparedDirectory { path, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid })
}

/// The path of a mount's source, by kubelet's convention.
#[derive(Debug, PartialEq, Eq)]
struct VolumePath<'a> {
    /// Where the emptyDir with that name would be.
    volume: PathBuf,
    name: &'a str,
    /// `None` if the source is a mount of a subPath.
    below: Option<String>,
}

impl<'a> VolumePath<'a> {
    fn parse(source: &'a str, pod_uid: &str) -> Option<Self> {
        let components: Vec<&str> = source.split('/').collect();
        let is_pods = |uid: &str| !uid.is_empty() && (pod_uid.is_empty() || uid == pod_uid);
        let at = |pods: usize| {
            let (name, below) = match components[pods..] {
                ["pods", uid, "volumes", "kubernetes.io~empty-dir", name, ref below @ ..] if is_pods(uid) => {
                    (name, Some(below.join("/")))
                }
                ["pods", uid, "volume-subpaths", name, _container, _number] if is_pods(uid) => (name, None),
                _ => return None,
            };
            let pod = components[..pods + 2].join("/");
            let volume = PathBuf::from(format!("{pod}/volumes/kubernetes.io~empty-dir/{name}"));
            is_one_component(name).then_some(Self { volume, name, below })
        };
        (0..components.len()).find_map(at)
    }

    /// The part of the volume that the source is; `None` if it is of another file system than the volume's mount.
    fn sub_path(&self, source: &Path, volume: &MountEntry) -> io::Result<Option<String>> {
        if let Some(below) = &self.below {
            return Ok(Some(below.clone()));
        }
        let Some(mount) = mounts::entry_at(source)?.filter(|mount| mount.device == volume.device) else {
            return Ok(None);
        };
        if mount.root.as_os_str().as_encoded_bytes().ends_with(REMOVED) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the directory of a subPath has been removed",
            ));
        }
        let root = mount.root.to_str().ok_or_else(|| io::Error::other("a subPath is not valid UTF-8"))?;
        Ok(Some(root.trim_start_matches('/').to_owned()))
    }
}

fn is_one_component(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(only)) if only == name) && components.next().is_none()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, chown},
    };

    use rustix::mount::{MountFlags, mount, mount_bind};

    use super::*;

    const UID: &str = "6f7c";

    #[test]
    fn only_a_path_of_an_empty_dir_of_the_pod_is_looked_at() {
        let volume = |root: &str, below| VolumePath {
            volume: format!("{root}/pods/6f7c/volumes/kubernetes.io~empty-dir/cache").into(),
            name: "cache",
            below,
        };
        let kubelet = "/var/lib/kubelet";
        for (source, expected) in [
            ("/pods/6f7c/volumes/kubernetes.io~empty-dir/cache", Some((kubelet, Some(String::new())))),
            ("/pods/6f7c/volumes/kubernetes.io~empty-dir/cache/a/b", Some((kubelet, Some("a/b".to_owned())))),
            ("/pods/6f7c/volume-subpaths/cache/web/0", Some((kubelet, None))),
            ("/pods/other/volumes/kubernetes.io~empty-dir/cache", None),
            ("/pods/other/volume-subpaths/cache/web/0", None),
            ("/pods/6f7c/volumes/kubernetes.io~secret/cache", None),
            ("/pods/6f7c/volumes/kubernetes.io~projected/cache", None),
            ("/pods/6f7c/volumes/kubernetes.io~empty-dir", None),
            ("/pods/6f7c/volumes/kubernetes.io~empty-dir/", None),
            ("/pods/6f7c/volumes/kubernetes.io~empty-dir/..", None),
            ("/pods/6f7c/volume-subpaths/cache/web", None),
            ("/pods/6f7c/volume-subpaths/cache/web/0/more", None),
            ("/pods/6f7c/etc-hosts", None),
            ("", None),
        ] {
            let source = format!("{kubelet}{source}");
            let expected = expected.map(|(root, below)| volume(root, below));
            assert_eq!(VolumePath::parse(&source, UID), expected, "{source}");
        }
        // Nobody knows the UID of a pod whose record is lost.
        let of_any = VolumePath::parse("/data/pods/6f7c/volumes/kubernetes.io~empty-dir/cache", "");
        assert_eq!(of_any, Some(volume("/data", Some(String::new()))));
    }

    /// kubelet's directory of a pod, with what is mounted in it.
    struct PodDirectory {
        directory: tempfile::TempDir,
        mounts: Vec<PathBuf>,
    }

    impl PodDirectory {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap(), mounts: Vec::new() }
        }

        /// Makes a directory, and returns its path.
        fn make(&self, name: &str) -> PathBuf {
            let path = self.directory.path().join(format!("pods/{UID}/{name}"));
            fs::create_dir_all(&path).unwrap();
            path
        }

        fn tmpfs(&mut self, name: &str) -> PathBuf {
            let path = self.make(name);
            mount("tmpfs", &path, "tmpfs", MountFlags::empty(), c"size=2m,nr_inodes=100").unwrap();
            self.mounts.push(path.clone());
            path
        }

        fn bind(&mut self, source: &Path, name: &str) -> PathBuf {
            let path = self.make(name);
            mount_bind(source, &path).unwrap();
            self.mounts.push(path.clone());
            path
        }
    }

    impl Drop for PodDirectory {
        fn drop(&mut self) {
            for mount in self.mounts.iter().rev() {
                mounts::detach(mount).unwrap();
            }
        }
    }

    fn set(path: &Path, mode: u32, owner: (u32, u32)) {
        chown(path, Some(owner.0), Some(owner.1)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn directory(path: &str, mode: u32, uid: u32, gid: u32) -> PreparedDirectory {
        PreparedDirectory { path: path.to_owned(), mode, uid, gid }
    }

    #[test]
    fn a_volume_in_memory_is_found_with_its_limits_and_what_kubelet_has_prepared() {
        let mut pod = PodDirectory::new();
        let volume = pod.tmpfs("volumes/kubernetes.io~empty-dir/cache");
        set(&volume, 0o2777, (0, 4242));
        fs::create_dir_all(volume.join("a/b c")).unwrap();
        set(&volume.join("a"), 0o2777, (0, 4242));
        set(&volume.join("a/b c"), 0o2750, (7, 4242));
        fs::write(volume.join("file"), "").unwrap();
        let whole = MemoryEmptyDir::at(&volume, UID).unwrap().unwrap();
        let root = directory("", 0o2777, 0, 4242);
        let expected = MemoryEmptyDir {
            name: "cache".to_owned(),
            size_bytes: 2 << 20,
            inodes: 100,
            sub_path: String::new(),
            directories: vec![root.clone()],
        };
        assert_eq!(whole, expected);

        let part = MemoryEmptyDir {
            sub_path: "a/b c".to_owned(),
            directories: vec![root, directory("a", 0o2777, 0, 4242), directory("a/b c", 0o2750, 7, 4242)],
            ..expected.clone()
        };
        let mounted = pod.bind(&volume.join("a/b c"), "volume-subpaths/cache/web/0");
        assert_eq!(MemoryEmptyDir::at(&mounted, UID).unwrap().unwrap(), part);
        assert_eq!(MemoryEmptyDir::at(&volume.join("a/b c"), UID).unwrap().unwrap(), part);
        let of_file = MemoryEmptyDir::at(&volume.join("file"), UID).unwrap().unwrap();
        assert_eq!(of_file, MemoryEmptyDir { sub_path: "file".to_owned(), ..expected });
        assert_eq!(MemoryEmptyDir::at(&mounted, "other").unwrap(), None);

        fs::remove_dir(volume.join("a/b c")).unwrap();
        assert_eq!(MemoryEmptyDir::at(&mounted, UID).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(MemoryEmptyDir::at(&volume.join("a/b c"), UID).is_err());
    }

    #[test]
    fn other_volumes_are_none_wherever_they_are() {
        let mut pod = PodDirectory::new();
        // kubelet's directory may be in a tmpfs: an emptyDir on disk is then in it, and is no mount.
        let disk = pod.make("volumes/kubernetes.io~empty-dir/disk");
        assert_eq!(MemoryEmptyDir::at(&disk, UID).unwrap(), None);
        let around = pod.tmpfs("volumes/kubernetes.io~empty-dir");
        let inside = pod.make("volumes/kubernetes.io~empty-dir/disk");
        assert!(inside.starts_with(around));
        assert_eq!(MemoryEmptyDir::at(&inside, UID).unwrap(), None);
        let secret = pod.tmpfs("volumes/kubernetes.io~secret/token");
        assert_eq!(MemoryEmptyDir::at(&secret, UID).unwrap(), None);
        // A volume of another kind may have the name of one in memory; its subPath is on another file system.
        pod.tmpfs("volumes/kubernetes.io~empty-dir/cache");
        let other = pod.bind(&secret, "volume-subpaths/cache/web/0");
        assert_eq!(MemoryEmptyDir::at(&other, UID).unwrap(), None);
        // Only part of a file system, which is no volume of kubelet's making.
        fs::create_dir(secret.join("part")).unwrap();
        let part = pod.bind(&secret.join("part"), "volumes/kubernetes.io~empty-dir/part");
        assert_eq!(MemoryEmptyDir::at(&part, UID).unwrap(), None);
        let missing = pod.make("volumes").join("kubernetes.io~empty-dir/none");
        assert_eq!(MemoryEmptyDir::at(&missing, UID).unwrap(), None);
    }
}
