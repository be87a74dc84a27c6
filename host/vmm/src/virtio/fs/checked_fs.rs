//! virtiofsd's file system, behind the checks that its authors leave to a sandbox.

use std::{ffi::CStr, io, time::Duration};

use virtiofsd::{
    filesystem::{
        Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
        SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
    },
    fuse::{Attr, SetattrIn},
    passthrough::PassthroughFs,
};

use super::{credentials::FsCredentials, names};
use crate::virtio::Counter;

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;
type OpenReply = (Option<Handle>, OpenOptions);

/// Flag with which every file is opened: see [`CheckedFs::open`].
const OPEN_NONBLOCK: u32 = libc::O_NONBLOCK.cast_unsigned();
/// Most bytes that one `COPY_FILE_RANGE` copies.
const COPY_MAX: u64 = 16 << 20;

/// The share, with operations that check what the guest asks for.
pub struct CheckedFs {
    inner: PassthroughFs,
    /// Bytes of files that have been read, written or copied.
    data_bytes: Counter,
}

impl CheckedFs {
    pub fn new(inner: PassthroughFs, data_bytes: Counter) -> Self {
        Self { inner, data_bytes }
    }

    /// Counts bytes of data that an operation has moved.
    fn count_data(&self, moved: io::Result<usize>) -> io::Result<usize> {
        self.data_bytes.add(*moved.as_ref().unwrap_or(&0) as u64);
        moved
    }
}

