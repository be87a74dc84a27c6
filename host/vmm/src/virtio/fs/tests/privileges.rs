//! What the host's root may do and a guest's root may not.

use std::{os::unix::fs::PermissionsExt as _, process::Command};

use rustix::{fs::XattrFlags, mount::UnmountFlags};
use virtiofsd::{
    filesystem::{Context, Extensions, FileSystem as _},
    fuse::{
        CopyfilerangeIn, CreateIn, FallocateIn, GetxattrIn, MknodIn, Rename2In, WRITE_CACHE, WRITE_KILL_PRIV,
        WriteIn,
    },
};

use super::*;

const BLOCK: u32 = libc::S_IFBLK | 0o666;
const CHARACTER: u32 = libc::S_IFCHR | 0o666;
/// The device number of `/dev/null`.
const NULL: u32 = 1 << 8 | 3;

impl Guest {
    fn make_node(&mut self, name: &str, mode: u32, device: u32) -> i32 {
        let node = MknodIn { mode, rdev: device, ..MknodIn::default() };
        self.ask(Opcode::Mknod, ROOT_ID, &[node.as_slice(), &string(name)].concat()).error
    }

    fn set_attribute(&mut self, node: u64, name: &str, value: &str) -> i32 {
        let size = u32::try_from(value.len()).unwrap().to_le_bytes();
        self.ask(Opcode::Setxattr, node, &[&size[..], &[0; 12], &string(name), value.as_bytes()].concat())
            .error
    }

    fn attribute(&mut self, node: u64, name: &str) -> Result<Vec<u8>, i32> {
        let reply =
            self.ask(Opcode::Getxattr, node, &[&100u32.to_le_bytes()[..], &[0; 4], &string(name)].concat());
        if reply.error == 0 { Ok(reply.body) } else { Err(reply.error) }
    }

    fn attributes(&mut self, node: u64) -> Vec<String> {
        let list = self.ask(Opcode::Listxattr, node, GetxattrIn { size: 1000, padding: 0 }.as_slice()).body;
        let mut names: Vec<_> =
            String::from_utf8(list).unwrap().split_terminator('\0').map(str::to_owned).collect();
        names.sort();
        names
    }

    /// Makes and opens a file. Returns its node id and the handle.
    fn create(&mut self, name: &str) -> (u64, u64) {
        let flags = (libc::O_CREAT | libc::O_RDWR).cast_unsigned();
        let create = CreateIn { flags, mode: 0o666, ..CreateIn::default() };
        let reply = self.ask(Opcode::Create, ROOT_ID, &[create.as_slice(), &string(name)].concat());
        let entry: EntryOut = reply.read();
        let mut open = OpenOut::default();
        open.as_mut_slice().copy_from_slice(&reply.body[size_of::<EntryOut>()..]);
        (entry.nodeid, open.fh)
    }

    fn write(&mut self, (node, fh): (u64, u64), offset: u64, flags: u32, data: &[u8]) -> i32 {
        let size = u32::try_from(data.len()).unwrap();
        let write = WriteIn { fh, offset, size, write_flags: flags, ..WriteIn::default() };
        self.ask(Opcode::Write, node, &[write.as_slice(), data].concat()).error
    }
}

#[test]
fn a_guest_can_make_whiteouts_and_no_other_devices() {
    let mut guest = Guest::new();
    let before = manifest(guest.directory.path());
    for (mode, device) in [(CHARACTER, NULL), (CHARACTER, 1 << 8), (BLOCK, 0), (BLOCK, 8 << 8)] {
        assert_eq!(guest.make_node("device", mode, device), libc::EPERM, "{mode:o} {device}");
    }
    for mode in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        assert_eq!(guest.make_node("device", mode, 0), libc::EINVAL, "{mode:o}");
    }
    assert_eq!(manifest(guest.directory.path()), before);
    for (name, mode) in
        [("whiteout", CHARACTER), ("socket", libc::S_IFSOCK), ("fifo", libc::S_IFIFO), ("plain", 0)]
    {
        assert_eq!(guest.make_node(name, mode, 0), 0, "{name}");
    }
    let rename = Rename2In { newdir: ROOT_ID, flags: libc::RENAME_WHITEOUT, padding: 0 };
    assert_eq!(guest.ask(Opcode::Rename2, ROOT_ID, &[rename.as_slice(), b"file\0moved\0"].concat()).error, 0);
    for whiteout in ["whiteout", "file"] {
        let metadata = guest.share(whiteout).symlink_metadata().unwrap();
        assert!(metadata.file_type().is_char_device() && metadata.rdev() == 0, "{whiteout}");
    }
}

#[test]
fn devices_are_refused_even_where_the_machine_could_make_them() {
    let directory = directory_with_share();
    let share = directory.path().join("share");
    let checked = serving::checked_fs(&share);
    let root = Context { uid: 0.into(), gid: 0.into(), pid: 1 };
    for (mode, device) in [(CHARACTER, NULL), (BLOCK, 7 << 8)] {
        let result = checked.mknod(root, ROOT_ID, c"device", mode, device, 0, Extensions::default());
        assert_eq!(result.err().unwrap().raw_os_error(), Some(libc::EPERM));
        assert!(!share.join("device").exists());
    }
}

