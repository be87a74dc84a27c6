//! An emptyDir in memory, as kubelet prepares it on the node.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};

use super::mount::TestMount;

/// An emptyDir whose medium is memory. Dropping it unmounts it.
pub struct MemoryEmptyDir {
    /// Unmounted before the volume that they are in.
    sub_paths: Vec<TestMount>,
    _volume: TestMount,
    pod_directory: PathBuf,
    name: String,
}

impl MemoryEmptyDir {
    /// Mounts the volume of a pod. `kubelet` is kubelet's root directory, and `size` is a size such as `8m`.
    pub fn new(kubelet: &str, pod_uid: &str, name: &str, size: &str) -> Result<Self> {
        let pod_directory = PathBuf::from(kubelet).join("pods").join(pod_uid);
        let path = volume_path(&pod_directory, name);
        let path = path.to_str().context("a path that is not UTF-8")?;
        let volume = TestMount::tmpfs(path, size)?;
        Ok(Self { sub_paths: Vec::new(), _volume: volume, pod_directory, name: name.to_owned() })
    }

    /// The volume's path on the node, which kubelet gives for a mount without a `subPath`.
    pub fn path(&self) -> String {
        volume_path(&self.pod_directory, &self.name).display().to_string()
    }

    /// Makes a directory in the volume with the volume's mode, mounts it as kubelet does for a `subPath`, and returns
    /// the path on the node that kubelet gives then. `container` and `number` are the container's name and the number
    /// of its mount.
    pub fn sub_path(&mut self, container: &str, number: usize, path: &str) -> Result<String> {
        let root = PathBuf::from(self.path());
        let source = root.join(path);
        if !source.exists() {
            fs::create_dir_all(&source)?;
            fs::set_permissions(&source, fs::metadata(&root)?.permissions())?;
        }
        let target = self.pod_directory.join("volume-subpaths").join(&self.name).join(container);
        let target = target.join(number.to_string()).display().to_string();
        self.sub_paths.push(TestMount::bind(&source, &target)?);
        Ok(target)
    }
}

fn volume_path(pod_directory: &std::path::Path, name: &str) -> PathBuf {
    pod_directory.join("volumes/kubernetes.io~empty-dir").join(name)
}
