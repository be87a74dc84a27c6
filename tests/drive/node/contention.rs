//! Other work for the node's CPUs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use anyhow::{Context, Result};

/// A process that never rests. Dropping this ends it.
pub struct BusyProcess(Child);

impl BusyProcess {
    /// Starts it.
    pub fn start() -> Result<Self> {
        let busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn()?;
        Ok(Self(busy))
    }
}

impl Drop for BusyProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two cgroups that share the CPU, and a process in one of them that never rests. Dropping this ends it.
pub struct Contention {
    directory: PathBuf,
    busy: Option<BusyProcess>,
}

impl Contention {
    /// The parent of a pod's cgroup that gets little.
    pub const POOR: &str = "/busy-node/poor";

    /// Gives the busy process so many times as much of the CPU as what is in the other cgroup.
    pub fn new(times: u32) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let directory = root.join("busy-node");
        for name in ["poor", "rich"] {
            fs::create_dir_all(directory.join(name))?;
        }
        for above in [root, &directory] {
            fs::write(above.join("cgroup.subtree_control"), "+cpu").context("hand on the CPU controller")?;
        }
        fs::write(directory.join("poor/cpu.weight"), "1")?;
        fs::write(directory.join("rich/cpu.weight"), times.to_string())?;
        let busy = BusyProcess::start()?;
        fs::write(directory.join("rich/cgroup.procs"), busy.0.id().to_string())?;
        Ok(Self { directory, busy: Some(busy) })
    }
}

impl Drop for Contention {
    fn drop(&mut self) {
        // The process first: a cgroup that has one cannot be removed.
        self.busy = None;
        for name in ["poor", "rich", ""] {
            let _ = fs::remove_dir(self.directory.join(name));
        }
    }
}
