//! One container, from its creation to its deletion.

use std::{
    collections::HashMap,
    fs,
    future::pending,
    io::{self, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use pericarp_protos::id::{ContainerId, ExecId};
use tokio::sync::Semaphore;

use super::{
    Attachments, ContainerError,
    exec::{Exec, STARTING_MAX, launch_with_stdio, prepare_stdio},
    namespaces,
    pause::{PauseControl, PauseError},
    process::{Process, ProcessState},
};
use crate::{
    launch::{Action, LaunchError, Reaper, Request, START_SOCKET},
    resources::{Cgroup, CgroupError},
    stdio::{Streams, Urls},
};

/// Where each container has a directory for its sockets, in the guest's memory.
pub const DIRECTORIES: &str = "/run/pericarp/containers";

/// One container, from `Create` to `Delete`.
pub struct Container {
    /// containerd's id.
    pub id: ContainerId,
    /// The bundle directory on the host, which containerd asks for.
    pub bundle: String,
    /// The container's cgroup.
    pub cgroup: Cgroup,
    /// The first process.
    pub init: Arc<Process>,
    pub(super) pause_control: PauseControl,
    pub(super) spec: Spec,
    pub(super) directory: SocketDirectory,
    /// The number that the next exec gets.
    pub(super) next_exec: AtomicU64,
    /// Places for execs that are being started.
    pub(super) starting: Semaphore,
    attachments: tokio::sync::Mutex<Option<Attachments>>,
    execs: Mutex<HashMap<ExecId, Exec>>,
    is_being_deleted: AtomicBool,
}

/// What a new container gets.
pub struct ContainerConfig<'a> {
    /// containerd's id.
    pub id: &'a ContainerId,
    /// The bundle directory on the host.
    pub bundle: &'a str,
    /// The spec for this guest.
    pub spec: Spec,
    /// Where the streams of the first process go.
    pub urls: Urls,
    /// What the container uses of the pod.
    pub attachments: Attachments,
}

impl Container {
    /// Creates a container whose first process waits for [`Self::start`]. If that fails, its attachments are detached.
    pub async fn create(
        reaper: &Reaper,
        streams: &Arc<Streams>,
        config: ContainerConfig<'_>,
    ) -> Result<Self, ContainerError> {
        let ContainerConfig { id, bundle, mut spec, urls, attachments } = config;
        let created = create_init(reaper, streams, id, &mut spec, urls).await;
        let (directory, cgroup, init) = match created {
            Ok(created) => created,
            Err(error) => {
                attachments.detach().await;
                return Err(error);
            }
        };
        Ok(Self {
            id: id.clone(),
            bundle: bundle.to_owned(),
            cgroup,
            init,
            pause_control: PauseControl::default(),
            spec,
            directory,
            next_exec: AtomicU64::new(0),
            starting: Semaphore::new(STARTING_MAX),
            attachments: tokio::sync::Mutex::new(Some(attachments)),
            execs: Mutex::default(),
            is_being_deleted: AtomicBool::new(false),
        })
    }

    /// Changes the container's limits. Limits that `resources` does not name stay as they are.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        if let Some(attachments) = self.attachments.lock().await.as_ref() {
            let updated = attachments.update(resources).await;
            updated.map_err(|source| ContainerError::HugePages { id: self.id.to_string(), source })?;
        }
        self.cgroup.update(resources).await.map_err(|source| self.cgroup_error(source))
    }

    /// Lets the first process execute its program, and returns its pid.
    pub fn start(&self) -> Result<i32, ContainerError> {
        let ProcessState::Created { pid } = self.init.state() else {
            return Err(self.state_error("it has been started before, or has ended"));
        };
        let socket = self.directory.path().join(START_SOCKET);
        UnixStream::connect(&socket)
            .and_then(|mut socket| socket.write_all(b"start container"))
            .map_err(|source| ContainerError::Start { id: self.id.to_string(), source })?;
        self.init.set_state(ProcessState::Running { pid });
        Ok(pid)
    }

    /// Whether the end of the first process ends all others, because it is the first of a PID namespace.
    pub fn has_private_pid_namespace(&self) -> bool {
        let namespace = namespaces::of_type(&self.spec, LinuxNamespaceType::Pid);
        namespace.is_some_and(|namespace| namespace.path().is_none())
    }

    /// Whether all processes of the container are frozen.
    pub fn is_paused(&self) -> bool {
        self.pause_control.is_paused()
    }

    /// Freezes all processes of the container, or none.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        if !matches!(self.init.state(), ProcessState::Running { .. }) {
            return Err(self.state_error("only a running container can be paused"));
        }
        self.pause_control.pause(&self.cgroup).await.map_err(|error| self.pause_error(error))
    }

    /// Thaws all processes of the container.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        self.pause_control.resume(&self.cgroup).await.map_err(|error| self.pause_error(error))
    }

    /// Removes the container's cgroup, processes and attachments. Only one caller at a time does; the others get an
    /// error.
    pub async fn delete(&self) -> Result<(), ContainerError> {
        match self.init.state() {
            ProcessState::Stopped { .. } | ProcessState::Created { .. } => {}
            _ => return Err(self.state_error("cannot delete a running container")),
        }
        if self.is_being_deleted.swap(true, Ordering::Relaxed) {
            return Err(self.state_error("it is being deleted"));
        }
        if let Err(source) = self.cgroup.remove().await {
            self.is_being_deleted.store(false, Ordering::Relaxed);
            return Err(self.cgroup_error(source));
        }
        self.init.wait().await;
        self.init.stdio().take();
        self.execs().clear();
        if let Some(attachments) = self.attachments.lock().await.take() {
            attachments.detach().await;
        }
        Ok(())
    }

    /// An error about this container's state.
    pub fn state_error(&self, problem: &'static str) -> ContainerError {
        ContainerError::State { subject: format!("container {}", self.id), problem }
    }

    /// An error of this container's cgroup.
    pub fn cgroup_error(&self, source: CgroupError) -> ContainerError {
        ContainerError::Cgroup { id: self.id.to_string(), source }
    }

    fn pause_error(&self, error: PauseError) -> ContainerError {
        match error {
            PauseError::State(problem) => self.state_error(problem),
            PauseError::Cgroup(source) => self.cgroup_error(source),
        }
    }

    pub(super) fn execs(&self) -> MutexGuard<'_, HashMap<ExecId, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Creates the directory, the cgroup and the first process of a container.
