//! A container's working directory. It is created if the image does not have it, as runc does
//! (`libcontainer/rootfs_linux.go`, `prepareRootfs`). libcontainer only changes to it.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use oci_spec::runtime::Spec;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat2},
    io::Errno,
    thread::{CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits},
};

/// Creates the working directory of a container's first process, before the container has its mounts. The directory is
/// created in the root file system or, if it lies below a volume, in that volume.
///
/// Symbolic links of the image do not lead out of it. A directory that cannot be created is only logged: changing to it
/// fails later. `owner` has the user and group ids of the container's root in the guest.
pub fn create(spec: &Spec, owner: Option<(u32, u32)>) -> io::Result<()> {
    let Some((base, path)) = locate(spec) else { return Ok(()) };
    if let Err(error) = as_owner(owner, || create_in(&base, &path))? {
        tracing::warn!(base = %base.display(), path = %path.display(), %error, "cannot create the working directory");
    }
    Ok(())
}

/// The directory that will be mounted at or above the working directory, and the path from there. `None` if a file
/// system other than a bind mount will be mounted there.
fn locate(spec: &Spec) -> Option<(PathBuf, PathBuf)> {
    let path = spec.process().as_ref()?.cwd();
    let mounts = spec.mounts().iter().flatten();
    let innermost = mounts
        .filter(|mount| path.starts_with(mount.destination()) && mount.destination() != Path::new("/"))
        .max_by_key(|mount| mount.destination().as_os_str().len());
    match innermost {
        None => Some((spec.root().as_ref()?.path().clone(), path.strip_prefix("/").ok()?.to_owned())),
        Some(mount) => {
            let bind = mount.typ().as_deref().is_some_and(|kind| matches!(kind, "bind" | "rbind"));
            let below = path.strip_prefix(mount.destination()).ok()?.to_owned();
            bind.then(|| mount.source().clone()).flatten().map(|source| (source, below))
        }
    }
}

/// Creates a directory and its parents in `base`.
fn create_in(base: &Path, path: &Path) -> io::Result<()> {
    let base = openat2(CWD, base, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())?;
    let mut walked = PathBuf::new();
    for component in path.components() {
        let Component::Normal(name) = component else { return Err(Errno::INVAL.into()) };
        let parent = open(&base, &walked)?;
        walked.push(name);
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Runs `work` so that the files that it creates belong to `owner`, with all privileges. This process must have one
/// thread.
fn as_owner<T>(owner: Option<(u32, u32)>, work: impl FnOnce() -> T) -> io::Result<T> {
    let Some((uid, gid)) = owner.filter(|owner| *owner != (0, 0)) else { return Ok(work()) };
    let before = capabilities_secure_bits()?;
    set_capabilities_secure_bits(before | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    setfsgid(Gid::from_raw(gid));
    setfsuid(Uid::from_raw(uid));
    let done = work();
    setfsuid(Uid::from_raw(0));
    setfsgid(Gid::from_raw(0));
    set_capabilities_secure_bits(before)?;
    Ok(done)
}

/// Opens a directory as the container will see it: symbolic links are resolved with `base` as the root.
fn open(base: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(base, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, symlink},
    };

    use super::*;

    #[test]
    fn a_missing_directory_is_made_with_its_parents() {
        let root = tempfile::tempdir().unwrap();
        create_in(root.path(), Path::new("a/b/c")).unwrap();
        create_in(root.path(), Path::new("a/b/c")).unwrap();
        assert!(root.path().join("a/b/c").is_dir());
    }

    #[test]
    fn a_directory_is_made_as_its_owner_who_may_make_it_anywhere() {
        let root = tempfile::tempdir().unwrap();
        create_in(root.path(), Path::new("roots")).unwrap();
        // A thread of its own, so that the other tests' threads keep their user.
        std::thread::scope(|scope| {
            let made =
                scope.spawn(|| as_owner(Some((7, 8)), || create_in(root.path(), Path::new("roots/own"))));
            made.join().unwrap().unwrap().unwrap();
        });
        let own = fs::metadata(root.path().join("roots/own")).unwrap();
        assert_eq!((own.uid(), own.gid()), (7, 8));
        create_in(root.path(), Path::new("roots/later")).unwrap();
        assert_eq!(fs::metadata(root.path().join("roots/later")).unwrap().uid(), 0);
    }

    #[test]
    fn links_of_the_image_do_not_lead_out_of_it() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), root.path().join("absolute")).unwrap();
        symlink("../../../../..", root.path().join("up")).unwrap();
        fs::create_dir(root.path().join("tmp")).unwrap();
        assert!(create_in(root.path(), Path::new("absolute/made")).is_err(), "it dangles inside the root");
        create_in(root.path(), Path::new("up/made")).unwrap();
        assert!(root.path().join("made").is_dir(), "above the root is the root");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(create_in(root.path(), Path::new("../x")).is_err());
    }

    #[test]
    fn a_directory_below_a_volume_is_made_in_the_volume() {
        let json = r#"{"ociVersion":"1.2.0","process":{"cwd":"/data/in/work","user":{"uid":0,"gid":0}},
            "root":{"path":"/share/c/rootfs"},"mounts":[
            {"destination":"/data","type":"bind","source":"/share/c/volumes/0"},
            {"destination":"/data/in","type":"bind","source":"/share/c/volumes/1"},
            {"destination":"/proc","type":"proc","source":"proc"}]}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();
        assert_eq!(locate(&spec), Some(("/share/c/volumes/1".into(), "work".into())));
        let process = spec.process_mut().as_mut().unwrap();
        process.set_cwd("/srv/x".into());
        assert_eq!(locate(&spec), Some(("/share/c/rootfs".into(), "srv/x".into())));
        spec.process_mut().as_mut().unwrap().set_cwd("/proc/x".into());
        assert_eq!(locate(&spec), None);
    }
}
