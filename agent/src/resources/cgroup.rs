//! A container's cgroup.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use oci_spec::runtime::{Linux, LinuxResources};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use super::{
    device_rules::{DeviceRules, DeviceRulesError},
    hierarchy::{ROOT, tasks_for_containers},
    tree,
};

/// How long processes may take to end after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long the processes of a cgroup may take to freeze. On a busy guest a second is enough.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// Why something could not be done to a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `linux.cgroupsPath` is missing, or names something other than a cgroup below the root.
    #[error("cgroupsPath {0:?} does not name a cgroup")]
    Path(PathBuf),
    /// A file of the cgroup could not be read or written.
    #[error("cgroup {path:?}: cannot {what}: {source}")]
    Io {
        /// The cgroup.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: io::Error,
    },
    /// The resource limits were refused.
    #[error("cgroup {path:?}: cannot set resource limits: {message}")]
    Limits {
        /// The cgroup.
        path: PathBuf,
        /// What the kernel or libcgroups objected to.
        message: String,
    },
    /// The device rules cannot be followed.
    #[error("cgroup {path:?}: {source}")]
    Devices {
        /// The cgroup.
        path: PathBuf,
        /// What is wrong with them.
        source: DeviceRulesError,
    },
    /// The thread that works on the cgroup has panicked.
    #[error("cgroup {0:?}: the work was not done")]
    Lost(PathBuf),
    /// Processes have survived SIGKILL, for example in an uninterruptible read.
    #[error("cgroup {0:?} still has processes {limit} s after they were killed", limit = KILL_LIMIT.as_secs())]
    Busy(PathBuf),
    /// Processes have not frozen.
    #[error(
        "cgroup {0:?}: its processes have not stopped within {limit} s, so they go on; one may wait for a file system",
        limit = FREEZE_LIMIT.as_secs()
    )]
    NotFrozen(PathBuf),
}

/// One cgroup, which [`Cgroup::create`] creates and [`Cgroup::remove`] removes.
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// The path that the OCI spec gives: absolute, and relative to [`ROOT`].
    path: PathBuf,
    directory: PathBuf,
}

impl Cgroup {
    /// Creates the cgroup that the OCI spec's `linux.cgroupsPath` names, with the spec's device rules. If any part of
    /// that fails, the cgroup does not exist afterwards.
    ///
    /// When the cgroup runs out of memory, all of its processes are killed: a container that has lost a random one of
    /// them is of no use. A container may start at most three quarters of the tasks that all containers may have, so
    /// that a process can still be executed in another one. The container's own limits override both defaults.
    pub fn create(linux: Option<&Linux>) -> Result<Self, CgroupError> {
        let cgroup = Self::existing(linux.and_then(|linux| linux.cgroups_path().as_deref()))?;
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        let rules = DeviceRules::new(rules)
            .map_err(|source| CgroupError::Devices { path: cgroup.path.clone(), source })?;
        cgroup.create_directory(&rules)?;
        Ok(cgroup)
    }

    /// Creates the cgroup's directory and sets it up. Removes the directory again if it cannot be set up.
    fn create_directory(&self, devices: &DeviceRules) -> Result<(), CgroupError> {
        fs::create_dir_all(&self.directory).map_err(self.error("create it"))?;
        self.set_up(devices).inspect_err(|_| {
            if let Err(error) = tree::remove(&self.directory) {
                tracing::warn!(cgroup = %self.directory.display(), %error, "cannot remove a cgroup");
            }
        })
    }

    /// Writes the defaults and the device rules, before any process runs in the cgroup.
    fn set_up(&self, devices: &DeviceRules) -> Result<(), CgroupError> {
        self.set_default("memory.oom.group", "1").map_err(self.error("set memory.oom.group"))?;
        if let Some(tasks) = tasks_for_containers() {
            let tasks = tasks.saturating_sub(tasks / 4).to_string();
            self.set_default("pids.max", &tasks).map_err(self.error("set pids.max"))?;
        }
        devices.apply(&self.directory).map_err(self.error("have its device rules followed"))
    }