#[test]
fn what_the_host_trusts_is_neither_seen_nor_set_by_the_guest() {
    let mut guest = Guest::new();
    let path = guest.share("file");
    let host = |name: &str| {
        let mut value = [0; 100];
        let length = rustix::fs::getxattr(&path, name, &mut value).ok()?;
        Some(value[..length].to_vec())
    };
    rustix::fs::setxattr(&path, "trusted.hosts", b"secret", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(&path, "user.shared", b"1", XattrFlags::empty()).unwrap();
    let file = guest.find("file");
    assert_eq!(guest.attributes(file), ["user.shared"]);
    assert_eq!(guest.attribute(file, "trusted.hosts"), Err(libc::ENODATA));
    let remove = |guest: &mut Guest, name| guest.ask(Opcode::Removexattr, file, &string(name)).error;
    assert_eq!(remove(&mut guest, "trusted.hosts"), libc::ENODATA);

    assert_eq!(guest.set_attribute(file, "trusted.hosts", "guest's"), 0);
    assert_eq!(guest.set_attribute(file, "trusted.overlay.opaque", "y"), 0);
    assert_eq!(host("trusted.hosts").unwrap(), b"secret");
    assert_eq!(host("trusted.overlay.opaque"), None);
    assert_eq!(host("user.virtiofs.trusted.overlay.opaque").unwrap(), b"y");
    assert_eq!(guest.attribute(file, "trusted.overlay.opaque").unwrap(), b"y");
    assert_eq!(guest.attributes(file), ["trusted.hosts", "trusted.overlay.opaque", "user.shared"]);
    assert_eq!(remove(&mut guest, "trusted.overlay.opaque"), 0);
    assert_eq!(guest.attributes(file), ["trusted.hosts", "user.shared"]);

    // The guest cannot use the name on the host either.
    let hidden = "user.virtiofs.trusted.hosts";
    assert_eq!(guest.set_attribute(file, hidden, "x"), libc::EPERM);
    assert_eq!(guest.attribute(file, hidden), Err(libc::ENODATA));
    assert_eq!(remove(&mut guest, hidden), libc::EPERM);
    // Attributes that the host's security modules use.
    assert_eq!(guest.set_attribute(file, "security.label", "x"), libc::EPERM);
    assert_eq!(host("security.label"), None);
}

#[test]
fn writing_to_a_program_takes_its_privileges() {
    let mut guest = Guest::new();
    guest.uid = 1000;
    let file = guest.create("program");
    fs::set_permissions(guest.share("program"), fs::Permissions::from_mode(0o6777)).unwrap();
    assert_eq!(guest.write(file, 0, 0, b"x"), 0);
    assert_eq!(guest.share("program").metadata().unwrap().mode() & 0o7777, 0o6777);
    assert_eq!(guest.write(file, 0, WRITE_KILL_PRIV, b"x"), 0);
    assert_eq!(guest.share("program").metadata().unwrap().mode() & 0o7777, 0o777);
    assert_eq!(guest.share("program").metadata().unwrap().uid(), 1000);
}

/// Mounts a small ext4, of which two fifths are reserved for root, over the share.
fn mount_ext4(directory: &Path) -> PathBuf {
    let (image, share) = (directory.join("image"), directory.join("share"));
    fs::File::create(&image).unwrap().set_len(24 << 20).unwrap();
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("mkfs.ext4").args(["-q", "-m", "40"]).arg(&image));
    run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&share));
    share
}

#[test]
fn users_do_not_get_the_disk_space_that_is_kept_for_root() {
    in_new_mount_namespace(|| {
        let directory = directory_with_share();
        let share = mount_ext4(directory.path());
        let mut guest = Guest::in_directory(directory);
        guest.ask(Opcode::Init, 0, &init(7, 38, FsOptions::all()));
        guest.uid = 1000;
        let file = guest.create("large");
        let chunk = vec![b'x'; 64 << 10];
        let mut end = 0;
        let full = loop {
            match guest.write(file, end, 0, &chunk) {
                0 => end += chunk.len() as u64,
                error => break error,
            }
        };
        assert_eq!(full, libc::ENOSPC);
        let free = || {
            let free = rustix::fs::statvfs(&share).unwrap();
            free.f_bfree * free.f_frsize
        };
        assert!(free() > 4 << 20, "{} bytes are left", free());
        // No other operation gets the space, nor does a write that the guest's kernel makes late or by itself.
        assert_eq!(guest.write(file, end, 0, &chunk), libc::ENOSPC);
        let allocate = FallocateIn { fh: file.1, offset: end, length: 1 << 20, ..FallocateIn::default() };
        assert_eq!(guest.ask(Opcode::Fallocate, file.0, allocate.as_slice()).error, libc::ENOSPC);
        let copy = CopyfilerangeIn {
            fh_in: file.1,
            nodeid_out: file.0,
            fh_out: file.1,
            off_out: end,
            len: 1 << 20,
            ..CopyfilerangeIn::default()
        };
        assert_eq!(guest.ask(Opcode::CopyFileRange, file.0, copy.as_slice()).error, libc::ENOSPC);
        guest.uid = u32::MAX;
        assert_eq!(guest.write(file, end, 0, &chunk), libc::ENOSPC);
        guest.uid = 0;
        assert_eq!(guest.write(file, end, WRITE_CACHE, &chunk), libc::ENOSPC);
        // A machine's root gets it.
        assert_eq!(guest.write(file, end, 0, &chunk), 0);
        rustix::mount::unmount(&share, UnmountFlags::DETACH).unwrap();
    });
}
