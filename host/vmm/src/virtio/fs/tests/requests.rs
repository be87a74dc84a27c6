//! Requests that no kernel sends are refused, and the device goes on.

use virtiofsd::fuse::{
    AttrOut, CopyfilerangeIn, CreateIn, FallocateIn, GetattrIn, GetxattrIn, LseekIn, MkdirIn, ReadIn,
    Rename2In, SetattrIn, WriteIn,
};

use super::*;

impl Guest {
    /// Asserts that the device still serves requests.
    fn assert_served(&mut self, after: &str) {
        let reply = self.ask(Opcode::Getattr, ROOT_ID, GetattrIn::default().as_slice());
        assert_eq!(reply.error, 0, "{after}");
        assert_eq!(reply.read::<AttrOut>().attr.ino, self.share("").metadata().unwrap().ino(), "{after}");
    }
}

fn read(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    ReadIn { fh: handle, offset, size, ..ReadIn::default() }.as_slice().to_vec()
}

fn write(handle: u64, offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    [WriteIn { fh: handle, offset, size, ..WriteIn::default() }.as_slice(), data].concat()
}

#[test]
fn reading_does_not_stop_the_device_whatever_the_room_and_the_place() {
    let mut guest = Guest::new();
    let file = guest.find("file");
    let handle = guest.open(Opcode::Open, file, libc::O_RDWR);
    // There is no room for the header of a reply.
    for room in [0, 1, 15] {
        let reply = guest.ask_with_room(Opcode::Read as u32, file, &read(handle, 0, 4), room);
        assert_eq!(reply.length, 0, "{room}");
        guest.assert_served("no room");
    }
    let end = i64::MAX.cast_unsigned();
    let wrong = [
        (0, 4, 19),
        (0, 1 << 20, ROOM),
        (0, u32::MAX, ROOM),
        (end, 1, ROOM),
        (end + 1, 0, ROOM),
        (u64::MAX, 4, ROOM),
    ];
    for (offset, size, room) in wrong {
        let reply = guest.ask_with_room(Opcode::Read as u32, file, &read(handle, offset, size), room);
        assert_eq!(reply.error, libc::EINVAL, "{size} bytes at {offset}, room for {room}");
        guest.assert_served("reading");
    }
    assert_eq!(guest.ask(Opcode::Read, file, &read(handle, 1, 2)).body, b"ep");
    assert_eq!(guest.ask(Opcode::Read, file, &read(handle, 2, 4000)).body, b"pt");
}

#[test]
fn nothing_is_written_beyond_what_a_write_says_or_beyond_any_file() {
    let mut guest = Guest::new();
    let file = guest.find("file");
    let handle = guest.open(Opcode::Open, file, libc::O_RDWR);
    let end = i64::MAX.cast_unsigned();
    let wrong = [
        (0, 2, "longer"),
        (0, 10, "short"),
        (end, 1, "x"),
        (end + 1, 1, "x"),
        (u64::MAX, 1, "x"),
        (end + 1, 0, ""),
    ];
    for (offset, size, data) in wrong {
        let reply = guest.ask(Opcode::Write, file, &write(handle, offset, size, data.as_bytes()));
        assert_eq!(reply.error, libc::EINVAL, "{size} bytes at {offset}: {data}");
        guest.assert_served("writing");
    }
    let large = vec![b'x'; (1 << 20) + 1];
    let size = u32::try_from(large.len()).unwrap();
    assert_eq!(guest.ask(Opcode::Write, file, &write(handle, 0, size, &large)).error, libc::EINVAL);
    // Without any room, the request is refused.
    let written = guest.ask_with_room(Opcode::Write as u32, file, &write(handle, 0, 3, b"not"), 0);
    assert_eq!(written.length, 0);
    assert_eq!(fs::read_to_string(guest.share("file")).unwrap(), "kept");
    assert_eq!(guest.ask(Opcode::Write, file, &write(handle, 0, 3, b"new")).error, 0);
    assert_eq!(fs::read_to_string(guest.share("file")).unwrap(), "newt");
}

