//! The kernel's mount interface (`open_tree`, `move_mount`, `mount_setattr`) as the share needs it.
//! Everything works on descriptors: a path is resolved once and never twice.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::ffi::OsStringExt as _,
    },
    path::{Path, PathBuf},
    thread,
};

use pericarp_jail::set_mount_attributes;
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, openat2, statx},
    io::Errno,
    mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount},
    thread::{UnshareFlags, unshare_unsafe},
};
use thiserror::Error;

/// What could not be done with a path.
#[derive(Debug, Error)]
#[error("cannot {action} {}", path.display())]
pub struct MountError {
    /// For example "mount".
    pub action: &'static str,
    /// The path.
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

impl MountError {
    /// For `map_err`.
    pub fn new<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> MountError {
        move |source| MountError { action, path: path.into(), source: source.into() }
    }
}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> io::Error {
        io::Error::new(error.source.kind(), error)
    }
}

/// What happens to mounts that are made below a mount's source later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetPropagation {
    /// They do not appear (`MS_PRIVATE`).
    Private,
    /// They appear, and none made here appears there (`MS_SLAVE`).
    Slave,
}

/// Opens a path as a place (`O_PATH`), following no symbolic link anywhere in it.
pub fn open_place(path: &Path) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Opens a place below a directory, which the path cannot leave.
pub fn open_place_below(directory: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    openat2(directory, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Opens a path of containerd's own state as a place, wherever its symbolic links lead:
/// `/var/lib/containerd` may well be one.
pub fn open_trusted_place(path: &Path) -> rustix::io::Result<OwnedFd> {
    openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())
}

/// A copy of the mount at a place, attached nowhere yet: what `mount --bind`, or `--rbind`, attaches.
pub fn clone_tree(place: impl AsFd, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    open_tree(place, "", flags)
}

/// Attaches a detached mount at a place.
pub fn attach(mount: impl AsFd, place: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", place, "", flags)
}

/// Whether a place is where something is mounted.
pub fn is_mount(place: impl AsFd) -> rustix::io::Result<bool> {
    // Without asking the file system, which may wait for a server.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = statx(place, "", flags, StatxFlags::empty())?;
    Ok(statx.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Lets a mount be written, but not those below it that may not.
pub fn set_writable(mount: impl AsFd) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    set_mount_attributes(mount, false, &attributes)
}

/// Makes a mount read-only.
pub fn set_read_only(mount: impl AsFd, recursive: bool) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    set_mount_attributes(mount, recursive, &attributes)
}

/// Takes from a detached mount, and from all mounts below it, what only matters to a process of the host's that uses
/// them: devices cannot be opened, programs cannot be executed, and give no privileges. Whoever has an image can put a
/// node of any device of the host's into it; in a guest, it is a node of the guest's.
pub fn make_inert(mount: impl AsFd) -> io::Result<()> {
    let flags = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    let attributes = libc::mount_attr { attr_set: flags, attr_clr: 0, propagation: 0, userns_fd: 0 };
    set_mount_attributes(mount, true, &attributes)
}

/// Has a detached mount show its files' ids as a user namespace has them outside.
pub fn map_ids(mount: impl AsFd, user_namespace: impl AsFd, recursive: bool) -> io::Result<()> {
    let userns_fd = user_namespace.as_fd().as_raw_fd();
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        // A descriptor is no negative number.
        userns_fd: u64::try_from(userns_fd).map_err(|_| Errno::BADF)?,
    };
    set_mount_attributes(mount, recursive, &attributes)
}

/// Does `work` on a thread with a mount namespace of its own, in which nothing propagates. What is mounted there is
/// seen by nobody else, and is gone with the thread; only a detached mount can be brought out.
pub fn in_own_mount_namespace<T: Send, E: From<io::Error> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("mounts".into())
            .spawn_scoped(scope, || {
                // SAFETY: only this thread's mounts and directories become its own; memory and descriptors stay shared.
                unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(io::Error::from)?;
                let root = open_trusted_place(Path::new("/")).map_err(io::Error::from)?;
                set_propagation(&root, SetPropagation::Private)?;
                work()
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked").into()))
    })
}

/// Sets the propagation of a mount and of all mounts below it.
pub fn set_propagation(mount: impl AsFd, propagation: SetPropagation) -> io::Result<()> {
    let propagation = match propagation {
        SetPropagation::Private => libc::MS_PRIVATE,
        SetPropagation::Slave => libc::MS_SLAVE,
    };
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
    set_mount_attributes(mount, true, &attributes)
}

/// All mounts of this process's mount namespace at one moment. A busy node has thousands: read it once for many
/// questions.
pub struct MountTable(Vec<u8>);

impl MountTable {
    /// Reads it.
    pub fn read() -> io::Result<Self> {
        fs::read("/proc/self/mountinfo").map(Self)
    }

    /// Whether anything is mounted below a path.
    pub fn any_below(&self, path: &Path) -> bool {
        // proc_pid_mountinfo(5): the fifth field is the mount's place.
        let lines = self.0.split(|byte| *byte == b'\n');
        let places = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
        places.map(unescaped).any(|place| place != path && place.starts_with(path))
    }
}

