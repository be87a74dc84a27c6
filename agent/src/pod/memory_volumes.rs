//! Volumes in memory: emptyDirs whose medium is memory.
//!
//! A volume is a tmpfs of the guest. It is mounted for the first container that has it, and stays until the pod ends.
//! A container's `subPath` is a directory in it, which may be anything by the time it is mounted: another container can
//! put a symbolic link to the guest's own files there. So the agent opens it without leaving the volume, and mounts
//! what it has opened at a path that no container can change. kubelet does so on the host (kubernetes:
//! `pkg/volume/util/subpath`, `doBindSubPath`).

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::{Component, Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use oci_spec::runtime::Spec;
use pericarp_protos::{
    guest::MEMORY_DIR,
    host::{Directory, MemoryVolume},
};
use rustix::{
    fs::{FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fstat, mkdirat, openat2},
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount},
};

/// Where the parts of volumes are mounted that containers have as `subPath`.
const SUB_PATHS_DIR: &str = "/run/pericarp/memory-sub-paths";

/// The permission bits of a directory, with setuid, setgid and sticky.
const MODE_BITS: u32 = 0o7777;

/// Why a container cannot have its volumes in memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryVolumeError {
    /// The name of a volume is not one component of a path.
    #[error("{0:?} is not the name of a volume in memory")]
    Name(String),
    /// A volume has no root directory, or one of its directories is not in it.
    #[error("{path:?} is not a directory that can be made in the volume {volume:?}")]
    Path {
        /// The volume's name.
        volume: String,
        /// Below the volume's root.
        path: String,
    },
    /// The spec mounts a volume that the controller has not described.
    #[error("the volume at {destination:?} is in memory, and nothing is known of it")]
    Unknown {
        /// Its path in the container.
        destination: PathBuf,
    },
    /// A volume cannot be mounted.
    #[error("cannot mount the volume {volume:?} in memory: {source}")]
    Mount {
        /// The volume's name.
        volume: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory cannot be made in a volume.
    #[error("cannot make the directory {path:?} in the volume {volume:?}: {source}")]
    Directory {
        /// The volume's name.
        volume: String,
        /// Below the volume's root.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A `subPath` is not there, or leads out of its volume.
    #[error("cannot use the subPath {path:?} of the volume {volume:?}: {source}")]
    SubPath {
        /// The volume's name.
        volume: String,
        /// Below the volume's root.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The volumes in memory of the pod.
#[derive(Debug)]
pub struct MemoryVolumes {
    directory: PathBuf,
    sub_paths: PathBuf,
    /// Locked while a volume is mounted, so that it is mounted once.
    mounting: Mutex<()>,
    /// The number that the next mount of a `subPath` gets.
    next_sub_path: AtomicU64,
}

impl Default for MemoryVolumes {
    fn default() -> Self {
        Self::at(Path::new(MEMORY_DIR), Path::new(SUB_PATHS_DIR))
    }
}

/// The `subPath`s of a container that are mounted for it. They are unmounted when this is dropped.
#[derive(Debug, Default)]
pub struct MountedSubPaths(Vec<PathBuf>);

impl MemoryVolumes {
    fn at(directory: &Path, sub_paths: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            sub_paths: sub_paths.to_owned(),
            mounting: Mutex::default(),
            next_sub_path: AtomicU64::default(),
        }
    }

    /// Mounts the volumes of a new container that are not mounted yet, makes the directories that are missing in them,
    /// and mounts the `subPath`s that its spec names, which is changed to use them.
    pub fn mount(
        &self,
        spec: &mut Spec,
        volumes: &[MemoryVolume],
    ) -> Result<MountedSubPaths, MemoryVolumeError> {
        for volume in volumes {
            self.prepare(volume)?;
        }
        let mut mounted = MountedSubPaths::default();
        for entry in spec.mounts_mut().iter_mut().flatten() {
            let source = entry.source().clone().unwrap_or_default();
            let Ok(inside) = source.strip_prefix(&self.directory) else { continue };
            let mut components = inside.components();
            let name = components.next().and_then(|name| name.as_os_str().to_str()).unwrap_or_default();
            if !volumes.iter().any(|volume| volume.name == name) {
                return Err(MemoryVolumeError::Unknown { destination: entry.destination().clone() });
            }
            let sub_path = components.as_path();
            if !sub_path.as_os_str().is_empty() {
                let mount_point = self.mount_sub_path(name, sub_path, &mut mounted)?;
                entry.set_source(Some(mount_point));
            }
        }
        Ok(mounted)
    }

    /// Mounts a volume, unless it is mounted, and makes its directories.
    fn prepare(&self, volume: &MemoryVolume) -> Result<(), MemoryVolumeError> {
        let name = volume.name.as_str();
        if !is_one_component(name) {
            return Err(MemoryVolumeError::Name(volume.name.clone()));
        }
        let invalid = |path: &str| MemoryVolumeError::Path { volume: name.to_owned(), path: path.to_owned() };
        let (root, directories) = volume.directories.split_first().ok_or_else(|| invalid(""))?;
        if !root.path.is_empty() {
            return Err(invalid(&root.path));
        }
        let failed = |source| MemoryVolumeError::Mount { volume: name.to_owned(), source };
        self.mount_once(volume, root).map_err(failed)?;
        if directories.is_empty() {
            return Ok(());
        }
        let opened = open_root(&self.directory.join(name)).map_err(failed)?;
        for directory in directories {
            let path = Path::new(&directory.path);
            let is_inside = path.components().all(|component| matches!(component, Component::Normal(_)));
            let (Some(parent), Some(last), true) = (path.parent(), path.file_name(), is_inside) else {
                return Err(invalid(&directory.path));
            };
            make_directory(&opened, parent, Path::new(last), directory).map_err(|source| {
                MemoryVolumeError::Directory { volume: name.to_owned(), path: directory.path.clone(), source }
            })?;
        }
        Ok(())
    }

    /// Mounts a volume if it is not mounted yet.
    fn mount_once(&self, volume: &MemoryVolume, root: &Directory) -> io::Result<()> {
        let mount_point = self.directory.join(&volume.name);
        let MemoryVolume { size_bytes, inodes, .. } = volume;
        let Directory { uid, gid, .. } = root;
        let mode = root.mode & MODE_BITS;
        let options = format!("size={size_bytes},nr_inodes={inodes},mode={mode:o},uid={uid},gid={gid}");
        let options = CString::new(options)?;
        // What it protects is on disk, so nothing is inconsistent after a panic.
        let _mounting = self.mounting.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir_all(&self.directory)?;
        match fs::create_dir(&mount_point) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            created => created?,
        }
        // Without flags, as kubelet mounts it (kubernetes: `pkg/volume/emptydir`, `setupTmpfs`).
        mount("tmpfs", &mount_point, "tmpfs", MountFlags::empty(), options.as_c_str()).map_err(|errno| {
            let _ = fs::remove_dir(&mount_point);
            errno.into()
        })
    }

    /// Mounts a part of a volume at a path of its own, and returns that.
    fn mount_sub_path(
        &self,
        name: &str,
        sub_path: &Path,
        mounted: &mut MountedSubPaths,
    ) -> Result<PathBuf, MemoryVolumeError> {
        let number = self.next_sub_path.fetch_add(1, Ordering::Relaxed);
        let mount_point = self.sub_paths.join(number.to_string());
        let failed = |source| MemoryVolumeError::SubPath {
            volume: name.to_owned(),
            path: sub_path.to_owned(),
            source,
        };
        let root = open_root(&self.directory.join(name)).map_err(failed)?;
        let opened = open_inside(root, sub_path).map_err(|errno| failed(errno.into()))?;
        fs::create_dir_all(&self.sub_paths).map_err(failed)?;
        // Before anything is made, so that it is removed if that fails halfway.
        mounted.0.push(mount_point.clone());
        bind(&opened, &mount_point).map_err(failed)?;
        Ok(mount_point)
    }
}

impl Drop for MountedSubPaths {
    fn drop(&mut self) {
        for mount_point in &self.0 {
            // This fails if mounting has failed.
            let _ = unmount(mount_point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
            let removed = match fs::remove_dir(mount_point) {
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => fs::remove_file(mount_point),
                removed => removed,
            };
            if let Err(error) = removed
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %mount_point.display(), %error, "cannot remove the mount of a subPath");
            }
        }
    }
}

