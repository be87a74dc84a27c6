//! Checks the form of a request before virtiofsd sees it.
//!
//! virtiofsd was written for a client that it can trust. It ignores bytes that it does not expect and flags that it
//! does not know, writes more than the length that a WRITE gives, and panics if there is no room for a reply or if an
//! offset is negative. So each request is parsed here first. It must have exactly the fields and the names that its
//! operation has (`include/uapi/linux/fuse.h`), and everything that is not understood is refused.

use thiserror::Error;
use virtiofsd::fuse::{
    AccessIn, CopyfilerangeIn, CreateIn, FATTR_FH, FATTR_LOCKOWNER, FSYNC_FDATASYNC, FallocateIn, FlushIn,
    ForgetIn, ForgetOne, FsyncIn, GETATTR_FH, GetattrIn, GetxattrIn, InHeader, InitInCompat, InitInExt,
    InterruptIn, KERNEL_VERSION, LinkIn, LseekIn, MIN_KERNEL_MINOR_VERSION, MkdirIn, MknodIn,
    OPEN_KILL_SUIDGID, Opcode, OpenIn, OutHeader, READ_LOCKOWNER, RELEASE_FLOCK_UNLOCK, RELEASE_FLUSH,
    ReadIn, ReleaseIn, Rename2In, RenameIn, SetattrIn, SetattrValid, SetxattrFlags, SetxattrIn, SyncfsIn,
    WRITE_CACHE, WRITE_KILL_PRIV, WRITE_LOCKOWNER, WriteIn,
};
use vm_memory::ByteValued;

/// Bytes of a request's header.
pub const REQUEST_HEADER_SIZE: usize = size_of::<InHeader>();
/// Bytes of a WRITE before its data.
pub const WRITE_HEADER_SIZE: usize = REQUEST_HEADER_SIZE + size_of::<WriteIn>();
/// Bytes of the shortest reply: its header.
pub const REPLY_HEADER_SIZE: u32 = 16;
const _: () = assert!(REPLY_HEADER_SIZE as usize == size_of::<OutHeader>());
/// Most bytes of data of one READ, WRITE or listing: what virtiofsd offers in its reply to INIT.
const DATA_MAX: u32 = 1 << 20;
/// Bytes of the longest value of an extended attribute (`XATTR_SIZE_MAX`).
const XATTR_SIZE_MAX: u32 = 64 << 10;
/// Bytes of the longest target of a symbolic link, with its terminator (`PATH_MAX`).
const TARGET_MAX: usize = 4096;

/// A request is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    #[error("the guest's request says that it has {said} bytes, and has {has}")]
    Length { said: u32, has: usize },
    #[error("the guest's request is longer than one of its kind can be")]
    TooLong,
    #[error("the guest's request ends in the middle of its fields")]
    Short,
    #[error("the guest's request has {bytes} bytes too many")]
    Extra { bytes: usize },
    #[error("a name in the guest's request has no terminator")]
    Unterminated,
    #[error("the guest gives room for a reply of {room} bytes; it needs {needed}")]
    Room { room: usize, needed: usize },
    #[error("the guest asks for operation {0}, which this device does not have")]
    Unknown(u32),
    #[error(
        "the guest asks for operation {0} over the high-priority queue, which is for FORGET and INTERRUPT"
    )]
    NotUrgent(u32),
    #[error("the guest's request has flags {0:#x}, which this device does not know")]
    Flags(u32),
    #[error("the guest asks for a kind of allocation, {0:#x}, that this device does not know")]
    Allocation(u32),
    #[error("the guest's request reaches beyond the end of any file")]
    Range,
    #[error("the guest asks for {0} bytes at once")]
    Size(u32),
    #[error("the guest speaks version {major}.{minor} of FUSE")]
    Version { major: u32, minor: u32 },
}

impl RequestError {
    /// The error number that the guest is sent.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Unknown(_) => libc::ENOSYS,
            Self::Allocation(_) => libc::EOPNOTSUPP,
            Self::TooLong => libc::E2BIG,
            Self::Version { .. } => libc::EPROTO,
            _ => libc::EINVAL,
        }
    }
}