/// Checks a file that the guest makes with `mknod(2)`. It may not make devices, except the whiteouts of overlay file
/// systems: everybody on the host who may open such a file could use the host's device.
fn check_node(mode: u32, device: u32) -> io::Result<()> {
    const WHITEOUT: u32 = 0;
    match mode & libc::S_IFMT {
        0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => Ok(()),
        libc::S_IFCHR if device == WHITEOUT => Ok(()),
        libc::S_IFCHR | libc::S_IFBLK => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// The FUSE features that a guest's kernel must have. With another kernel, requests would look different from what is
/// checked.
fn required_features() -> FsOptions {
    FsOptions::SUBMOUNTS
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::POSIX_ACL
        | FsOptions::DONT_MASK
        | FsOptions::SETXATTR_EXT
        | FsOptions::CREATE_SUPP_GROUP
}

/// Operations that need no check.
macro_rules! pass_through {
    ($(fn $name:ident(&self $(, $argument:ident: $type:ty)*) $(-> $returned:ty)?;)*) => {
        $(fn $name(&self $(, $argument: $type)*) $(-> $returned)? {
            self.inner.$name($($argument),*)
        })*
    };
}

impl FileSystem for CheckedFs {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        if !capable.contains(required_features()) {
            tracing::warn!(?capable, "fs: the guest's kernel cannot do what this device needs");
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.inner.init(capable)
    }

    fn lookup(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        names::check(name)?;
        self.inner.lookup(context, parent, name)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        names::check(name)?;
        self.inner.symlink(context, target, parent, name, extensions)
    }

    fn mknod(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        names::check(name)?;
        check_node(mode, device)?;
        self.inner.mknod(context, parent, name, mode, device, umask, extensions)
    }

    fn mkdir(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        names::check(name)?;
        self.inner.mkdir(context, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        names::check(name)?;
        self.inner.unlink(context, parent, name)
    }

    fn rmdir(&self, context: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        names::check(name)?;
        self.inner.rmdir(context, parent, name)
    }

    fn rename(
        &self,
        context: Context,
        old_parent: Inode,
        old_name: &CStr,
        new_parent: Inode,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        names::check(old_name)?;
        names::check(new_name)?;
        self.inner.rename(context, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, context: Context, inode: Inode, new_parent: Inode, new_name: &CStr) -> io::Result<Entry> {
        names::check(new_name)?;
        self.inner.link(context, inode, new_parent, new_name)
    }

    fn create(
        &self,
        context: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_privileges: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        names::check(name)?;
        let flags = flags | OPEN_NONBLOCK;
        self.inner.create(context, parent, name, mode, kill_privileges, flags, umask, extensions)
    }

    /// Opens a file without blocking. Reading files of tracefs, for example, waits until there is something to read,
    /// and opening a file waits while another process has a lease on it: nobody else in the pod would be served
    /// meanwhile.
    fn open(
        &self,
        context: Context,
        inode: Inode,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<OpenReply> {
        self.inner.open(context, inode, kill_privileges, flags | OPEN_NONBLOCK)
    }

    fn setxattr(
        &self,
        context: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        names::check_attribute(name)?;
        self.inner.setxattr(context, inode, name, value, flags, extra)
    }

    fn getxattr(&self, context: Context, inode: Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        names::check_attribute(name)?;
        self.inner.getxattr(context, inode, name, size)
    }

    fn removexattr(&self, context: Context, inode: Inode, name: &CStr) -> io::Result<()> {
        names::check_attribute(name)?;
        self.inner.removexattr(context, inode, name)
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        context: Context,
        inode: Inode,
        handle: Handle,
        writer: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let read = self.inner.read(context, inode, handle, writer, size, offset, lock_owner, flags);
        self.count_data(read)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        context: Context,
        inode: Inode,
        handle: Handle,
        reader: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<usize> {
        let _credentials = FsCredentials::for_data(context, delayed);
        let written = self.inner.write(
            context,
            inode,
            handle,
            reader,
            size,
            offset,
            lock_owner,
            delayed,
            kill_privileges,
            flags,
        );
        self.count_data(written)
    }

    fn fallocate(
        &self,
        context: Context,
        inode: Inode,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let _credentials = FsCredentials::for_data(context, false);
        self.inner.fallocate(context, inode, handle, mode, offset, length)
    }

    fn copyfilerange(
        &self,
        context: Context,
        from: Inode,
        from_handle: Handle,
        from_offset: u64,
        to: Inode,
        to_handle: Handle,
        to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let _credentials = FsCredentials::for_data(context, false);
        // A copy may be shorter than what is asked for. The longest would occupy the device for minutes.
        let length = length.min(COPY_MAX);
        let inner = &self.inner;
        let copied = inner.copyfilerange(
            context,
            from,
            from_handle,
            from_offset,
            to,
            to_handle,
            to_offset,
            length,
            flags,
        );
        self.count_data(copied)
    }

    pass_through! {
        fn destroy(&self);
        fn forget(&self, context: Context, inode: Inode, count: u64);
        fn batch_forget(&self, context: Context, requests: Vec<(Inode, u64)>);
        fn getattr(&self, context: Context, inode: Inode, handle: Option<Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(
            &self, context: Context, inode: Inode, attributes: SetattrIn, handle: Option<Handle>, valid: SetattrValid
        ) -> io::Result<(Attr, Duration)>;
        fn readlink(&self, context: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn flush(&self, context: Context, inode: Inode, handle: Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, context: Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()>;
        fn release(
            &self, context: Context, inode: Inode, flags: u32, handle: Handle, flush: bool, unlock: bool,
            lock_owner: Option<u64>
        ) -> io::Result<()>;
        fn statfs(&self, context: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn listxattr(&self, context: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn opendir(&self, context: Context, inode: Inode, flags: u32) -> io::Result<OpenReply>;
        fn readdir(
            &self, context: Context, inode: Inode, handle: Handle, size: u32, offset: u64
        ) -> io::Result<Self::DirIter>;
        fn fsyncdir(&self, context: Context, inode: Inode, data_only: bool, handle: Handle) -> io::Result<()>;
        fn releasedir(&self, context: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn access(&self, context: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, context: Context, inode: Inode, handle: Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn syncfs(&self, context: Context, inode: Inode) -> io::Result<()>;
    }
}