async fn create_init(
    reaper: &Reaper,
    streams: &Arc<Streams>,
    id: &ContainerId,
    spec: &mut Spec,
    urls: Urls,
) -> Result<(SocketDirectory, Cgroup, Arc<Process>), ContainerError> {
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(urls.terminal));
    }
    let stdio = prepare_stdio(streams, &format!("container {id}"), &urls)?;
    let directory = SocketDirectory::new().map_err(|source| ContainerError::System {
        subject: format!("container {id}"),
        what: "create its directory",
        source,
    })?;
    let cgroup = Cgroup::create(spec.linux().as_ref())
        .map_err(|source| ContainerError::Cgroup { id: id.to_string(), source })?;
    let cpu_limits = remove_cpu_limits(spec);
    let launched = async {
        namespaces::ensure_shared_pid_namespace(reaper, spec).await?;
        let request = Request {
            id: id.to_string(),
            directory: directory.path().to_owned(),
            action: Action::Create(Box::new(spec.clone())),
        };
        let launched = launch_with_stdio(reaper, &request, stdio, urls.terminal, pending()).await?;
        if let Some(limits) = cpu_limits {
            cgroup.update(&limits).await.map_err(|error| LaunchError::Container(error.to_string()))?;
        }
        Ok(launched)
    };
    match launched.await {
        Ok((pid, stdio)) => {
            let init = Process::new(id.as_str(), "", urls, ProcessState::Created { pid });
            init.set_stdio(stdio);
            Ok((directory, cgroup, init))
        }
        Err(source) => {
            if let Err(error) = cgroup.remove().await {
                tracing::warn!(%error, "cannot remove the cgroup of a container that was not created");
            }
            Err(ContainerError::Create { id: id.to_string(), source })
        }
    }
}

/// Removes the CPU limits from a spec and returns them. They apply to the container's program. A small share of a busy
/// guest's CPU would delay the creation of the first process by minutes.
fn remove_cpu_limits(spec: &mut Spec) -> Option<LinuxResources> {
    let resources = spec.linux_mut().as_mut()?.resources_mut().as_mut()?;
    let cpu = resources.cpu().clone()?;
    resources.set_cpu(None);
    let mut limits = LinuxResources::default();
    limits.set_devices(None).set_cpu(Some(cpu));
    Some(limits)
}

/// A directory for a container's sockets, which is removed when this is dropped. Its name is short, because a socket's
/// path has a limit.
pub struct SocketDirectory(PathBuf);

impl SocketDirectory {
    fn new() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("{DIRECTORIES}/{number}"));
        fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(directory = %self.0.display(), %error, "cannot remove a container's directory");
        }
    }
}
