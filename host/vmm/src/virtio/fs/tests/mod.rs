//! The device with a guest that the tests play and that may be hostile. Requests are made by hand.

mod linux;
mod names;
mod privileges;
mod requests;
mod serving;

use std::{
    collections::BTreeMap,
    fs,
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{mount::MountPropagationFlags, thread::UnshareFlags};
use tempfile::TempDir;
use virtiofsd::fuse::{
    EntryOut, FsOptions, InHeader, InitInCompat, Opcode, OpenIn, OpenOut, OutHeader, ROOT_ID,
};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::{
    memory::GuestMemory,
    virtio::{
        ActiveQueue,
        testing::{Buffer, RING_SIZE, Ring, guest_memory, threads},
        wait_context::{WaitContext, event_tokens},
    },
};

event_tokens! {
    enum Token {
        Interrupt,
    }
}

const QUEUE: u16 = 256;
/// Guest-physical address of requests.
const REQUEST: u64 = 0x10_0000;
/// Guest-physical address of the room for replies.
const REPLY: u64 = 0x40_0000;
/// Bytes of the room for replies whose length does not depend on the request.
const ROOM: u32 = 4096;

/// Both queues of a device, and the driver's side of the request queue.
fn queues(memory: &GuestMemory) -> (Ring, [ActiveQueue; 2]) {
    let (_, urgent) = Ring::new(memory, RING_SIZE, 16);
    let (ring, requests) = Ring::new(memory, 2 * RING_SIZE, QUEUE);
    (ring, [urgent, requests])
}

/// A directory with a share in it, and next to it files that the guest must not reach.
fn directory_with_share() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for name in ["share", "outside"] {
        let tree = directory.path().join(name);
        fs::create_dir_all(tree.join("directory/empty")).unwrap();
        fs::create_dir(tree.join("empty")).unwrap();
        fs::write(tree.join("file"), "kept").unwrap();
        fs::write(tree.join("directory/file"), "kept").unwrap();
    }
    directory
}

/// The files below a directory: their names, types, modes, owners, and contents.
fn manifest(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_dir() {
            found.extend(manifest(&path));
            String::new()
        } else if kind.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if kind.is_file() {
            fs::read_to_string(&path).unwrap()
        } else {
            format!("{}", kind.is_char_device())
        };
        let line = format!("{:o} {}:{} {content}", metadata.mode(), metadata.uid(), metadata.gid());
        found.insert(path, line);
    }
    found
}

/// Runs on a thread with a mount namespace of its own.
fn in_new_mount_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: only this thread's mounts and working directory are separated from those of the process.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }
                .expect("these tests need root");
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            test();
        });
    });
}

struct Reply {
    /// Bytes that the device has written, as the used ring says.
    length: u32,
    /// The error number, or 0.
    error: i32,
    body: Vec<u8>,
}

impl Reply {
    fn parse(reply: &[u8]) -> Self {
        let length = u32::try_from(reply.len()).unwrap();
        let Some((bytes, body)) = reply.split_at_checked(size_of::<OutHeader>()) else {
            assert_eq!(length, 0);
            return Self { length, error: 0, body: Vec::new() };
        };
        let mut header = OutHeader::default();
        header.as_mut_slice().copy_from_slice(bytes);
        assert_eq!((header.len, header.unique), (length, 7));
        Self { length, error: -header.error, body: body.to_vec() }
    }

    fn read<T: ByteValued + Default>(&self) -> T {
        assert_eq!(self.error, 0);
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(&self.body[..size_of::<T>()]);
        value
    }
}

/// A guest with an active device.
struct Guest {
    directory: TempDir,
    device: Fs,
    memory: GuestMemory,
    ring: Ring,
    notify: EventFd,
    interrupt: Arc<EventFd>,
    wait_context: WaitContext<Token>,
    uid: u32,
}

impl Guest {
    /// A guest that has sent INIT.
    fn new() -> Self {
        let mut guest = Self::fresh();
        let reply = guest.ask(Opcode::Init, 0, &init(7, 38, FsOptions::all()));
        assert_eq!(reply.error, 0);
        guest
    }

    /// A guest that has sent nothing yet.
    fn fresh() -> Self {
        Self::in_directory(directory_with_share())
    }

    fn in_directory(directory: TempDir) -> Self {
        Self::with_limit(directory, &RateLimit::default())
    }

