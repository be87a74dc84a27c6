//! What a file system can do beyond reading and writing, one line each, for comparison with another.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    mem::MaybeUninit,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    process::Command,
    ptr,
};

use rustix::{
    fs::{
        FallocateFlags, FlockOperation, OFlags, RenameFlags, SeekFrom, XattrFlags, fallocate, fcntl_lock,
        flock, inotify, renameat_with,
    },
    mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap},
};

/// One page, the unit of direct I/O and of mappings.
const PAGE: usize = 4096;

/// Tries one operation and returns a description of its result.
type Ability = fn() -> io::Result<String>;

/// Tries everything in a directory, which must be empty.
pub fn try_all(directory: &str) -> io::Result<()> {
    env::set_current_dir(directory)?;
    let abilities: [(&str, Ability); 9] = [
        ("extended attributes", extended_attributes),
        ("direct I/O", direct),
        ("shared mapping", shared_mapping),
        ("locks", locks),
        ("inotify", watch),
        ("holes", holes),
        ("preallocation", preallocation),
        ("renames", renames),
        ("synchronization", synchronization),
    ];
    for (name, ability) in abilities {
        match ability() {
            Ok(outcome) => println!("{name}: {outcome}"),
            Err(error) => println!("{name}: {error}"),
        }
    }
    Ok(())
}

/// Says whether a file can be locked now.
pub fn try_lock(path: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    let whole = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    let record = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    println!("flock {whole} fcntl {record}");
    Ok(())
}

/// Locks a file, says `locked` and keeps it until stdin ends.
pub fn hold_lock(path: &str) -> io::Result<()> {
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    flock(&file, FlockOperation::LockExclusive)?;
    fcntl_lock(&file, FlockOperation::LockExclusive)?;
    println!("locked");
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}

fn extended_attributes() -> io::Result<String> {
    fs::write("attributed", "")?;
    rustix::fs::setxattr("attributed", "user.one", b"1", XattrFlags::empty())?;
    rustix::fs::setxattr("attributed", "user.two", b"22", XattrFlags::CREATE)?;
    let again = rustix::fs::setxattr("attributed", "user.two", b"", XattrFlags::CREATE).is_err();
    rustix::fs::removexattr("attributed", "user.one")?;
    let mut buffer = [0; 64];
    let length = rustix::fs::getxattr("attributed", "user.two", &mut buffer)?;
    let value = String::from_utf8_lossy(&buffer[..length]).into_owned();
    let gone = rustix::fs::getxattr("attributed", "user.one", &mut buffer).is_err();
    Ok(format!("{value}, twice refused {again}, removed {gone}"))
}

fn direct() -> io::Result<String> {
    // Aligned by asking for more than is needed.
    let mut space = vec![0_u8; 3 * PAGE];
    let offset = space.as_ptr().align_offset(PAGE);
    let page = &mut space[offset..offset + PAGE];
    page.fill(b'd');
    let flags = i32::try_from(OFlags::DIRECT.bits()).map_err(io::Error::other)?;
    let file =
        fs::OpenOptions::new().read(true).write(true).create(true).custom_flags(flags).open("direct")?;
    file.write_all_at(page, 0)?;
    page.fill(0);
    file.read_exact_at(page, 0)?;
    Ok(format!("came back {}", page.iter().all(|byte| *byte == b'd')))
}

fn shared_mapping() -> io::Result<String> {
    fs::write("mapped", vec![b'a'; PAGE])?;
    let file = fs::OpenOptions::new().read(true).write(true).open("mapped")?;
    // SAFETY: a new mapping at an address that the kernel chooses; nothing else of this program refers to it.
    let map = unsafe {
        mmap(ptr::null_mut(), PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
    };
    // SAFETY: the mapping is one writable page, and lives until `munmap` below.
    unsafe { map.cast::<u8>().write(b'b') };
    let seen = fs::read("mapped")?[0] as char;
    file.write_all_at(b"c", 1)?;
    // SAFETY: as above.
    let back = unsafe { map.cast::<u8>().add(1).read() } as char;
    // SAFETY: the page that was mapped above, unmapped once and not used afterwards.
    unsafe {
        msync(map, PAGE, MsyncFlags::SYNC)?;
        munmap(map, PAGE)?;
    }
    Ok(format!("wrote {seen}, read {back}"))
}

/// Exchanges the text at the beginning of a file that is one huge page.
pub fn map_huge(path: &str, text: &str) -> io::Result<()> {
    const HUGE_PAGE: usize = 2 << 20;
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(HUGE_PAGE as u64)?;
    // SAFETY: a new mapping at an address that the kernel chooses; nothing else of this program refers to it.
    let map = unsafe {
        mmap(ptr::null_mut(), HUGE_PAGE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
    };
    // SAFETY: the mapping is one writable huge page and lives until the end of the program.
    let page = unsafe { std::slice::from_raw_parts_mut(map.cast::<u8>(), HUGE_PAGE) };
    let end = page.iter().position(|byte| *byte == 0).unwrap_or(0);
    println!("{}", String::from_utf8_lossy(&page[..end]));
    page[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

fn locks() -> io::Result<String> {
    let file = fs::File::create("locked")?;
    flock(&file, FlockOperation::LockExclusive)?;
    fcntl_lock(&file, FlockOperation::LockExclusive)?;
    let other = || -> io::Result<String> {
        let output = Command::new(env::current_exe()?).args(["try-lock", "locked"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let held = other()?;
    drop(file);
    Ok(format!("held: {held}; free: {}", other()?))
}

fn watch() -> io::Result<String> {
    fs::create_dir("watched")?;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let kinds = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::CLOSE_WRITE
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::MOVED_TO;
    inotify::add_watch(&watch, "watched", kinds)?;
    fs::write("watched/a", "x")?;
    fs::rename("watched/a", "watched/b")?;
    fs::remove_file("watched/b")?;
    let mut buffer = [MaybeUninit::uninit(); PAGE];
    let mut reader = inotify::Reader::new(&watch, &mut buffer);
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let event = reader.next()?;
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        seen.push(format!("{:?} {name}", event.events()));
    }
    Ok(seen.join(", "))
}

fn holes() -> io::Result<String> {
    let file = fs::File::create("holes")?;
    file.write_all_at(b"end", 1 << 20)?;
    file.sync_all()?;
    let data = rustix::fs::seek(&file, SeekFrom::Data(0))?;
    let blocks = file.metadata()?.blocks();
    Ok(format!("data at {data}, sparse {}", blocks < 1000))
}

fn preallocation() -> io::Result<String> {
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open("allocated")?;
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 16)?;
    file.write_all_at(&[b'x'; 2 * PAGE], 0)?;
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, PAGE as u64)?;
    let mut start = [1; 1];
    file.read_exact_at(&mut start, 0)?;
    Ok(format!("{} bytes, {} after the hole was made", file.metadata()?.len(), start[0]))
}

fn renames() -> io::Result<String> {
    fs::write("one", "1")?;
    fs::write("two", "2")?;
    let here = rustix::fs::CWD;
    let kept = renameat_with(here, "one", here, "two", RenameFlags::NOREPLACE).is_err();
    renameat_with(here, "one", here, "two", RenameFlags::EXCHANGE)?;
    Ok(format!("not replaced {kept}, exchanged {}", fs::read_to_string("one")?))
}

fn synchronization() -> io::Result<String> {
    let mut file = fs::File::create("synced")?;
    file.write_all(b"x")?;
    file.sync_data()?;
    file.sync_all()?;
    fs::File::open(".")?.sync_all()?;
    Ok(format!("{} byte", Path::new("synced").metadata()?.len()))
}