fn is_one_component(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(only)) if only == name) && components.next().is_none()
}

/// Opens the root of a volume, at a path where containers can change nothing.
fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a path in a volume. Symbolic links that lead out of the volume, or begin at `/`, are an error, as they are to
/// kubelet.
fn open_inside(root: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Mounts what has been opened at a path that does not exist yet.
fn bind(opened: &OwnedFd, mount_point: &Path) -> io::Result<()> {
    match FileType::from_raw_mode(fstat(opened)?.st_mode) {
        FileType::Directory => fs::create_dir(mount_point)?,
        _ => fs::write(mount_point, "")?,
    }
    Ok(mount_bind(format!("/proc/self/fd/{}", opened.as_raw_fd()), mount_point)?)
}

/// Makes a directory in a volume with its owner and mode. What is there already stays as it is.
fn make_directory(root: &OwnedFd, parent: &Path, name: &Path, directory: &Directory) -> io::Result<()> {
    let parent = open_inside(root, parent)?;
    match mkdirat(&parent, name, Mode::RWXU) {
        Err(Errno::EXIST) => return Ok(()),
        made => made?,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = openat2(&parent, name, flags, Mode::empty(), ResolveFlags::BENEATH)?;
    fchown(&made, Some(Uid::from_raw(directory.uid)), Some(Gid::from_raw(directory.gid)))?;
    // Afterwards, because a change of the owner removes some bits.
    Ok(fchmod(&made, Mode::from_raw_mode(directory.mode & MODE_BITS))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};

    use serde_json::json;

    use super::*;

    /// A pod's volumes in directories of a test. Whatever is mounted is unmounted in the end.
    struct TestVolumes {
        directory: tempfile::TempDir,
        volumes: MemoryVolumes,
    }

    impl TestVolumes {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let volumes =
                MemoryVolumes::at(&directory.path().join("memory"), &directory.path().join("sub-paths"));
            Self { directory, volumes }
        }

        fn path(&self, path: &str) -> PathBuf {
            self.directory.path().join(path)
        }

        /// A spec that mounts these paths of volumes, each at `/mnt`.
        fn spec(&self, sources: &[&str]) -> Spec {
            let mounts = sources.iter().map(|source| {
                let source = self.path("memory").join(source);
                json!({ "destination": "/mnt", "type": "bind", "source": source, "options": ["rbind", "ro"] })
            });
            let mounts: Vec<_> = mounts.collect();
            serde_json::from_value(json!({ "ociVersion": "1.2.0", "mounts": mounts })).unwrap()
        }

        fn mount(
            &self,
            sources: &[&str],
            volumes: &[MemoryVolume],
        ) -> Result<(Vec<PathBuf>, MountedSubPaths), MemoryVolumeError> {
            let mut spec = self.spec(sources);
            let mounted = self.volumes.mount(&mut spec, volumes)?;
            let sources = spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap());
            Ok((sources.collect(), mounted))
        }
    }

    impl Drop for TestVolumes {
        fn drop(&mut self) {
            for volume in fs::read_dir(self.path("memory")).into_iter().flatten().flatten() {
                let _ = unmount(volume.path(), UnmountFlags::DETACH);
            }
        }
    }

    fn directory(path: &str, mode: u32, uid: u32, gid: u32) -> Directory {
        let mut directory = Directory::new();
        path.clone_into(&mut directory.path);
        (directory.mode, directory.uid, directory.gid) = (mode, uid, gid);
        directory
    }

    fn volume(name: &str, directories: Vec<Directory>) -> MemoryVolume {
        let mut volume = MemoryVolume::new();
        name.clone_into(&mut volume.name);
        (volume.size_bytes, volume.inodes, volume.directories) = (1 << 20, 100, directories);
        volume
    }

    fn cache(further: &[Directory]) -> MemoryVolume {
        volume("cache", [&[directory("", 0o2777, 7, 4242)], further].concat())
    }

    fn mode_and_owner(path: &Path) -> (u32, u32, u32) {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.mode() & MODE_BITS, metadata.uid(), metadata.gid())
    }

    #[test]
    fn a_volume_is_mounted_once_with_its_limits_and_owner_and_stays() {
        let test = TestVolumes::new();
        let (sources, mounted) = test.mount(&["cache"], &[cache(&[])]).unwrap();
        let root = test.path("memory/cache");
        assert_eq!(sources, std::slice::from_ref(&root));
        assert_eq!(mode_and_owner(&root), (0o2777, 7, 4242));
        let limits = rustix::fs::statfs(&root).unwrap();
        assert_eq!((limits.f_type, limits.f_files), (0x0102_1994, 100));
        assert_eq!(limits.f_blocks * u64::try_from(limits.f_bsize).unwrap(), 1 << 20);
        let error = fs::write(root.join("large"), vec![0; 2 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        fs::remove_file(root.join("large")).unwrap();
        fs::write(root.join("file"), "kept").unwrap();
        drop(mounted);
        // The next container finds it as it is, whatever the controller says of it then.
        let other = volume("cache", vec![directory("", 0o700, 0, 0)]);
        let _mounted = test.mount(&["cache", "cache"], &[other.clone(), other]).unwrap();
        assert_eq!(fs::read_to_string(root.join("file")).unwrap(), "kept");
        assert_eq!(mode_and_owner(&root), (0o2777, 7, 4242));
    }

    #[test]
    fn a_sub_path_is_mounted_while_its_container_exists_and_is_made_if_it_is_missing() {
        let test = TestVolumes::new();
        let volume = cache(&[directory("a", 0o2777, 7, 4242), directory("a/b c", 0o1770, 5, 6)]);
        let (sources, mounted) =
            test.mount(&["cache/a/b c", "cache"], std::slice::from_ref(&volume)).unwrap();
        let root = test.path("memory/cache");
        assert_eq!(sources, [test.path("sub-paths/0"), root.clone()]);
        for (path, expected) in [("a", (0o2777, 7, 4242)), ("a/b c", (0o1770, 5, 6))] {
            assert_eq!(mode_and_owner(&root.join(path)), expected);
        }
        fs::write(sources[0].join("file"), "shared").unwrap();
        assert_eq!(fs::read_to_string(root.join("a/b c/file")).unwrap(), "shared");
        // A second container has the same directory, which is not changed again.
        fs::set_permissions(root.join("a/b c"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let (others, other) = test.mount(&["cache/a/b c"], &[volume]).unwrap();
        assert_eq!(fs::read_to_string(others[0].join("file")).unwrap(), "shared");
        assert_eq!(mode_and_owner(&others[0]), (0o700, 5, 6));
        drop(mounted);
        assert!(!sources[0].exists() && others[0].join("file").exists());
        drop(other);
        assert_eq!(fs::read_dir(test.path("sub-paths")).unwrap().count(), 0);
        assert!(root.join("a/b c/file").exists());
    }

    #[test]
    fn a_sub_path_is_what_a_container_has_put_there() {
        let test = TestVolumes::new();
        let _first = test.mount(&["cache"], &[cache(&[])]).unwrap();
        let root = test.path("memory/cache");
        fs::create_dir(root.join("real")).unwrap();
        fs::write(root.join("real/file"), "content").unwrap();
        symlink("real", root.join("link")).unwrap();
        // kubelet has made directories of these names on the host, where it sees neither the file nor the link.
        let volume = cache(&[directory("link", 0o777, 0, 0), directory("link/file", 0o777, 0, 0)]);
        let (sources, _mounted) = test.mount(&["cache/link/file", "cache/link"], &[volume]).unwrap();
        assert_eq!(fs::read_to_string(&sources[0]).unwrap(), "content");
        assert_eq!(fs::read_to_string(sources[1].join("file")).unwrap(), "content");
    }

    #[test]
    fn a_sub_path_cannot_lead_out_of_its_volume() {
        let test = TestVolumes::new();
        let _first = test.mount(&["cache"], &[cache(&[])]).unwrap();
        let root = test.path("memory/cache");
        fs::create_dir(test.path("secret")).unwrap();
        for (name, target) in [("up", "../../secret"), ("root", "/"), ("process", "/proc/self/root")] {
            symlink(target, root.join(name)).unwrap();
            let direct = cache(&[directory(name, 0o777, 0, 0)]);
            let error = test.mount(&[&format!("cache/{name}")], &[direct]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::SubPath { .. }), "{name}: {error}");
            let below =
                cache(&[directory(name, 0o777, 0, 0), directory(&format!("{name}/new"), 0o777, 0, 0)]);
            let error = test.mount(&[&format!("cache/{name}/new")], &[below]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::Directory { .. }), "{name}: {error}");
        }
        assert!(!test.path("secret/new").exists() && !Path::new("/new").exists());
        let missing = test.mount(&["cache/missing"], &[cache(&[])]).unwrap_err();
        assert!(matches!(missing, MemoryVolumeError::SubPath { .. }), "{missing}");
        assert_eq!(fs::read_dir(test.path("sub-paths")).into_iter().flatten().count(), 0);
    }

    #[test]
    fn a_volume_that_is_described_wrongly_is_refused() {
        let test = TestVolumes::new();
        for name in ["../x", "/etc", "a/b", "", "..", ".", "a/"] {
            let error = test.mount(&[], &[volume(name, vec![directory("", 0o777, 0, 0)])]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::Name(_)), "{name}: {error}");
        }
        let without_root = [vec![], vec![directory("a", 0o777, 0, 0)]];
        for directories in without_root {
            let error = test.mount(&[], &[volume("cache", directories)]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::Path { .. }), "{error}");
        }
        for path in ["", "..", "../x", "/x", "a/../../x", "."] {
            let error = test.mount(&[], &[cache(&[directory(path, 0o777, 0, 0)])]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::Path { .. }), "{path}: {error}");
        }
        for source in ["other", "", "other/cache"] {
            let error = test.mount(&[source], &[cache(&[])]).unwrap_err();
            assert!(matches!(error, MemoryVolumeError::Unknown { .. }), "{source}: {error}");
        }
    }
}
