//! What Linux asks for is not refused: the kernel that the tests run on mounts the share, and its requests go through
//! the device's queues.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read as _, Write as _},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
};

use rustix::{
    fs::XattrFlags,
    mount::{MountFlags, UnmountFlags},
};
use virtiofsd::fuse::{ReadIn, WriteIn};

use super::*;

/// Bytes of the largest message that a kernel sends: a WRITE.
const MESSAGE: usize = (1 << 20) + size_of::<InHeader>() + size_of::<WriteIn>();
/// Offset of the flags in INIT and in its reply.
const FLAGS: usize = 12;

/// Carries the kernel's requests to the device and the replies back, until the file system is unmounted. Returns the
/// operations that the device has refused as invalid, and those that it does not have.
fn carry(mut kernel: fs::File, mut guest: Guest) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let (mut refused, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    let mut buffer = vec![0; 2 * MESSAGE];
    loop {
        let message = match kernel.read(&mut buffer) {
            Ok(length) => &mut buffer[..length],
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return (refused, unknown),
            // The caller has given up before its request was read.
            Err(error)
                if error.kind() == ErrorKind::Interrupted || error.raw_os_error() == Some(libc::ENOENT) =>
            {
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let mut header = InHeader::default();
        header.as_mut_slice().copy_from_slice(&message[..size_of::<InHeader>()]);
        let body = &mut message[size_of::<InHeader>()..];
        let is = |opcodes: &[Opcode]| opcodes.iter().any(|opcode| *opcode as u32 == header.opcode);
        let submounts = u32::try_from(FsOptions::SUBMOUNTS.bits()).unwrap();
        if is(&[Opcode::Init]) {
            // Only the virtio-fs driver of Linux sets this flag.
            change(&mut body[FLAGS..], |flags| flags | submounts);
        }
        let room = if is(&[Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]) {
            0
        } else if is(&[Opcode::Read, Opcode::Readdir, Opcode::Readdirplus]) {
            let mut read = ReadIn::default();
            read.as_mut_slice().copy_from_slice(&body[..size_of::<ReadIn>()]);
            read.size + request::REPLY_HEADER_SIZE
        } else {
            80 << 10
        };
        let mut reply = guest.exchange(message, room);
        if reply.is_empty() {
            assert_eq!(room, 0, "operation {} has no reply", header.opcode);
            continue;
        }
        match -i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
            libc::EINVAL | libc::EPROTO | libc::E2BIG => drop(refused.insert(header.opcode)),
            libc::ENOSYS => drop(unknown.insert(header.opcode)),
            _ => {}
        }
        if is(&[Opcode::Init]) {
            change(&mut reply[size_of::<OutHeader>() + FLAGS..], |flags| flags & !submounts);
        }
        match kernel.write_all(&reply) {
            // The caller does not wait for the reply any more.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            result => result.unwrap(),
        }
    }
}

fn change(bytes: &mut [u8], change: impl Fn(u32) -> u32) {
    let (word, _) = bytes.split_first_chunk_mut::<4>().unwrap();
    *word = change(u32::from_le_bytes(*word)).to_le_bytes();
}

/// What programs do with files. The output must be the same in the share as elsewhere.
const SCRIPT: &str = r"
    touch a; for i in $(seq 20); do ln a l$i; done; stat -c %h a; rm l1*; stat -c %h a
    dd if=/dev/zero of=s bs=1 count=1 seek=100M 2> /dev/null; stat -c %s s
    [ $(du -k s | cut -f 1) -lt 1000 ] && echo sparse
    cp --sparse=auto s s2; stat -c %s s2; truncate -s 5 s; stat -c %s s
    fallocate -l 100000 s; stat -c %s s; fallocate -p -o 0 -l 4096 s
    mkdir d e; touch d/x; mv d/x e/y; mv e f; ls f
    mkdir full; touch full/x; mv -T f full 2> /dev/null; rmdir full 2> /dev/null; echo $?
    for i in 1 2 3 4; do for j in $(seq 20); do echo $i$j >> log; done & done; wait; wc -l < log
    exec 3<> x; echo kept >&3; rm x; cat /proc/self/fd/3; exec 3>&-
    touch 'a b' ./-n; touch $(printf 'x%.0s' $(seq 255)) && echo long
    touch $(printf 'x%.0s' $(seq 256)) 2> /dev/null; echo $?
    touch -d '2001-02-03 04:05:06' t; stat -c '%Y %X' t; chmod 4711 t; stat -c %a t; chown 12:13 t; stat -c '%a %u:%g' t
    flock -n t sh -c 'flock -n t true; echo $?'
    ln -s self self; cat self 2> /dev/null; echo $?; ln -s a link; readlink link; ln link hard; readlink hard
    mkdir -p $(printf 'p/%.0s' $(seq 60)); find p | wc -l
    mkfifo q; (echo through > q &); cat q; mknod w c 0 0; echo $?; rm w q
    dd if=/dev/urandom of=big bs=1M count=8 2> /dev/null; dd if=big of=big2 bs=37k 2> /dev/null
    cmp big big2; cp big big3; cmp big big3; echo $?
    dd if=big of=big4 bs=512k iflag=direct 2> /dev/null; sync big2; sync -f .
    mkdir many; for i in $(seq 500); do echo $i > many/$i; done; ls many | wc -l; cat many/* | md5sum; rm -r many
    mkdir -m 2777 group; chown 0:77 group
    setpriv --reuid 1000 --regid 1000 --groups 77,88 \
        sh -c 'echo x > group/theirs; mkdir group/sub; ln -s x group/link'
    stat -c '%a %u:%g' group/theirs group/sub; umask 027; echo x > masked; stat -c %a masked
    : > t; echo x > t; echo y > log; cat t log; test -r t; test -x t; echo $?; stat -f -c %l .
    setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'cat masked; rm t; echo x > a' 2> /dev/null; echo $?
    rm -r d p; ls | wc -l
";

fn run_script(directory: &Path) -> String {
    let output = Command::new("bash")
        .arg("-c")
        .arg(SCRIPT)
        .current_dir(directory)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn programs_do_with_files_in_the_share_what_they_do_elsewhere() {
    in_new_mount_namespace(|| {
        let guest = Guest::fresh();
        let directories = tempfile::tempdir().unwrap();
        let (mounted, elsewhere) = (directories.path().join("mounted"), directories.path().join("elsewhere"));
        fs::create_dir(&mounted).unwrap();
        fs::create_dir(&elsewhere).unwrap();
        fs::set_permissions(directories.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();

        let kernel = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            kernel.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("share", &mounted, "fuse", MountFlags::empty(), options.as_c_str()).unwrap();
        let carrier = std::thread::spawn(|| carry(kernel, guest));

        fs::create_dir(mounted.join("work")).unwrap();
        let through = run_script(&mounted.join("work"));
        let file = mounted.join("file");
        for name in ["user.a", "trusted.b"] {
            rustix::fs::setxattr(&file, name, b"value", XattrFlags::CREATE).unwrap();
            let mut value = [0; 10];
            assert_eq!(rustix::fs::getxattr(&file, name, &mut value).unwrap(), 5);
            assert!(rustix::fs::listxattr(&file, &mut [0; 100]).unwrap() > name.len());
            rustix::fs::removexattr(&file, name).unwrap();
        }
        rustix::mount::unmount(&mounted, UnmountFlags::empty()).unwrap();
        let (refused, unknown) = carrier.join().unwrap();

        assert_eq!(through, run_script(&elsewhere));
        assert_eq!(refused, BTreeSet::new());
        // STATX, which is not in virtiofsd's version of the protocol, and newer operations.
        assert!(unknown.iter().all(|opcode| *opcode > 51 || *opcode == Opcode::Ioctl as u32), "{unknown:?}");
    });
}
