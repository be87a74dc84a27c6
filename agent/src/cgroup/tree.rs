//! The cgroups that a container has made below its own: as many, and as deep, as it could. A path to one may be longer than any
//! that the kernel takes, and a function that calls itself for each level would run out of stack.

use std::{
    ffi::CString,
    io::{self, Read},
    path::Path,
};

use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, unlinkat},
    io::Errno,
};

/// Every process in the cgroup and in those below it.
pub fn pids(directory: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    let top = open(CWD, directory)?;
    below(&top, |cgroup, _| pids_of(cgroup, &mut pids))?;
    pids_of(&top, &mut pids)?;
    Ok(pids)
}

/// Removes the cgroup and those below it.
pub fn remove(directory: &Path) -> io::Result<()> {
    below(&open(CWD, directory)?, |cgroup, name| {
        let parent = open(cgroup, c"..")?;
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    })?;
    std::fs::remove_dir(directory)
}

/// One on the way from the top to where we are.
struct Level {
    name: CString,
    /// Those directly below it in which we have not been.
    rest: Vec<CString>,
}

/// Does something with every cgroup below `top`, after those below it: with the cgroup itself, and its name.
fn below(top: &OwnedFd, mut visit: impl FnMut(&OwnedFd, &CString) -> io::Result<()>) -> io::Result<()> {
    let mut here = open(top, c".")?;
    let mut rest = children(&here)?;
    let mut way: Vec<Level> = Vec::new();
    loop {
        if let Some(name) = rest.pop() {
            // One that has gone meanwhile has nothing in it.
            if let Some(child) = if_present(open(&here, name.as_c_str()))? {
                let inside = if_present(children(&child))?.unwrap_or_default();
                way.push(Level { name, rest: std::mem::replace(&mut rest, inside) });
                here = child;
            }
        } else if let Some(level) = way.pop() {
            let parent = open(&here, c"..")?;
            visit(&here, &level.name)?;
            (here, rest) = (parent, level.rest);
        } else {
            return Ok(());
        }
    }
}

fn open(directory: impl AsFd, path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(directory, path, flags, Mode::empty())?)
}

fn children(cgroup: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(cgroup)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn pids_of(cgroup: &OwnedFd, pids: &mut Vec<u32>) -> io::Result<()> {
    let file = openat(cgroup, c"cgroup.procs", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut listed = String::new();
    let read =
        file.map_err(io::Error::from).and_then(|file| std::fs::File::from(file).read_to_string(&mut listed));
    match read {
        // The processes of threads that are in a cgroup of their own are in one above it.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        read => if_present(read)?,
    };
    pids.extend(listed.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    Ok(())
}

/// Nothing, if the cgroup does not exist any more.
fn if_present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::mkdirat;

    use super::*;

    /// Directories do for cgroups here.
    fn deep(top: &Path, depth: usize) {
        let mut here = open(CWD, top).unwrap();
        for _ in 0..depth {
            mkdirat(&here, "child", Mode::RWXU).unwrap();
            mkdirat(&here, "sibling", Mode::RWXU).unwrap();
            here = open(&here, "child").unwrap();
        }
    }

    #[test]
    fn a_tree_is_removed_that_is_deeper_than_a_path_can_be_long() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        std::fs::create_dir(&top).unwrap();
        deep(&top, 1500);
        remove(&top).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn processes_are_found_at_every_level() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path();
        std::fs::create_dir_all(top.join("a/b")).unwrap();
        std::fs::create_dir_all(top.join("c")).unwrap();
        for (file, pids) in [("cgroup.procs", "1\n2\n"), ("a/b/cgroup.procs", "3\n"), ("c/cgroup.procs", "")]
        {
            std::fs::write(top.join(file), pids).unwrap();
        }
        // `a` has no such file: it has gone.
        let mut found = pids(top).unwrap();
        found.sort_unstable();
        assert_eq!(found, [1, 2, 3]);
        assert_eq!(pids(&top.join("no-such")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