#[test]
fn a_write_comes_from_as_many_buffers_as_it_is_in() {
    let mut guest = Guest::new();
    let file = guest.find("file");
    let handle = guest.open(Opcode::Open, file, libc::O_RDWR);
    let message = guest.message(Opcode::Write as u32, file, &write(handle, 0, 9, b"scattered"));
    guest.memory.write_slice(&message, GuestAddress(REQUEST)).unwrap();
    let mut chain = Vec::new();
    // A header in two pieces, and the data with its first byte in the last of them.
    for (start, end) in [(0, 40), (40, 81), (81, 85), (85, 89)] {
        let length = u32::try_from(end - start).unwrap();
        chain.push(Buffer { address: REQUEST + start, length, writable: false });
    }
    chain.push(Buffer { address: REPLY, length: ROOM, writable: true });
    assert_eq!(guest.send_chain(&chain).error, 0);
    assert_eq!(fs::read_to_string(guest.share("file")).unwrap(), "scattered");
}

#[test]
fn listing_does_not_stop_the_device_whatever_the_room_and_the_place() {
    let mut guest = Guest::new();
    let handle = guest.open(Opcode::Opendir, ROOT_ID, libc::O_RDONLY);
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        for room in [0, 8, 15] {
            for size in [0, 1, 8] {
                let reply = guest.ask_with_room(opcode as u32, ROOT_ID, &read(handle, 0, size), room);
                assert_eq!(reply.length, 0, "{size} in {room}");
                guest.assert_served("no room");
            }
        }
        for (size, room) in [(0, ROOM), (0, 16), (100, 100), (4096, ROOM), (u32::MAX, ROOM)] {
            let reply = guest.ask_with_room(opcode as u32, ROOT_ID, &read(handle, 0, size), room);
            assert_eq!(reply.error, libc::EINVAL, "{size} in {room}");
            guest.assert_served("listing");
        }
        // Some file systems number entries beyond 2⁶³.
        for offset in [i64::MAX.cast_unsigned(), 1 << 63, u64::MAX] {
            assert_eq!(guest.ask(opcode, ROOT_ID, &read(handle, offset, 2048)).body, b"", "{offset}");
            guest.assert_served("listing from afar");
        }
        let listed = guest.ask(opcode, ROOT_ID, &read(handle, 0, 2048)).body;
        assert!(listed.windows(9).any(|bytes| bytes == b"directory"));
    }
}

#[test]
fn operations_that_nobody_serves_are_answered() {
    let mut guest = Guest::new();
    let served = [
        1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30,
        34, 35,
    ];
    let more = [38, 43, 44, 45, 46, 47, 50];
    let silent = [2, 36, 42];
    for opcode in (0..80).chain([4096, u32::MAX]).filter(|opcode| !silent.contains(opcode)) {
        let reply = guest.ask_with_room(opcode, ROOT_ID, &[0; 3], ROOM);
        let expected =
            if served.contains(&opcode) || more.contains(&opcode) { libc::EINVAL } else { libc::ENOSYS };
        assert_eq!(reply.error, expected, "{opcode}");
        guest.assert_served("an operation");
    }
}

