//! What a request must look like before virtiofsd gets to see it.
//!
//! virtiofsd was written for a client that it can trust. It ignores bytes that it does not expect and flags that it does not
//! know, writes past the length that a WRITE gives, and panics where an answer has no room or a position no sign. So each
//! request is taken apart here first: it has exactly the fields and the names that its operation has
//! (`include/uapi/linux/fuse.h`), and whatever is not understood is refused.

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
pub const HEADER: usize = size_of::<InHeader>();
/// Bytes of a WRITE before its data.
pub const WRITE_HEAD: usize = HEADER + size_of::<WriteIn>();
/// Bytes of the shortest answer: its header.
pub const ANSWER: u32 = 16;
const _: () = assert!(ANSWER as usize == size_of::<OutHeader>());
/// Most data of one READ, WRITE or listing: what virtiofsd offers in its answer to INIT.
const DATA_MAX: u32 = 1 << 20;
/// Longest value of an extended attribute (`XATTR_SIZE_MAX`).
const ATTRIBUTE_MAX: u32 = 64 << 10;
/// Longest target of a symbolic link, with its end (`PATH_MAX`).
const TARGET_MAX: usize = 4096;

/// The guest asks for something in a way that is not understood.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RequestError {
    #[error("the guest's request says that it has {said} bytes, and has {has}")]
    Length { said: u32, has: usize },
    #[error("the guest's request is longer than one of its kind can be")]
    TooLong,
    #[error("the guest's request ends before all is said")]
    Short,
    #[error("the guest's request has {bytes} bytes too many")]
    Extra { bytes: usize },
    #[error("a name in the guest's request has no end")]
    Endless,
    #[error("the guest gives room for {room} bytes of an answer; it needs {needed}")]
    Room { room: usize, needed: usize },
    #[error("the guest asks for operation {0}, which this device does not have")]
    Unknown(u32),
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
    /// What the guest is told.
    pub fn errno(&self) -> i32 {
        match self {
            RequestError::Unknown(_) => libc::ENOSYS,
            RequestError::Allocation(_) => libc::EOPNOTSUPP,
            RequestError::TooLong => libc::E2BIG,
            RequestError::Version { .. } => libc::EPROTO,
            _ => libc::EINVAL,
        }
    }
}

/// A request as it is checked.
pub struct Request<'a> {
    pub header: InHeader,
    /// What follows the header, but for the data of a WRITE; cut off where it is too long for any request.
    pub body: &'a [u8],
    /// Bytes of the whole request.
    pub length: usize,
    /// Bytes that there is room for in the answer.
    pub room: usize,
}

/// Checks a request. Answers with how much of the room for its answer may be used.
pub fn check(request: &Request) -> Result<usize, RequestError> {
    let &Request { header, body, length, room } = request;
    if header.len as usize != length {
        return Err(RequestError::Length { said: header.len, has: length });
    }
    let unknown = || RequestError::Unknown(header.opcode);
    let opcode = Opcode::try_from(header.opcode).map_err(|()| unknown())?;
    let answered = !matches!(opcode, Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt);
    if answered {
        enough(room, ANSWER as usize)?;
    }
    if !matches!(opcode, Opcode::Write) && HEADER + body.len() != length {
        return Err(RequestError::TooLong);
    }
    let mut fields = Fields(body);
    let needed = check_operation(opcode, &header, &mut fields, length)?.unwrap_or(room);
    enough(room, needed)?;
    match fields.0.len() {
        0 => Ok(needed),
        bytes => Err(RequestError::Extra { bytes }),
    }
}

fn enough(room: usize, needed: usize) -> Result<(), RequestError> {
    if room < needed { Err(RequestError::Room { room, needed }) } else { Ok(()) }
}