    /// Writes a controller's file. A kernel without the controller has no such file, which is not an error.
    fn set_default(&self, file: &str, value: &str) -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(self.directory.join(file));
        match file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes())) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES | libc::EPERM)) => {
                Ok(())
            }
            result => result,
        }
    }

    /// The cgroup of that name, whose directory need not exist yet.
    pub fn existing(path: Option<&Path>) -> Result<Self, CgroupError> {
        let path = path.unwrap_or(Path::new(""));
        let mut directory = PathBuf::from(ROOT);
        let mut depth = 0;
        for component in path.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => {
                    directory.push(name);
                    depth += 1;
                }
                _ => return Err(CgroupError::Path(path.to_owned())),
            }
        }
        if depth == 0 {
            return Err(CgroupError::Path(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), directory })
    }

    /// The configuration by which libcontainer finds this cgroup.
    pub fn config(&self, container_id: &str) -> CgroupConfig {
        CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: false,
            container_name: container_id.to_owned(),
        }
    }

    /// The cgroup's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Changes resource limits. Limits that `resources` does not name stay as they are.
    ///
    /// Device rules in `resources` are ignored, as runc ignores them: containerd repeats them with every update.
    ///
    /// This runs on a thread of its own, because the kernel reclaims memory and kills processes before it accepts a
    /// lower limit.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let (cgroup, resources) = (self.clone(), resources.clone());
        let updating = tokio::task::spawn_blocking(move || cgroup.update_blocking(&resources));
        updating.await.unwrap_or_else(|_| Err(CgroupError::Lost(self.path.clone())))
    }

    fn update_blocking(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let limits = |error: &dyn std::fmt::Display| CgroupError::Limits {
            path: self.path.clone(),
            message: error.to_string(),
        };
        let manager: AnyCgroupManager =
            create_cgroup_manager(self.config("")).map_err(|error| limits(&error))?;
        manager
            .apply(&ControllerOpt {
                resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            })
            .map_err(|error| limits(&error))
    }

    /// The pids, in the guest, of every process in the cgroup and in those below it. A cgroup that has been removed has
    /// none.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        match tree::pids(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            collected => collected.map_err(self.error("list its processes")),
        }
    }

    /// Sends SIGKILL to every process in the cgroup.
    pub fn kill(&self) -> Result<(), CgroupError> {
        fs::write(self.directory.join("cgroup.kill"), "1").map_err(self.error("kill its processes"))
    }

    /// Freezes every process in the cgroup, and waits until all are frozen. A process in an uninterruptible system call
    /// does not freeze (kernel: `kernel/cgroup/freezer.c`); in that case all of them are thawed again.
    pub async fn freeze(&self) -> Result<(), CgroupError> {
        let frozen = match self.set_frozen(true) {
            Ok(()) => timeout(FREEZE_LIMIT, self.wait_for_event("frozen 1")).await,
            Err(error) => Ok(Err(error)),
        };
        let error = match frozen {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => self.error("freeze its processes")(error),
            Err(_) => CgroupError::NotFrozen(self.path.clone()),
        };
        if let Err(error) = self.set_frozen(false) {
            tracing::warn!(cgroup = %self.path.display(), %error, "a cgroup that could not be frozen cannot be thawed");
        }
        Err(error)
    }

    /// Thaws every process in the cgroup, and waits until all are thawed.
    pub async fn thaw(&self) -> Result<(), CgroupError> {
        let thawed = async {
            self.set_frozen(false)?;
            self.wait_for_event("frozen 0").await
        };
        thawed.await.map_err(self.error("thaw its processes"))
    }

    fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Kills the processes that are left in the cgroup, and removes it. Succeeds if the cgroup does not exist.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.directory.exists() {
            return Ok(());
        }
        // A process needs CPU time in order to end. A low limit of the container's must not delay that.
        let _ = fs::write(self.directory.join("cpu.max"), "max");
        let _ = fs::write(self.directory.join("cpu.weight"), "100");
        self.kill()?;
        match timeout(KILL_LIMIT, self.wait_for_event("populated 0")).await {
            Ok(waited) => waited.map_err(self.error("wait for its processes"))?,
            Err(_) => return Err(CgroupError::Busy(self.path.clone())),
        }
        // On another thread: a container may have created many cgroups below its own.
        let directory = self.directory.clone();
        match tokio::task::spawn_blocking(move || tree::remove(&directory)).await {
            Ok(removed) => removed.map_err(self.error("remove it")),
            Err(_) => Err(CgroupError::Lost(self.path.clone())),
        }
    }

    /// Waits until `cgroup.events` contains the line. The kernel reports each change of that file by POLLPRI.
    async fn wait_for_event(&self, line: &str) -> io::Result<()> {
        let file = fs::File::open(self.directory.join("cgroup.events"))?;
        let has_line = |mut file: &fs::File| -> io::Result<bool> {
            let mut content = String::new();
            io::Seek::rewind(&mut file)?;
            io::Read::read_to_string(&mut file, &mut content)?;
            Ok(content.lines().any(|present| present == line))
        };
        if has_line(&file)? {
            return Ok(());
        }
        // SAFETY: a `File` keeps its descriptor open, and the same, until it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
        while !has_line(events.get_ref())? {
            events.ready(Interest::PRIORITY).await?.clear_ready();
        }
        Ok(())
    }

    fn error(&self, what: &'static str) -> impl FnOnce(io::Error) -> CgroupError + use<> {
        let path = self.path.clone();
        move |source| CgroupError::Io { path, what, source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_that_cannot_have_its_device_rules_is_not_left_behind() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("c1");
        let cgroup = Cgroup { path: "/c1".into(), directory: directory.clone() };
        // No program can be attached to it, as it is an ordinary directory.
        let error = cgroup.create_directory(&DeviceRules::default()).unwrap_err();
        assert!(error.to_string().contains("have its device rules followed"), "{error}");
        assert!(!directory.exists());
    }

    #[test]
    fn a_cgroup_path_stays_below_the_root() {
        let cgroup = Cgroup::existing(Some(Path::new("/pod/abc"))).unwrap();
        assert_eq!(cgroup.directory(), Path::new("/sys/fs/cgroup/pod/abc"));
        for path in ["", "/", "/pod/../..", "../x", "."] {
            let error = Cgroup::existing(Some(Path::new(path))).unwrap_err();
            assert!(matches!(error, CgroupError::Path(_)), "{path}: {error}");
        }
        assert!(Cgroup::existing(None).is_err());
    }
}
