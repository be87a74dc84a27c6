//! A container's cgroup (cgroup v2; kernel: `Documentation/admin-guide/cgroup-v2.rst`).

mod devices;
mod oom;
mod stats;
mod tree;

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

pub use devices::{DeviceRules, DeviceRulesError};
pub use oom::OomWatcher;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// How long processes that were sent SIGKILL may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How long the processes of a cgroup may take to stop. A second does on a busy guest.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// What the containers together leave to the agent and its helpers, so that a fork bomb, or one that takes all memory,
/// does not keep it from ending them.
const RESERVED_TASKS: u64 = 256;
const RESERVED_MEMORY: u64 = 16 << 20;

/// Something that cannot be done to a cgroup.
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
    /// The thread that does the work has failed.
    #[error("cgroup {0:?}: the work was not done")]
    Lost(PathBuf),
    /// Processes survive SIGKILL, for example in an uninterruptible read.
    #[error("cgroup {0:?} still has processes {limit} s after they were killed", limit = KILL_LIMIT.as_secs())]
    Busy(PathBuf),
    /// Processes do not stop.
    #[error(
        "cgroup {0:?}: its processes have not stopped within {limit} s, so they go on; one may wait for a file system",
        limit = FREEZE_LIMIT.as_secs()
    )]
    NotFrozen(PathBuf),
}

/// Makes the cgroup `name` (a path below the root of the hierarchy) able to hold containers' cgroups with
/// every controller that the kernel has.
pub fn delegate(name: &str) -> io::Result<()> {
    let root = Path::new(ROOT);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let enable: Vec<_> = controllers.split_whitespace().map(|controller| format!("+{controller}")).collect();
    let enable = enable.join(" ");
    let parent = root.join(name.trim_start_matches('/'));
    fs::create_dir_all(&parent)?;
    for cgroup in [root, &parent] {
        fs::write(cgroup.join("cgroup.subtree_control"), &enable)?;
    }
    leave_room_for_agent(name)
}

/// Limits what all containers may have together, by what the guest has now: its memory may have changed. This may take long,
/// as the kernel makes room before it takes a lower limit.
pub fn leave_room_for_agent(parent: &str) -> io::Result<()> {
    let parent = Path::new(ROOT).join(parent.trim_start_matches('/'));
    // A kernel without one of these controllers has no such file, and nothing can be done about that.
    let limits = [("pids.max", tasks_for_containers()), ("memory.max", memory_for_containers())];
    for (file, limit) in limits {
        if let Some(limit) = limit.filter(|_| parent.join(file).exists()) {
            fs::write(parent.join(file), limit.to_string())?;
        }
    }
    Ok(())
}

/// How many tasks all containers may have together.
fn tasks_for_containers() -> Option<u64> {
    let limit = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?.trim().parse().ok();
    let all: u64 = limit("threads-max")?;
    let pids: u64 = limit("pid_max")?;
    Some(all.min(pids).saturating_sub(RESERVED_TASKS).max(RESERVED_TASKS))
}

/// How much memory all containers may have together, in bytes. Huge pages that are set aside are not counted as memory.
fn memory_for_containers() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |name: &str| {
        let kilobytes =
            meminfo.lines().find_map(|line| line.strip_prefix(name))?.trim().strip_suffix(" kB")?;
        Some(kilobytes.parse::<u64>().ok()? << 10)
    };
    let all = bytes("MemTotal:")?.saturating_sub(bytes("Hugetlb:").unwrap_or(0));
    // Of a very small guest most is left to the containers all the same.
    Some(all - RESERVED_MEMORY.min(all / 8))
}

/// One cgroup, made by [`Cgroup::create`] and removed by [`Cgroup::remove`].
#[derive(Debug, Clone)]
pub struct Cgroup {
    /// As the OCI spec has it: absolute, below [`ROOT`].
    path: PathBuf,
    directory: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup that the OCI spec's `linux.cgroupsPath` names, with the spec's rules for devices. Without them, or anything
    /// else that it is to have, there is no cgroup.
    ///
    /// When memory runs out in it, all of its processes are killed: a container that lost one of
    /// them at random is of no use. And however many processes it starts, as many are left to others as make it
    /// possible to look into them. A container's own limits may say something else.
    pub fn create(linux: Option<&Linux>) -> Result<Self, CgroupError> {
        let cgroup = Self::existing(linux.and_then(|linux| linux.cgroups_path().as_deref()))?;
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        let rules = DeviceRules::new(rules)
            .map_err(|source| CgroupError::Devices { path: cgroup.path.clone(), source })?;
        cgroup.make(&rules)?;
        Ok(cgroup)
    }

    /// Makes it whole, or not at all.
    fn make(&self, devices: &DeviceRules) -> Result<(), CgroupError> {
        fs::create_dir_all(&self.directory).map_err(self.error("create it"))?;
        self.set_up(devices).inspect_err(|_| {
            if let Err(error) = tree::remove(&self.directory) {
                tracing::warn!(cgroup = %self.directory.display(), %error, "a cgroup stays behind");
            }
        })
    }

