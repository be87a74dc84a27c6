//! The files of a pod, all in its directory.

use std::path::{Path, PathBuf};

use pericarp_protos::{guest, id::SandboxId};

use crate::host::machine::file;

/// A pod's directory, `<run_dir>/<id>`.
#[derive(Clone, Debug)]
pub struct PodFiles {
    directory: PathBuf,
}

impl PodFiles {
    pub fn new(run_dir: &Path, id: &SandboxId) -> Self {
        Self { directory: run_dir.join(id) }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Who uses which volume.
    pub fn volume_users(&self) -> PathBuf {
        self.directory.join(file::VOLUMES)
    }

    /// The machine's control socket.
    pub fn control(&self) -> PathBuf {
        self.directory.join(file::CONTROL)
    }

    /// Where the machine takes descriptors.
    pub fn descriptors(&self) -> PathBuf {
        self.directory.join(file::DESCRIPTORS)
    }

    /// The machine's vsock socket.
    pub fn vsock(&self) -> PathBuf {
        self.directory.join(file::VSOCK)
    }

    /// Where a guest of an older version could connect to the host. Newer ones have one connection, without a name.
    pub fn older_host_service(&self) -> PathBuf {
        self.directory.join(format!("{}_{}", file::VSOCK, guest::HOST_PORT))
    }

    /// What the guest has printed.
    pub fn console(&self) -> PathBuf {
        self.directory.join(file::CONSOLE)
    }

    /// What the machine has to say.
    pub fn log(&self) -> PathBuf {
        self.directory.join(file::LOG)
    }

    /// Which disks are whose; one file for each container.
    pub fn disk_records(&self) -> PathBuf {
        self.directory.join("disks")
    }

    /// The address on which containerd reaches the tasks.
    pub fn task_address(&self) -> String {
        format!("ttrpc+hvsock://{}:{}", self.vsock().display(), guest::AGENT_PORT)
    }
}