/// Takes an operation's fields. Answers with the room that its answer takes, where that depends on what is asked for.
fn check_operation(
    opcode: Opcode,
    header: &InHeader,
    fields: &mut Fields,
    length: usize,
) -> Result<Option<usize>, RequestError> {
    match opcode {
        Opcode::Lookup | Opcode::Unlink | Opcode::Rmdir | Opcode::Removexattr => fields.name()?,
        Opcode::Readlink | Opcode::Statfs | Opcode::Destroy => {}
        Opcode::Forget => drop(fields.take::<ForgetIn>()?),
        Opcode::BatchForget => fields.forgets()?,
        Opcode::Interrupt => drop(fields.take::<InterruptIn>()?),
        Opcode::Getattr => known(fields.take::<GetattrIn>()?.flags, GETATTR_FH)?,
        Opcode::Setattr => {
            let valid = SetattrValid::all().bits() | FATTR_FH | FATTR_LOCKOWNER;
            known(fields.take::<SetattrIn>()?.valid, valid)?;
        }
        Opcode::Symlink => {
            fields.name()?;
            fields.target()?;
            fields.extensions(header)?;
        }
        Opcode::Mknod => fields.named_with_extensions::<MknodIn>(header).map(drop)?,
        Opcode::Mkdir => fields.named_with_extensions::<MkdirIn>(header).map(drop)?,
        Opcode::Create => {
            let create: CreateIn = fields.named_with_extensions(header)?;
            known(create.open_flags, OPEN_KILL_SUIDGID)?;
            check_open(create.flags & !libc::O_CREAT.cast_unsigned())?;
        }
        Opcode::Rename => {
            fields.take::<RenameIn>()?;
            fields.name()?;
            fields.name()?;
        }
        Opcode::Rename2 => {
            let flags = fields.take::<Rename2In>()?.flags;
            known(flags, libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT)?;
            fields.name()?;
            fields.name()?;
        }
        Opcode::Link => {
            fields.take::<LinkIn>()?;
            fields.name()?;
        }
        Opcode::Open | Opcode::Opendir => {
            let open: OpenIn = fields.take()?;
            known(open.open_flags, OPEN_KILL_SUIDGID)?;
            check_open(open.flags)?;
        }
        Opcode::Setxattr => fields.attribute()?,
        Opcode::Getxattr => {
            attribute_size(fields.take::<GetxattrIn>()?.size)?;
            fields.name()?;
        }
        Opcode::Listxattr => attribute_size(fields.take::<GetxattrIn>()?.size)?,
        Opcode::Init => {
            let InitInCompat { major, minor, .. } = fields.take()?;
            if major != KERNEL_VERSION || minor < MIN_KERNEL_MINOR_VERSION {
                return Err(RequestError::Version { major, minor });
            }
            fields.take::<InitInExt>()?;
        }
        Opcode::Access => {
            known(fields.take::<AccessIn>()?.mask, (libc::R_OK | libc::W_OK | libc::X_OK).cast_unsigned())?;
        }
        Opcode::Syncfs => drop(fields.take::<SyncfsIn>()?),
        _ => return check_on_open_file(opcode, fields, length),
    }
    Ok(None)
}

/// The same for what is done to an open file.
fn check_on_open_file(
    opcode: Opcode,
    fields: &mut Fields,
    length: usize,
) -> Result<Option<usize>, RequestError> {
    match opcode {
        Opcode::Read => {
            let read: ReadIn = fields.take()?;
            known(read.read_flags, READ_LOCKOWNER)?;
            check_range(read.offset, read.size.into())?;
            return data_room(read.size).map(Some);
        }
        // A file system may number the places in a directory as it likes.
        Opcode::Readdir | Opcode::Readdirplus => {
            let size = fields.take::<ReadIn>()?.size;
            if size == 0 {
                return Err(RequestError::Size(size));
            }
            return data_room(size).map(Some);
        }
        Opcode::Write => {
            let write: WriteIn = fields.take()?;
            known(write.write_flags, WRITE_CACHE | WRITE_LOCKOWNER | WRITE_KILL_PRIV)?;
            check_range(write.offset, write.size.into())?;
            if write.size > DATA_MAX {
                return Err(RequestError::Size(write.size));
            }
            exactly(length - WRITE_HEAD.min(length), write.size)?;
        }
        Opcode::Release | Opcode::Releasedir => {
            known(fields.take::<ReleaseIn>()?.release_flags, RELEASE_FLUSH | RELEASE_FLOCK_UNLOCK)?;
        }
        Opcode::Fsync | Opcode::Fsyncdir => known(fields.take::<FsyncIn>()?.fsync_flags, FSYNC_FDATASYNC)?,
        Opcode::Flush => drop(fields.take::<FlushIn>()?),
        Opcode::Fallocate => {
            let FallocateIn { offset, length, mode, .. } = fields.take()?;
            let modes = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
            if mode & !modes.cast_unsigned() != 0 {
                return Err(RequestError::Allocation(mode));
            }
            check_range(offset, length)?;
        }
        Opcode::Lseek => {
            let whence = fields.take::<LseekIn>()?.whence;
            // The guest's kernel knows by itself where the others lead.
            if ![libc::SEEK_DATA, libc::SEEK_HOLE].contains(&whence.cast_signed()) {
                return Err(RequestError::Flags(whence));
            }
        }
        Opcode::CopyFileRange => {
            let copy: CopyfilerangeIn = fields.take()?;
            if copy.flags != 0 {
                return Err(RequestError::Flags(u32::try_from(copy.flags).unwrap_or(u32::MAX)));
            }
            check_range(copy.off_in, copy.len)?;
            check_range(copy.off_out, copy.len)?;
        }
        // Nobody serves them: locks, ioctls and the like.
        _ => return Err(RequestError::Unknown(opcode as u32)),
    }
    Ok(None)
}