    /// What a container has before anything runs in it.
    fn set_up(&self, devices: &DeviceRules) -> Result<(), CgroupError> {
        self.set_default("memory.oom.group", "1").map_err(self.error("set memory.oom.group"))?;
        if let Some(tasks) = tasks_for_containers() {
            let tasks = tasks.saturating_sub(tasks / 4).to_string();
            self.set_default("pids.max", &tasks).map_err(self.error("set pids.max"))?;
        }
        devices.apply(&self.directory).map_err(self.error("have its device rules followed"))
    }

    /// Writes a file of a controller, which the kernel may not have.
    fn set_default(&self, file: &str, value: &str) -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).open(self.directory.join(file));
        match file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes())) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES | libc::EPERM)) => {
                Ok(())
            }
            result => result,
        }
    }

    /// The cgroup of that name, which somebody else has made.
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

    /// The configuration with which libcontainer finds this cgroup.
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

    /// Changes resource limits; limits that `resources` does not name stay. So do the rules for devices, which cannot be changed,
    /// as with runc: containerd repeats those that it knows with every update.
    ///
    /// Elsewhere, because the kernel makes room before it takes a lower limit, by writing memory out and killing processes.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let (cgroup, resources) = (self.clone(), resources.clone());
        let updating = tokio::task::spawn_blocking(move || cgroup.update_now(&resources));
        updating.await.unwrap_or_else(|_| Err(CgroupError::Lost(self.path.clone())))
    }

    fn update_now(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
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

    /// Every process in the cgroup and in those below it, as the guest numbers them. In one that has been removed there
    /// is none.
    pub fn pids(&self) -> Result<Vec<u32>, CgroupError> {
        match tree::pids(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            collected => collected.map_err(self.error("list its processes")),
        }
    }

    /// Sends SIGKILL to every process in it.
    pub fn kill(&self) -> Result<(), CgroupError> {
        fs::write(self.directory.join("cgroup.kill"), "1").map_err(self.error("kill its processes"))
    }

    /// Stops every process in it, and waits until all have stopped. One that is inside a system call which nothing but its
    /// answer ends does not (kernel: `kernel/cgroup/freezer.c`); then all of them go on.
    pub async fn freeze(&self) -> Result<(), CgroupError> {
        let frozen = match self.set_frozen(true) {
            Ok(()) => timeout(FREEZE_LIMIT, self.wait_for("frozen 1")).await,
            Err(error) => Ok(Err(error)),
        };
        let error = match frozen {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => self.error("stop its processes")(error),
            Err(_) => CgroupError::NotFrozen(self.path.clone()),
        };
        if let Err(error) = self.set_frozen(false) {
            tracing::warn!(cgroup = %self.path.display(), %error, "a cgroup that was not to be stopped may stay so");
        }
        Err(error)
    }

    /// Lets every process in it go on, and waits until that has happened.
    pub async fn thaw(&self) -> Result<(), CgroupError> {
        let thawed = async {
            self.set_frozen(false)?;
            self.wait_for("frozen 0").await
        };
        thawed.await.map_err(self.error("let its processes go on"))
    }

    fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Kills what is left in the cgroup and removes it. A cgroup that is already gone is no error.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        if !self.directory.exists() {
            return Ok(());
        }
        // Also the end of a process needs the CPU: it is not to wait for a small share.
        let _ = fs::write(self.directory.join("cpu.max"), "max");
        let _ = fs::write(self.directory.join("cpu.weight"), "100");
        self.kill()?;
        match timeout(KILL_LIMIT, self.wait_for("populated 0")).await {
            Ok(waited) => waited.map_err(self.error("wait for its processes"))?,
            Err(_) => return Err(CgroupError::Busy(self.path.clone())),
        }
        // Elsewhere: a container may have made many below it.
        let directory = self.directory.clone();
        match tokio::task::spawn_blocking(move || tree::remove(&directory)).await {
            Ok(removed) => removed.map_err(self.error("remove it")),
            Err(_) => Err(CgroupError::Lost(self.path.clone())),
        }
    }

    /// Waits until `cgroup.events` has the line; the kernel announces each change (POLLPRI).
    async fn wait_for(&self, line: &str) -> io::Result<()> {
        let file = fs::File::open(self.directory.join("cgroup.events"))?;
        let holds = |mut file: &fs::File| -> io::Result<bool> {
            let mut content = String::new();
            io::Seek::rewind(&mut file)?;
            io::Read::read_to_string(&mut file, &mut content)?;
            Ok(content.lines().any(|present| present == line))
        };
        if holds(&file)? {
            return Ok(());
        }
        // SAFETY: a `File` keeps its descriptor open, and the same, until it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
        while !holds(events.get_ref())? {
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
        let error = cgroup.make(&DeviceRules::default()).unwrap_err();
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