#[test]
fn a_request_has_exactly_the_bytes_that_it_says() {
    let mut guest = Guest::new();
    let before = manifest(guest.directory.path());
    let mkdir = [MkdirIn { mode: 0o700, umask: 0 }.as_slice(), b"new\0"].concat();
    let good = guest.message(Opcode::Mkdir as u32, ROOT_ID, &mkdir);
    for said in [0, 39, 40, 43, 51, 53, 4096, u32::MAX] {
        let mut message = good.clone();
        message[..4].copy_from_slice(&said.to_le_bytes());
        assert_eq!(guest.send(&message, ROOM).error, libc::EINVAL, "{said}");
    }
    // Extensions that the header does not speak of, and that are not there.
    let longer = [&mkdir[..], &[0; 8]].concat();
    assert_eq!(guest.ask(Opcode::Mkdir, ROOT_ID, &longer).error, libc::EINVAL);
    let mut extended = good.clone();
    extended[36] = 1;
    assert_eq!(guest.send(&extended, ROOM).error, libc::EINVAL);
    // An extension that is none, and an reply that is longer than the room for it.
    let nonsense = [&mkdir[..], &[0xff; 8]].concat();
    let mut extended = guest.message(Opcode::Mkdir as u32, ROOT_ID, &nonsense);
    extended[36] = 1;
    assert_eq!(guest.send(&extended, ROOM).error, libc::EINVAL);
    assert_eq!(guest.ask_with_room(Opcode::Lookup as u32, ROOT_ID, b"file\0", 20).error, libc::EINVAL);
    // No header at all.
    for length in [0, 1, 39] {
        assert_eq!(guest.send(&good[..length], ROOM).length, 0, "{length}");
    }
    assert_eq!(guest.ask(Opcode::Lookup, ROOT_ID, &vec![b'x'; 200 << 10]).error, libc::E2BIG);
    guest.assert_served("lengths");
    assert_eq!(manifest(guest.directory.path()), before);
    assert_eq!(guest.send(&good, ROOM).error, 0);
}

#[test]
fn flags_that_are_not_known_are_refused() {
    let mut guest = Guest::new();
    let file = guest.find("file");
    let handle = guest.open(Opcode::Open, file, libc::O_RDWR);
    let before = manifest(guest.directory.path());
    let open =
        |flags: i32, open_flags| OpenIn { flags: flags.cast_unsigned(), open_flags }.as_slice().to_vec();
    let create = |flags: i32| {
        let create = CreateIn { flags: flags.cast_unsigned(), mode: 0o600, ..CreateIn::default() };
        [create.as_slice(), b"new\0"].concat()
    };
    let rename = Rename2In { newdir: ROOT_ID, flags: 8, padding: 0 };
    let allocate = |mode: i32, offset, length| {
        FallocateIn { fh: handle, offset, length, mode: mode.cast_unsigned(), padding: 0 }.as_slice().to_vec()
    };
    let copy = |off_in, len, flags| {
        let copy = CopyfilerangeIn {
            fh_in: handle,
            off_in,
            nodeid_out: file,
            fh_out: handle,
            off_out: 100,
            len,
            flags,
        };
        copy.as_slice().to_vec()
    };
    let end = i64::MAX.cast_unsigned();
    let set = |size: u32, flags: u32, extra: u32| {
        [&size.to_le_bytes()[..], &flags.to_le_bytes(), &extra.to_le_bytes(), &[0; 4], b"user.a\0v"].concat()
    };
    let refused = [
        (Opcode::Open, open(libc::O_PATH, 0), libc::EINVAL),
        (Opcode::Open, open(libc::O_RDWR | libc::O_CREAT, 0), libc::EINVAL),
        (Opcode::Open, open(libc::O_RDWR, 2), libc::EINVAL),
        (Opcode::Create, create(libc::O_RDWR | libc::O_TMPFILE), libc::EINVAL),
        (Opcode::Create, create(libc::O_PATH), libc::EINVAL),
        (Opcode::Rename2, [rename.as_slice(), b"file\0new\0"].concat(), libc::EINVAL),
        (
            Opcode::Setattr,
            SetattrIn { valid: 1 << 12, ..SetattrIn::default() }.as_slice().to_vec(),
            libc::EINVAL,
        ),
        (Opcode::Fallocate, allocate(libc::FALLOC_FL_COLLAPSE_RANGE, 0, 4096), libc::EOPNOTSUPP),
        (Opcode::Fallocate, allocate(libc::FALLOC_FL_KEEP_SIZE, end, 1), libc::EINVAL),
        (Opcode::CopyFileRange, copy(0, 4, 1), libc::EINVAL),
        (Opcode::CopyFileRange, copy(end, 4, 0), libc::EINVAL),
        (
            Opcode::Lseek,
            LseekIn { fh: handle, whence: 0, ..LseekIn::default() }.as_slice().to_vec(),
            libc::EINVAL,
        ),
        (Opcode::Setxattr, set(1, 4, 0), libc::EINVAL),
        (Opcode::Setxattr, set(1, 0, 2), libc::EINVAL),
        (Opcode::Setxattr, set(2, 0, 0), libc::EINVAL),
        (Opcode::Setxattr, set(0, 0, 0), libc::EINVAL),
        (
            Opcode::Listxattr,
            GetxattrIn { size: (64 << 10) + 1, padding: 0 }.as_slice().to_vec(),
            libc::EINVAL,
        ),
    ];
    for (opcode, body, expected) in refused {
        // Operations with a name are about a directory.
        let node = if matches!(opcode, Opcode::Create | Opcode::Rename2) { ROOT_ID } else { file };
        assert_eq!(guest.ask(opcode, node, &body).error, expected, "{opcode:?} {body:?}");
        assert_eq!(manifest(guest.directory.path()), before, "{opcode:?} {body:?}");
    }
    let temporary = open(libc::O_RDWR | libc::O_TMPFILE, 0);
    assert_eq!(guest.ask(Opcode::Opendir, ROOT_ID, &temporary).error, libc::EINVAL);
    assert_eq!(guest.ask(Opcode::Open, ROOT_ID, &temporary).error, libc::EINVAL);
}

