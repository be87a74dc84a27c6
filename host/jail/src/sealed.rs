//! Files that a machine is handed, or opens before it leaves the host's files, so that it can use them and change
//! nothing else about them.
//!
//! A descriptor is more than its reads and writes: with it, whoever may change files of any owner changes the owner and
//! the permissions of the file, and opens it again for more. `/dev/null` and `/dev/kvm` are the whole host's. The mount
//! through which a file is opened forbids both.

use std::{
    ffi::CString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd as _},
        unix::{ffi::OsStrExt as _, fs::OpenOptionsExt as _},
    },
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// For a device: a regular file cannot be opened for writing so.
    ReadAndWrite,
}

/// Opens a file through a mount of its own, which is read-only, and on which devices cannot be opened any more.
/// `flags` are added to those of open(2).
///
/// # Errors
///
/// What the kernel has refused; `EROFS` for a regular file that is to be written.
pub fn open_sealed(path: &Path, access: Access, flags: i32) -> io::Result<File> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mount = open_tree(CWD, &name, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    set_mount_attributes(&mount, false, &attributes(libc::MOUNT_ATTR_RDONLY))?;
    let file = File::options()
        .read(true)
        .write(access == Access::ReadAndWrite)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}", mount.as_raw_fd()))?;
    let none = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    set_mount_attributes(&mount, false, &attributes(none))?;
    Ok(file)
}

fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 }
}

/// `mount_setattr(2)`, for which rustix has no function yet.
pub fn set_mount_attributes(
    mount: impl AsFd,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the attributes live for the call and their size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Read as _, Write as _},
        os::unix::fs::PermissionsExt as _,
    };

    use rustix::{
        fs::{Mode, fchmod, fchown},
        io::Errno,
        process::{Gid, Uid},
    };

    use super::*;

    #[test]
    fn a_device_can_be_used_and_neither_changed_nor_opened_again() {
        let before = fs::metadata("/dev/null").unwrap().permissions().mode();
        let mut file = open_sealed(Path::new("/dev/null"), Access::ReadAndWrite, 0).unwrap();
        file.write_all(b"x").unwrap();
        assert_eq!(file.read(&mut [0; 8]).unwrap(), 0);
        assert_eq!(fchmod(&file, Mode::empty()), Err(Errno::ROFS));
        assert_eq!(fchown(&file, Some(Uid::from_raw(1)), Some(Gid::from_raw(1))), Err(Errno::ROFS));
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(fs::metadata("/dev/null").unwrap().permissions().mode(), before);
        // Everybody else has it as before.
        fs::write("/dev/null", "x").unwrap();
    }

    #[test]
    fn a_file_to_be_read_cannot_be_opened_again_to_be_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, "content").unwrap();
        let sealed = open_sealed(file.path(), Access::Read, 0).unwrap();
        assert_eq!(io::read_to_string(&sealed).unwrap(), "content");
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", sealed.as_raw_fd()));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(fchmod(&sealed, Mode::empty()), Err(Errno::ROFS));
        let error = open_sealed(file.path(), Access::ReadAndWrite, 0).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
}