/// A request, copied out of guest memory.
pub struct Request<'a> {
    pub header: InHeader,
    /// What follows the header, except the data of a WRITE. It is cut off if it is too long for any request.
    pub body: &'a [u8],
    /// Bytes of the whole request.
    pub length: usize,
    /// Bytes of the room for the reply.
    pub room: usize,
}

/// Checks a request of the high-priority queue, as [`check`] does. It must be one of those that the queue is for
/// (virtio 1.2, section 5.11.6): they have no rate limit, and others would have none there either.
pub fn check_urgent(request: &Request) -> Result<usize, RequestError> {
    match Opcode::try_from(request.header.opcode) {
        Ok(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt) => check(request),
        _ => Err(RequestError::NotUrgent(request.header.opcode)),
    }
}

/// Checks a request. Returns how many bytes of the room for its reply may be used.
pub fn check(request: &Request) -> Result<usize, RequestError> {
    let &Request { header, body, length, room } = request;
    if header.len as usize != length {
        return Err(RequestError::Length { said: header.len, has: length });
    }
    let unknown = || RequestError::Unknown(header.opcode);
    let opcode = Opcode::try_from(header.opcode).map_err(|()| unknown())?;
    let has_reply = !matches!(opcode, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt);
    if has_reply {
        check_room(room, REPLY_HEADER_SIZE as usize)?;
    }
    if !matches!(opcode, Opcode::Write) && REQUEST_HEADER_SIZE + body.len() != length {
        return Err(RequestError::TooLong);
    }
    let mut fields = Fields(body);
    let needed = check_operation(opcode, &header, &mut fields, length)?.unwrap_or(room);
    check_room(room, needed)?;
    match fields.0.len() {
        0 => Ok(needed),
        bytes => Err(RequestError::Extra { bytes }),
    }
}

fn check_room(room: usize, needed: usize) -> Result<(), RequestError> {
    if room < needed { Err(RequestError::Room { room, needed }) } else { Ok(()) }
}

/// Takes an operation's fields. Returns the bytes of its longest reply, if that depends on the request.
fn check_operation(
    opcode: Opcode,
    header: &InHeader,
    fields: &mut Fields,
    length: usize,
) -> Result<Option<usize>, RequestError> {
    match opcode {
        Opcode::Lookup | Opcode::Unlink | Opcode::Rmdir | Opcode::Removexattr => fields.take_name()?,
        Opcode::Readlink | Opcode::Statfs | Opcode::Destroy => {}
        Opcode::Forget => drop(fields.read_struct::<ForgetIn>()?),
        Opcode::BatchForget => fields.take_forgets()?,
        Opcode::Interrupt => drop(fields.read_struct::<InterruptIn>()?),
        Opcode::Getattr => check_flags(fields.read_struct::<GetattrIn>()?.flags, GETATTR_FH)?,
        Opcode::Setattr => {
            let valid = SetattrValid::all().bits() | FATTR_FH | FATTR_LOCKOWNER;
            check_flags(fields.read_struct::<SetattrIn>()?.valid, valid)?;
        }
        Opcode::Symlink => {
            fields.take_name()?;
            fields.take_target()?;
            fields.take_extensions(header)?;
        }
        Opcode::Mknod => fields.take_new_file::<MknodIn>(header).map(drop)?,
        Opcode::Mkdir => fields.take_new_file::<MkdirIn>(header).map(drop)?,
        Opcode::Create => {
            let create: CreateIn = fields.take_new_file(header)?;
            check_flags(create.open_flags, OPEN_KILL_SUIDGID)?;
            check_open(create.flags & !libc::O_CREAT.cast_unsigned())?;
        }
        Opcode::Rename => {
            fields.read_struct::<RenameIn>()?;
            fields.take_name()?;
            fields.take_name()?;
        }
        Opcode::Rename2 => {
            let flags = fields.read_struct::<Rename2In>()?.flags;
            check_flags(flags, libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT)?;
            fields.take_name()?;
            fields.take_name()?;
        }
        Opcode::Link => {
            fields.read_struct::<LinkIn>()?;
            fields.take_name()?;
        }
        Opcode::Open | Opcode::Opendir => {
            let open: OpenIn = fields.read_struct()?;
            check_flags(open.open_flags, OPEN_KILL_SUIDGID)?;
            check_open(open.flags)?;
        }
        Opcode::Setxattr => fields.take_attribute()?,
        Opcode::Getxattr => {
            check_attribute_size(fields.read_struct::<GetxattrIn>()?.size)?;
            fields.take_name()?;
        }
        Opcode::Listxattr => check_attribute_size(fields.read_struct::<GetxattrIn>()?.size)?,
        Opcode::Init => {
            let InitInCompat { major, minor, .. } = fields.read_struct()?;
            if major != KERNEL_VERSION || minor < MIN_KERNEL_MINOR_VERSION {
                return Err(RequestError::Version { major, minor });
            }
            fields.read_struct::<InitInExt>()?;
        }
        Opcode::Access => {
            check_flags(
                fields.read_struct::<AccessIn>()?.mask,
                (libc::R_OK | libc::W_OK | libc::X_OK).cast_unsigned(),
            )?;
        }
        Opcode::Syncfs => drop(fields.read_struct::<SyncfsIn>()?),
        _ => return check_on_open_file(opcode, fields, length),
    }
    Ok(None)
}