#[test]
fn a_kernel_that_speaks_otherwise_is_refused() {
    let mut guest = Guest::fresh();
    let capable = FsOptions::all();
    for (major, minor) in [(0, 0), (6, 38), (8, 0), (7, 26)] {
        assert_eq!(
            guest.ask(Opcode::Init, 0, &init(major, minor, capable)).error,
            libc::EPROTO,
            "{major}.{minor}"
        );
    }
    for missing in
        [FsOptions::SETXATTR_EXT, FsOptions::SUBMOUNTS, FsOptions::POSIX_ACL, FsOptions::CREATE_SUPP_GROUP]
    {
        let reply = guest.ask(Opcode::Init, 0, &init(7, 38, capable - missing));
        assert_eq!(reply.error, libc::EPROTO, "{missing:?}");
    }
    // Nobody has said INIT yet.
    assert_eq!(guest.ask(Opcode::Lookup, ROOT_ID, &string("file")).error, libc::EBADF);
    for _ in 0..3 {
        assert_eq!(guest.ask(Opcode::Init, 0, &init(7, 45, capable)).error, 0);
        guest.assert_served("INIT");
    }
    guest.ask(Opcode::Destroy, 0, &[]);
    assert_eq!(guest.ask(Opcode::Lookup, ROOT_ID, &string("file")).error, libc::EBADF);
}

#[test]
fn a_chain_that_is_no_request_is_given_back() {
    let mut guest = Guest::new();
    let message = guest.message(Opcode::Getattr as u32, ROOT_ID, GetattrIn::default().as_slice());
    guest.memory.write_slice(&message, GuestAddress(REQUEST)).unwrap();
    let length = u32::try_from(message.len()).unwrap();
    let request = Buffer { address: REQUEST, length, writable: false };
    let reply = Buffer { address: REPLY, length: ROOM, writable: true };
    let at = |address, buffer| Buffer { address, ..buffer };
    let end = 16 << 20;
    for chain in [
        vec![reply],
        vec![reply, request],
        vec![request, reply, Buffer { length: 1, ..request }],
        vec![at(end - 8, request), reply],
        vec![at(end, request), reply],
        vec![request, at(end - 8, reply)],
        vec![request, at(u64::MAX - 8, reply)],
        // Where the copy of the request is.
        vec![request, at(1 << 60, reply)],
        vec![at((1 << 60) + 0x5000, request), reply],
        vec![Buffer { length: u32::MAX, ..request }, reply],
        vec![request, Buffer { length: u32::MAX, ..reply }],
    ] {
        assert_eq!(guest.send_chain(&chain).length, 0);
        guest.assert_served("a chain");
    }
    // In as many pieces as there may be.
    let mut pieces: Vec<_> = (0..u64::from(length))
        .map(|offset| Buffer { address: REQUEST + offset, length: 1, writable: false })
        .collect();
    pieces.push(reply);
    guest.memory.write_slice(&message, GuestAddress(REQUEST)).unwrap();
    assert_eq!(guest.send_chain(&pieces).error, 0);
}

