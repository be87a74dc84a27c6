//! Partitions of a disk without a partition table. The agent tells the kernel where they are (`BLKPG`).

use std::{
    ffi::{c_int, c_longlong, c_void},
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::Path,
};

use pericarp_protos::host::Part;

/// The size of a sector in bytes. Partitions consist of whole sectors.
const SECTOR_SIZE: u64 = 512;

/// `_IO(0x12, 105)` in `linux/blkpg.h`.
const BLKPG: libc::Ioctl = 0x1269;
const ADD_PARTITION: c_int = 1;
const DELETE_PARTITION: c_int = 2;

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct Argument {
    operation: c_int,
    flags: c_int,
    length: c_int,
    data: *mut c_void,
}

/// `struct blkpg_partition`, whose names the kernel ignores.
#[repr(C)]
struct Partition {
    start: c_longlong,
    length: c_longlong,
    number: c_int,
    names: [u8; 128],
}

/// Makes a part of a disk a block device of its own, with a number from 1.
pub fn add(disk: &Path, number: u32, part: &Part) -> io::Result<()> {
    // A file may end within its last sector, whose rest reads as zeroes.
    let length = part.length.checked_next_multiple_of(SECTOR_SIZE).ok_or(io::ErrorKind::InvalidInput)?;
    change(disk, ADD_PARTITION, number, part.offset, length)
}

/// Deletes a partition that [`add`] has added.
pub fn delete(disk: &Path, number: u32) -> io::Result<()> {
    change(disk, DELETE_PARTITION, number, 0, 0)
}

fn change(disk: &Path, operation: c_int, number: u32, start: u64, length: u64) -> io::Result<()> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut partition = Partition {
        start: c_longlong::try_from(start).map_err(invalid)?,
        length: c_longlong::try_from(length).map_err(invalid)?,
        number: c_int::try_from(number).map_err(invalid)?,
        names: [0; 128],
    };
    let argument = Argument {
        operation,
        flags: 0,
        // The kernel ignores the length.
        length: 0,
        data: (&raw mut partition).cast(),
    };
    let disk = File::open(disk)?;
    // SAFETY: both structures are as the kernel defines them and outlive the call, which only reads them.
    if unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