    fn with_limit(directory: TempDir, limit: &RateLimit) -> Self {
        let memory = guest_memory();
        let (ring, queues) = queues(&memory);
        let notify = queues[1].notified.try_clone().unwrap();
        let interrupt = queues[1].interrupt.0.clone();
        let share = ShareConfig { tag: "share".into(), directory: Some(directory.path().join("share")) };
        let mut device = Fs::new(&share, limit, None).unwrap();
        let queues = queues.into_iter().map(Some).collect();
        device
            .activate(Activation { memory: memory.clone(), features: 0, queues, threads: threads() })
            .unwrap();
        let wait_context = WaitContext::new().unwrap();
        wait_context.add(interrupt.as_ref(), Token::Interrupt).unwrap();
        Self { directory, device, memory, ring, notify, interrupt, wait_context, uid: 0 }
    }

    fn outside(&self, name: &str) -> PathBuf {
        self.directory.path().join("outside").join(name)
    }

    fn share(&self, name: &str) -> PathBuf {
        self.directory.path().join("share").join(name)
    }

    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8]) -> Reply {
        self.ask_with_room(opcode as u32, node, body, ROOM)
    }

    fn ask_with_room(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Reply {
        let message = self.message(opcode, node, body);
        self.send(&message, room)
    }

    fn send(&mut self, message: &[u8], room: u32) -> Reply {
        Reply::parse(&self.exchange(message, room))
    }

    fn message(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + body.len()).unwrap(),
            opcode,
            unique: 7,
            nodeid: node,
            uid: self.uid.into(),
            gid: self.uid.into(),
            ..InHeader::default()
        };
        [header.as_slice(), body].concat()
    }

    fn send_chain(&mut self, chain: &[Buffer]) -> Reply {
        Reply::parse(&self.exchange_chain(chain))
    }

    /// Sends bytes as a request. Returns the reply.
    fn exchange(&mut self, message: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_slice(message, GuestAddress(REQUEST)).unwrap();
        let length = u32::try_from(message.len()).unwrap();
        let mut chain = vec![Buffer { address: REQUEST, length, writable: false }];
        if room > 0 {
            chain.push(Buffer { address: REPLY, length: room, writable: true });
        }
        self.exchange_chain(&chain)
    }

    fn exchange_chain(&mut self, chain: &[Buffer]) -> Vec<u8> {
        let head = self.ring.add(chain);
        self.notify.write(1).unwrap();
        let (used, length) = self.next_used();
        assert_eq!(used, head);
        let mut reply = vec![0; length as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        reply
    }

    fn next_used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.ring.used() {
                return used;
            }
            assert!(self.is_alive(), "the device has stopped");
            // The wait is limited, because a device that has stopped does not interrupt the guest any more.
            drop(self.wait_context.wait::<1>(Some(Duration::from_millis(100))).unwrap());
            let _ = self.interrupt.read();
        }
    }

    fn is_alive(&self) -> bool {
        self.device.worker.as_ref().is_some_and(|(thread, _)| !thread.is_finished())
    }

    /// The node id of a file, from a path below the share.
    fn find(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT_ID, |parent, name| {
            self.ask(Opcode::Lookup, parent, &string(name)).read::<EntryOut>().nodeid
        })
    }

    fn open(&mut self, opcode: Opcode, node: u64, flags: i32) -> u64 {
        let open = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        self.ask(opcode, node, open.as_slice()).read::<OpenOut>().fh
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.device.stop();
    }
}

fn init(major: u32, minor: u32, capable: FsOptions) -> Vec<u8> {
    let flags = capable.bits();
    let [low, high] = [flags, flags >> 32].map(|half| u32::try_from(half & u64::from(u32::MAX)).unwrap());
    let known = InitInCompat { major, minor, max_readahead: 0, flags: low };
    [known.as_slice(), &high.to_le_bytes(), &[0; 44]].concat()
}

/// A string with its terminator.
fn string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

#[test]
fn a_share_that_is_no_directory_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let share = ShareConfig { tag: "share".into(), directory: Some(file.path().into()) };
    let error = Fs::new(&share, &RateLimit::default(), None).err().unwrap();
    assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
}

#[test]
fn the_guest_may_not_use_up_the_open_files() {
    assert_eq!(descriptors_for_guest(524_288), 522_240);
    assert_eq!(descriptors_for_guest(1024), 512);
}

#[test]
fn the_configuration_space_holds_tag_and_number_of_queues() {
    let directory = tempfile::tempdir().unwrap();
    let share = ShareConfig { tag: "share".into(), directory: Some(directory.path().into()) };
    let fs = Fs::new(&share, &RateLimit::default(), None).unwrap();
    let mut tag = [0; 6];
    fs.read_config(0, &mut tag);
    assert_eq!(&tag, b"share\0");
    let mut queues = [0; 4];
    fs.read_config(36, &mut queues);
    assert_eq!(u32::from_le_bytes(queues), 1);
}