/// The number of 64-bit words and of names in the requests of each operation.
const SHAPES: [(Opcode, usize, usize); 31] = [
    (Opcode::Lookup, 0, 1),
    (Opcode::Forget, 1, 0),
    (Opcode::Getattr, 2, 0),
    (Opcode::Setattr, 11, 0),
    (Opcode::Readlink, 0, 0),
    (Opcode::Mknod, 2, 1),
    (Opcode::Mkdir, 1, 1),
    (Opcode::Unlink, 0, 1),
    (Opcode::Rmdir, 0, 1),
    (Opcode::Rename, 1, 2),
    (Opcode::Link, 1, 1),
    (Opcode::Open, 1, 0),
    (Opcode::Read, 5, 0),
    (Opcode::Write, 5, 0),
    (Opcode::Statfs, 0, 0),
    (Opcode::Release, 3, 0),
    (Opcode::Fsync, 2, 0),
    (Opcode::Listxattr, 1, 0),
    (Opcode::Flush, 3, 0),
    (Opcode::Opendir, 1, 0),
    (Opcode::Readdir, 5, 0),
    (Opcode::Releasedir, 3, 0),
    (Opcode::Fsyncdir, 2, 0),
    (Opcode::Access, 1, 0),
    (Opcode::Create, 2, 1),
    (Opcode::Fallocate, 4, 0),
    (Opcode::Readdirplus, 5, 0),
    (Opcode::Rename2, 2, 2),
    (Opcode::Lseek, 3, 0),
    (Opcode::CopyFileRange, 7, 0),
    (Opcode::Syncfs, 1, 0),
];

/// Pseudorandom numbers, the same in each run.
struct Random(u64);

impl Random {
    /// Xorshift.
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        of[usize::try_from(self.0 % of.len() as u64).unwrap()]
    }
}

/// Node ids and handles of files. Those that a request has forgotten or removed are looked up again.
struct KnownFiles {
    file: u64,
    directory: u64,
    handle: u64,
    listing: u64,
}

impl KnownFiles {
    fn find(guest: &mut Guest) -> Self {
        fs::create_dir_all(guest.share("directory")).unwrap();
        fs::write(guest.share("file"), "kept").unwrap();
        let (file, directory) = (guest.find("file"), guest.find("directory"));
        let handle = guest.open(Opcode::Open, file, libc::O_RDWR);
        let listing = guest.open(Opcode::Opendir, directory, libc::O_RDONLY);
        Self { file, directory, handle, listing }
    }
}

