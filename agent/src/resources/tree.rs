//! The cgroups that a container has created below its own.
//!
//! A container can nest them so deeply that a path to one of them is longer than the kernel accepts, and that a
//! recursive function would run out of stack. So they are walked by descriptors, with a stack on the heap.

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
    visit_descendants(&top, |cgroup, _| pids_of(cgroup, &mut pids))?;
    pids_of(&top, &mut pids)?;
    Ok(pids)
}

/// Removes the cgroup and those below it.
pub fn remove(directory: &Path) -> io::Result<()> {
    visit_descendants(&open(CWD, directory)?, |cgroup, name| {
        let parent = open(cgroup, c"..")?;
        match unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    })?;
    std::fs::remove_dir(directory)
}

/// A cgroup on the path from the top to the one that is being visited.
struct Ancestor {
    name: CString,
    /// Siblings of it that have not been visited yet.
    unvisited_siblings: Vec<CString>,
}

/// Calls `visit` with every cgroup below `top` and its name, children before their parents.
fn visit_descendants(
    top: &OwnedFd,
    mut visit: impl FnMut(&OwnedFd, &CString) -> io::Result<()>,
) -> io::Result<()> {
    let mut current = open(top, c".")?;
    let mut unvisited = children(&current)?;
    let mut path: Vec<Ancestor> = Vec::new();
    loop {
        if let Some(name) = unvisited.pop() {
            // A cgroup that has been removed in the meantime is skipped.
            if let Some(child) = if_present(open(&current, name.as_c_str()))? {
                let inside = if_present(children(&child))?.unwrap_or_default();
                path.push(Ancestor { name, unvisited_siblings: std::mem::replace(&mut unvisited, inside) });
                current = child;
            }
        } else if let Some(ancestor) = path.pop() {
            let parent = open(&current, c"..")?;
            visit(&current, &ancestor.name)?;
            (current, unvisited) = (parent, ancestor.unvisited_siblings);
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
        // A threaded cgroup lists no processes; they are listed in the cgroup of their thread group, above it.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        read => if_present(read)?,
    };
    pids.extend(listed.lines().filter_map(|pid| pid.parse::<u32>().ok()));
    Ok(())
}

/// `None` if the result is that of a cgroup that does not exist any more.
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

    /// Creates nested directories, which stand for cgroups here.
    fn create_nested(top: &Path, depth: usize) {
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
        create_nested(&top, 1500);
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
        // `a` has no such file, like a cgroup that has just been removed.
        let mut found = pids(top).unwrap();
        found.sort_unstable();
        assert_eq!(found, [1, 2, 3]);
        assert_eq!(pids(&top.join("no-such")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
