use std::{io::Write as _, path::Path};

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::{memory::GuestMemory, virtio::testing::guest_memory};

fn file(contents: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file
}

fn open(path: &Path, read_only: bool) -> OwnedFd {
    File::options().read(true).write(!read_only).open(path).unwrap().into()
}

fn disk(files: &[&tempfile::NamedTempFile], read_only: bool) -> Disk {
    Disk::new(files.iter().map(|file| open(file.path(), read_only)).collect(), read_only).unwrap()
}

/// Buffers of these lengths, the first at 1 MiB and the others 64 KiB apart.
fn iovecs<'a>(memory: &'a GuestMemory, lengths: &[u32]) -> IoVecs<'a> {
    let mut iovecs = IoVecs::new();
    for (index, length) in (0..).zip(lengths) {
        iovecs.add(memory, address(index), *length).unwrap();
    }
    iovecs
}

fn address(index: u64) -> GuestAddress {
    GuestAddress((1 << 20) + index * 0x1_0000)
}

#[test]
fn segments_follow_each_other_on_boundaries_and_the_rest_is_zero() {
    let (first, second) = (file(&[1; 5000]), file(&[2; 700]));
    let disk = disk(&[&first, &second], true);
    assert_eq!(disk.extents(), [Extent { offset: 0, length: 5000 }, Extent { offset: 8192, length: 700 }]);
    assert_eq!((disk.size(), disk.block_size()), (8192 + 1024, 512));

    let memory = guest_memory();
    for index in 0..3 {
        memory.write_slice(&[0xff; 4096], address(index)).unwrap();
    }
    // From the first segment through its padding into the second and to the disk's end.
    disk.read(4608, iovecs(&memory, &[500, 3584, 524])).unwrap();
    let mut read = vec![0; 4608];
    memory.read_slice(&mut read[..500], address(0)).unwrap();
    memory.read_slice(&mut read[500..4084], address(1)).unwrap();
    memory.read_slice(&mut read[4084..], address(2)).unwrap();
    assert!(read[..392].iter().all(|byte| *byte == 1));
    assert!(read[392..3584].iter().all(|byte| *byte == 0));
    assert!(read[3584..4284].iter().all(|byte| *byte == 2));
    assert!(read[4284..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_written_is_in_the_file_and_padding_cannot_be_written() {
    let (first, second) = (file(&[1; 4608]), file(&[2; 512]));
    let disk = disk(&[&first, &second], false);
    let memory = guest_memory();
    memory.write_slice(&[7; 512], address(0)).unwrap();
    disk.write(4096, iovecs(&memory, &[512])).unwrap();
    disk.write(8192, iovecs(&memory, &[512])).unwrap();
    disk.flush().unwrap();
    assert_eq!(std::fs::read(first.path()).unwrap()[4096..], [7; 512]);
    assert_eq!(std::fs::read(second.path()).unwrap(), [7; 512]);
    let error = disk.write(4608, iovecs(&memory, &[512])).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(first.as_file().metadata().unwrap().len(), 4608);
}

#[test]
fn nothing_is_read_beyond_the_end() {
    let only = file(&[1; 1024]);
    let disk = disk(&[&only], true);
    let memory = guest_memory();
    assert!(disk.read(512, iovecs(&memory, &[1024])).is_err());
    assert!(disk.read(u64::MAX - 100, iovecs(&memory, &[512])).is_err());
    // A file that has become shorter since.
    only.as_file().set_len(512).unwrap();
    assert!(disk.read(512, iovecs(&memory, &[512])).is_err());
}

#[test]
fn what_is_no_disk_is_refused_by_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let (some, empty) = (file(&[1]), file(&[]));
    // One that can be opened without anybody at its other end.
    let fifo: OwnedFd = File::options().read(true).write(true).open(fifo).unwrap().into();
    let others = [directory.path(), Path::new("/dev/null"), empty.path()].map(|path| open(path, true));
    for other in others.into_iter().chain([fifo]) {
        let error = Disk::new(vec![open(some.path(), true), other], true).map(drop).unwrap_err();
        assert!(error.to_string().contains("segment 2"), "{error}");
    }
    assert!(matches!(Disk::new(Vec::new(), true), Err(DiskError::Segments(0))));
    let many = (0..=SEGMENTS_MAX).map(|_| open(some.path(), true)).collect();
    assert!(matches!(Disk::new(many, true), Err(DiskError::Segments(_))));
}

#[test]
fn segments_too_large_together_are_refused() {
    let huge = tempfile::NamedTempFile::new().unwrap();
    // Not every file system has files of this size.
    if huge.as_file().set_len(i64::MAX as u64 - 4096).is_ok() {
        let twice = vec![open(huge.path(), true), open(huge.path(), true)];
        assert!(matches!(Disk::new(twice, true), Err(DiskError::TooLarge { number: 2 })));
    }
}