/// [`check_operation`] for operations on open files.
fn check_on_open_file(
    opcode: Opcode,
    fields: &mut Fields,
    length: usize,
) -> Result<Option<usize>, RequestError> {
    match opcode {
        Opcode::Read => {
            let read: ReadIn = fields.read_struct()?;
            check_flags(read.read_flags, READ_LOCKOWNER)?;
            check_range(read.offset, read.size.into())?;
            return data_reply_size(read.size).map(Some);
        }
        // The offset is not checked: a file system may number the entries of a directory as it likes.
        Opcode::Readdir | Opcode::Readdirplus => {
            let size = fields.read_struct::<ReadIn>()?.size;
            if size == 0 {
                return Err(RequestError::Size(size));
            }
            return data_reply_size(size).map(Some);
        }
        Opcode::Write => {
            let write: WriteIn = fields.read_struct()?;
            check_flags(write.write_flags, WRITE_CACHE | WRITE_LOCKOWNER | WRITE_KILL_PRIV)?;
            check_range(write.offset, write.size.into())?;
            if write.size > DATA_MAX {
                return Err(RequestError::Size(write.size));
            }
            check_length(length - WRITE_HEADER_SIZE.min(length), write.size)?;
        }
        Opcode::Release | Opcode::Releasedir => {
            check_flags(
                fields.read_struct::<ReleaseIn>()?.release_flags,
                RELEASE_FLUSH | RELEASE_FLOCK_UNLOCK,
            )?;
        }
        Opcode::Fsync | Opcode::Fsyncdir => {
            check_flags(fields.read_struct::<FsyncIn>()?.fsync_flags, FSYNC_FDATASYNC)?;
        }
        Opcode::Flush => drop(fields.read_struct::<FlushIn>()?),
        Opcode::Fallocate => {
            let FallocateIn { offset, length, mode, .. } = fields.read_struct()?;
            let modes = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
            if mode & !modes.cast_unsigned() != 0 {
                return Err(RequestError::Allocation(mode));
            }
            check_range(offset, length)?;
        }
        Opcode::Lseek => {
            let whence = fields.read_struct::<LseekIn>()?.whence;
            // The guest's kernel handles all other values by itself.
            if ![libc::SEEK_DATA, libc::SEEK_HOLE].contains(&whence.cast_signed()) {
                return Err(RequestError::Flags(whence));
            }
        }
        Opcode::CopyFileRange => {
            let copy: CopyfilerangeIn = fields.read_struct()?;
            if copy.flags != 0 {
                // The error says no more than 32 bits of what the guest has sent.
                return Err(RequestError::Flags(u32::try_from(copy.flags).unwrap_or(u32::MAX)));
            }
            check_range(copy.off_in, copy.len)?;
            check_range(copy.off_out, copy.len)?;
        }
        // virtiofsd does not serve the other operations, as locks and ioctls.
        _ => return Err(RequestError::Unknown(opcode as u32)),
    }
    Ok(None)
}