fn known(flags: u32, known: u32) -> Result<(), RequestError> {
    if flags & !known == 0 { Ok(()) } else { Err(RequestError::Flags(flags)) }
}

fn exactly(has: usize, said: u32) -> Result<(), RequestError> {
    if has == said as usize { Ok(()) } else { Err(RequestError::Length { said, has }) }
}

/// Flags with which a file that the guest knows is opened. It is neither made by that, nor opened for its path only.
fn check_open(flags: u32) -> Result<(), RequestError> {
    /// `O_TMPFILE` without the `O_DIRECTORY` that is part of it.
    const TEMPORARY: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;
    let refused = flags & (libc::O_CREAT | libc::O_PATH | TEMPORARY).cast_unsigned();
    if refused == 0 { Ok(()) } else { Err(RequestError::Flags(refused)) }
}

/// Positions have a sign in the host's kernel.
fn check_range(offset: u64, length: u64) -> Result<(), RequestError> {
    match offset.checked_add(length) {
        Some(end) if end <= i64::MAX.cast_unsigned() => Ok(()),
        _ => Err(RequestError::Range),
    }
}

fn data_room(size: u32) -> Result<usize, RequestError> {
    if size > DATA_MAX { Err(RequestError::Size(size)) } else { Ok(ANSWER as usize + size as usize) }
}

fn attribute_size(size: u32) -> Result<(), RequestError> {
    if size > ATTRIBUTE_MAX { Err(RequestError::Size(size)) } else { Ok(()) }
}

/// What is left of a request's body.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<T: ByteValued + Default>(&mut self) -> Result<T, RequestError> {
        let (bytes, rest) = self.0.split_at_checked(size_of::<T>()).ok_or(RequestError::Short)?;
        self.0 = rest;
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(bytes);
        Ok(value)
    }

    /// A name up to and with its end. Whether it is a good one is for [`super::names`] to say.
    fn name(&mut self) -> Result<(), RequestError> {
        self.string().map(drop)
    }

    /// Takes a string; answers with its length, its end included.
    fn string(&mut self) -> Result<usize, RequestError> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(RequestError::Endless)?;
        self.0 = &self.0[end + 1..];
        Ok(end + 1)
    }

    fn target(&mut self) -> Result<(), RequestError> {
        if self.string()? > TARGET_MAX { Err(RequestError::TooLong) } else { Ok(()) }
    }

    fn named_with_extensions<T: ByteValued + Default>(
        &mut self,
        header: &InHeader,
    ) -> Result<T, RequestError> {
        let value = self.take()?;
        self.name()?;
        self.extensions(header)?;
        Ok(value)
    }

    /// What the header says of extensions, of which virtiofsd checks the contents.
    fn extensions(&mut self, header: &InHeader) -> Result<(), RequestError> {
        const UNIT: usize = 8;
        let length = usize::from(header.total_extlen) * UNIT;
        self.0 = self.0.get(length..).ok_or(RequestError::Short)?;
        Ok(())
    }

    fn attribute(&mut self) -> Result<(), RequestError> {
        let SetxattrIn { size, flags, setxattr_flags, .. } = self.take()?;
        known(flags, (libc::XATTR_CREATE | libc::XATTR_REPLACE).cast_unsigned())?;
        known(setxattr_flags, SetxattrFlags::all().bits())?;
        attribute_size(size)?;
        self.name()?;
        exactly(self.0.len(), size)?;
        self.0 = &[];
        Ok(())
    }

    fn forgets(&mut self) -> Result<(), RequestError> {
        let count = self.take::<virtiofsd::fuse::BatchForgetIn>()?.count;
        for _ in 0..count {
            self.take::<ForgetOne>()?;
        }
        Ok(())
    }
}