#[test]
fn random_requests_do_not_stop_the_device_or_reach_out_of_the_share() {
    const NAMES: [&[u8]; 7] =
        [b"file\0", b"..\0", b"../outside/file\0", b"../outside/made\0", b"made\0", b"new\0", b"\0"];
    let mut guest = Guest::new();
    let before = manifest(&guest.outside(""));
    let mut known = KnownFiles::find(&mut guest);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut done = 0;
    for round in 0..20_000 {
        let mut body = Vec::new();
        let mut leads_out = false;
        let KnownFiles { file, directory, handle, listing } = known;
        // One request in four is arbitrary. The others have the form that their operation needs.
        if round % 4 == 0 {
            let opcode = random.pick(&(0..54).filter(|opcode| *opcode != 38).collect::<Vec<u32>>());
            let sizes = [0, 0, 1, handle, 8, 64, 4096, 1 << 31, 1 << 32, 1 << 63, u64::MAX, 1 << 20];
            for _ in 0..random.pick(&[0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 11, 40]) {
                body.extend(random.pick(&sizes).to_le_bytes());
            }
            for _ in 0..random.pick(&[0, 1, 1, 2, 3]) {
                body.extend(random.pick(&NAMES));
            }
            let node = random.pick(&[0, 1, file, directory, u64::MAX]);
            let room = random.pick(&[0, 15, 16, 100, 4096, 4112, 1 << 20]);
            guest.ask_with_room(opcode, node, &body, room);
        } else {
            let (opcode, words, names) = random.pick(&SHAPES);
            for _ in 0..words {
                let word = random.pick(&[0, 0, 0, 0, 1, 8, handle, listing, file, directory, 4096]);
                body.extend(word.to_le_bytes());
            }
            for _ in 0..names {
                let name = random.pick(&NAMES);
                leads_out |= name.starts_with(b"..");
                body.extend(name);
            }
            let reply = guest.ask(opcode, random.pick(&[ROOT_ID, ROOT_ID, file, directory]), &body);
            let is_done = reply.length > 0 && reply.error == 0;
            assert!(!is_done || !leads_out, "{opcode:?} was done with a name that leads out: {body:?}");
            done += u32::from(is_done);
        }
        if round % 8 == 0 {
            assert_eq!(guest.ask(Opcode::Init, 0, &init(7, 38, FsOptions::all())).error, 0);
            known = KnownFiles::find(&mut guest);
        }
    }
    guest.assert_served("all that");
    assert_eq!(manifest(&guest.outside("")), before);
    // Malformed requests are refused whatever they are about. So enough others have to have been served.
    assert!(done > 1000, "only {done} requests were done");
}

/// A file server on the host may have a lease on a file, which it has to give up after `fs.lease-break-time` (45 s).
#[test]
fn a_file_that_would_keep_whoever_opens_it_waiting_does_not_keep_the_device() {
    /// `include/uapi/asm-generic/fcntl.h`
    const F_SETSIG: i32 = 10;
    let mut guest = Guest::new();
    let file = guest.find("file");
    let leased = fs::File::open(guest.share("file")).unwrap();
    // SAFETY: only flags of this open file change. The signal for a broken lease does nothing.
    unsafe {
        assert_eq!(libc::fcntl(leased.as_raw_fd(), F_SETSIG, libc::SIGURG), 0);
        assert_eq!(libc::fcntl(leased.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK), 0);
    }
    let open = OpenIn { flags: libc::O_RDWR.cast_unsigned(), open_flags: 0 };
    assert_eq!(guest.ask(Opcode::Open, file, open.as_slice()).error, libc::EAGAIN);
    drop(leased);
    guest.open(Opcode::Open, file, libc::O_RDWR);
}

#[test]
fn one_copy_is_no_longer_than_the_others_can_wait_for() {
    let mut guest = Guest::new();
    fs::File::create(guest.share("long")).unwrap().set_len(1 << 30).unwrap();
    let (from, to) = (guest.find("long"), guest.find("file"));
    let (source, target) =
        (guest.open(Opcode::Open, from, libc::O_RDONLY), guest.open(Opcode::Open, to, libc::O_RDWR));
    let copy = virtiofsd::fuse::CopyfilerangeIn {
        fh_in: source,
        off_in: 0,
        nodeid_out: to,
        fh_out: target,
        off_out: 0,
        len: 1 << 30,
        flags: 0,
    };
    let copied =
        guest.ask(Opcode::CopyFileRange, from, copy.as_slice()).read::<virtiofsd::fuse::WriteOut>().size;
    assert!((1..=16 << 20).contains(&copied), "{copied}");
}
