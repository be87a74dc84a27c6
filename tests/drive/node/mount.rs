//! File systems that tests mount on the node.

use std::{
    ffi::{CStr, CString},
    fs,
    path::Path,
};

use anyhow::Result;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};

/// A file system that a test has mounted on the node. Dropping it unmounts the file system.
pub struct TestMount(String);

impl TestMount {
    /// Takes over a file system that is mounted at `at` already.
    pub fn existing(at: &str) -> Self {
        Self(at.to_owned())
    }

    /// Mounts a tmpfs of a size such as `8m`.
    pub fn tmpfs(at: &str, size: &str) -> Result<Self> {
        let options = CString::new(format!("size={size}"))?;
        Self::new(at, "tmpfs", &options)
    }

    /// Mounts a file system of huge pages of 2 MiB, as kubelet does for an emptyDir. `owner` is a mount option such as
    /// `uid=1000`.
    pub fn huge_pages(at: &str, owner: &str) -> Result<Self> {
        let options = CString::new(format!("pagesize=2M,{owner}"))?;
        Self::new(at, "hugetlbfs", &options)
    }

    /// Mounts a directory once more.
    pub fn bind(source: &Path, at: &str) -> Result<Self> {
        fs::create_dir_all(at)?;
        mount_bind(source, at)?;
        Ok(Self(at.to_owned()))
    }

    fn new(at: &str, kind: &str, options: &CStr) -> Result<Self> {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), options)?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for TestMount {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0.as_str(), UnmountFlags::DETACH) {
            println!("cannot unmount {}: {error}", self.0);
        }
    }
}