fn check_flags(flags: u32, known: u32) -> Result<(), RequestError> {
    if flags & !known == 0 { Ok(()) } else { Err(RequestError::Flags(flags)) }
}

fn check_length(has: usize, said: u32) -> Result<(), RequestError> {
    if has == said as usize { Ok(()) } else { Err(RequestError::Length { said, has }) }
}

/// Checks the flags with which a file is opened that the guest knows. They may neither make a file, nor open it for its
/// path only.
fn check_open(flags: u32) -> Result<(), RequestError> {
    /// `O_TMPFILE` without the `O_DIRECTORY` that is part of it.
    const TEMPORARY: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;
    let refused = flags & (libc::O_CREAT | libc::O_PATH | TEMPORARY).cast_unsigned();
    if refused == 0 { Ok(()) } else { Err(RequestError::Flags(refused)) }
}

/// Checks that a range of a file ends below 2⁶³: offsets are signed in the host's kernel.
fn check_range(offset: u64, length: u64) -> Result<(), RequestError> {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX.cast_unsigned() => Ok(()),
        _ => Err(RequestError::Range),
    }
}

/// The bytes of a reply with this much data.
fn data_reply_size(size: u32) -> Result<usize, RequestError> {
    if size > DATA_MAX {
        Err(RequestError::Size(size))
    } else {
        Ok(REPLY_HEADER_SIZE as usize + size as usize)
    }
}

fn check_attribute_size(size: u32) -> Result<(), RequestError> {
    if size > XATTR_SIZE_MAX { Err(RequestError::Size(size)) } else { Ok(()) }
}

/// The fields of a request that are not parsed yet.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn read_struct<T: ByteValued + Default>(&mut self) -> Result<T, RequestError> {
        let (bytes, rest) = self.0.split_at_checked(size_of::<T>()).ok_or(RequestError::Short)?;
        self.0 = rest;
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(bytes);
        Ok(value)
    }

    /// Takes a name with its terminator. [`super::names`] checks whether it is valid.
    fn take_name(&mut self) -> Result<(), RequestError> {
        self.take_string().map(drop)
    }

    /// Takes a string. Returns its length with its terminator.
    fn take_string(&mut self) -> Result<usize, RequestError> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(RequestError::Unterminated)?;
        self.0 = &self.0[end + 1..];
        Ok(end + 1)
    }

    /// Takes the target of a symbolic link.
    fn take_target(&mut self) -> Result<(), RequestError> {
        if self.take_string()? > TARGET_MAX { Err(RequestError::TooLong) } else { Ok(()) }
    }

    /// Takes the fields of an operation that makes a file: a structure, a name and extensions.
    fn take_new_file<T: ByteValued + Default>(&mut self, header: &InHeader) -> Result<T, RequestError> {
        let value = self.read_struct()?;
        self.take_name()?;
        self.take_extensions(header)?;
        Ok(value)
    }

    /// Takes as many bytes of extensions as the header says. virtiofsd checks their contents.
    fn take_extensions(&mut self, header: &InHeader) -> Result<(), RequestError> {
        const UNIT: usize = 8;
        let length = usize::from(header.total_extlen) * UNIT;
        self.0 = self.0.get(length..).ok_or(RequestError::Short)?;
        Ok(())
    }

    /// Takes the fields of SETXATTR.
    fn take_attribute(&mut self) -> Result<(), RequestError> {
        let SetxattrIn { size, flags, setxattr_flags, .. } = self.read_struct()?;
        check_flags(flags, (libc::XATTR_CREATE | libc::XATTR_REPLACE).cast_unsigned())?;
        check_flags(setxattr_flags, SetxattrFlags::all().bits())?;
        check_attribute_size(size)?;
        self.take_name()?;
        check_length(self.0.len(), size)?;
        self.0 = &[];
        Ok(())
    }

    /// Takes the fields of `BATCH_FORGET`.
    fn take_forgets(&mut self) -> Result<(), RequestError> {
        let count = self.read_struct::<virtiofsd::fuse::BatchForgetIn>()?.count;
        for _ in 0..count {
            self.read_struct::<ForgetOne>()?;
        }
        Ok(())
    }
}