/// A mount, as the mount table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The numbers of its file system's device, "major:minor".
    pub device: Vec<u8>,
    /// The directory or file of the file system that is mounted; `/` is all of it. One that has been removed ends with
    /// `//deleted`.
    pub root: PathBuf,
}

/// The mount at a path, the topmost if there are several; `None` if the path is not where something is mounted.
pub fn entry_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(entry_in(&MountTable::read()?.0, path))
}

/// Finds a mount in a table. Its third to fifth field are the device, the root and the place (`proc_pid_mountinfo(5)`).
fn entry_in(table: &[u8], path: &Path) -> Option<MountEntry> {
    table.split(|byte| *byte == b'\n').rev().find_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        let (device, root, place) = (fields.next()?, fields.next()?, fields.next()?);
        (unescaped(place) == path).then(|| MountEntry { device: device.to_owned(), root: unescaped(root) })
    })
}

/// A path of the mount table, where blanks, line ends and backslashes are written as `\ooo`.
fn unescaped(place: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(place.len());
    let mut rest = place;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = escaped.filter(|_| *first == b'\\') {
            bytes.push(byte);
            rest = &after[3..];
        } else {
            bytes.push(*first);
            rest = after;
        }
    }
    OsString::from_vec(bytes).into()
}

/// Takes away whatever is mounted at a path with all that is mounted below it, also while it is in
/// use. Nothing need be mounted there.
pub fn detach(path: &Path) -> Result<(), MountError> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(MountError::new("unmount", path)(errno)),
        }
    }
}

/// The directory `path` itself, without anything that is mounted on it or below it.
pub fn below_mounts(path: &Path) -> Result<OwnedFd, MountError> {
    let (parent, name) = split(path)?;
    let place = open_place(parent).map_err(MountError::new("open", parent))?;
    let alone = clone_tree(place, false).map_err(MountError::new("open", parent))?;
    open_place_below(alone, name).map_err(MountError::new("open", path))
}

/// Removes a directory and everything in it, but never what is mounted below it: while something is,
/// this fails, and nothing of the mounted tree is touched. It may have gone already.
pub fn remove_tree(path: &Path) -> Result<(), MountError> {
    let (parent, name) = split(path)?;
    let place = match open_place(parent) {
        Err(Errno::NOENT) => return Ok(()),
        place => place.map_err(MountError::new("open", parent))?,
    };
    let alone = clone_tree(place, false).map_err(MountError::new("open", parent))?;
    match fs::remove_dir_all(descriptor_path(&alone).join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(MountError::new("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A path that leads to an open descriptor, for interfaces that take only paths.
pub fn descriptor_path(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

fn split(path: &Path) -> Result<(&Path, &Path), MountError> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent, Path::new(name))),
        _ => Err(MountError::new("use", path)(io::Error::from(io::ErrorKind::InvalidInput))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_a_path_are_found_and_the_path_itself_is_none() {
        let any_below = |path: &Path| MountTable::read().unwrap().any_below(path);
        // Wherever there is a mount table, it is in /proc.
        assert!(any_below(Path::new("/")));
        assert!(!any_below(Path::new("/no/such/directory")));
        let directory = tempfile::tempdir().unwrap();
        let outer = directory.path().join("with blanks");
        fs::create_dir_all(outer.join("inner")).unwrap();
        let mount = |at: &Path| {
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("tmpfs", at, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
        };
        mount(&outer);
        assert!(any_below(directory.path()));
        let found = any_below(&outer);
        fs::create_dir(outer.join("inner")).unwrap();
        mount(&outer.join("inner"));
        let found_inner = any_below(&outer);
        detach(&outer.join("inner")).unwrap();
        detach(&outer).unwrap();
        assert!(!found && found_inner);
    }

    #[test]
    fn the_topmost_mount_at_a_path_is_found_with_its_device_and_root() {
        let table = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 21 0:40 / /pods/a\\040b rw - tmpfs tmpfs rw\n\
            31 30 0:41 /sub/path /pods/a\\040b rw - tmpfs tmpfs rw\n";
        let entry = |device: &str, root: &str| MountEntry { device: device.into(), root: root.into() };
        assert_eq!(entry_in(table, Path::new("/pods/a b")), Some(entry("0:41", "/sub/path")));
        assert_eq!(entry_in(table, Path::new("/")), Some(entry("8:1", "/")));
        assert_eq!(entry_in(table, Path::new("/pods")), None);
        assert_eq!(entry_at(Path::new("/proc")).unwrap().unwrap().root, Path::new("/"));
    }

    #[test]
    fn a_place_in_the_mount_table_is_read_as_it_was_written() {
        for (written, read) in
            [("/a\\040b", "/a b"), ("/a\\134040", "/a\\040"), ("/a\\04", "/a\\04"), ("/", "/")]
        {
            assert_eq!(unescaped(written.as_bytes()), Path::new(read), "{written}");
        }
    }
}
