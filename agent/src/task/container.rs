//! One container.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, LinuxResources, Process as ProcessSpec, Spec};
use pericarp_protos::{
    guest::PID_NAMESPACE,
    id::{ContainerId, ExecId},
};

use super::{
    Exits, TaskError,
    pause::{PauseError, Pausing},
    process::{Process, State, receive_console},
};
use crate::{
    cgroup::Cgroup,
    devices::Attached,
    huge_pages::Reserved,
    runtime::{self, Action, Descriptors, Request, RuntimeError, namespaces},
    stdio::{self, Prepared, Stdio, Streams, Urls},
    volumes::Held,
};

/// Where each container has a directory for its sockets, in the guest's memory.
const DIRECTORIES: &str = "/run/pericarp/containers";

/// How long the end of a container waits for the ends of its execs, all of which have been killed.
const EXECS_LIMIT: std::time::Duration = std::time::Duration::from_secs(10);

/// One container, from `Create` to `Delete`.
pub struct Container {
    /// containerd's id.
    pub id: ContainerId,
    /// The bundle directory on the host: containerd asks for it again.
    pub bundle: String,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its first process.
    pub init: Arc<Process>,
    /// Whether its processes are stopped.
    pub pausing: Pausing,
    /// Its disks.
    pub disks: OnceLock<Attached>,
    volumes: Mutex<Option<Held>>,
    /// What it may use of the guest's huge pages, until it is deleted.
    huge_pages: tokio::sync::Mutex<Option<Reserved>>,
    spec: Spec,
    directory: Directory,
    execs: Mutex<HashMap<ExecId, Exec>>,
    serial: AtomicU64,
    deleting: AtomicBool,
}

struct Exec {
    process: Arc<Process>,
    spec: ProcessSpec,
}

/// What is wanted of a new container.
pub struct Wanted<'a> {
    /// containerd's id.
    pub id: &'a ContainerId,
    /// The bundle directory on the host.
    pub bundle: &'a str,
    /// The spec for this guest.
    pub spec: Spec,
    /// Where its streams go.
    pub urls: Urls,
}

impl Container {
    /// Makes a container whose first process waits for [`Self::start`].
    pub async fn create(
        exits: &Exits,
        streams: &Arc<Streams>,
        wanted: Wanted<'_>,
    ) -> Result<Self, TaskError> {
        let Wanted { id, bundle, mut spec, urls } = wanted;
        let cgroup_error = |source| TaskError::Cgroup { id: id.to_string(), source };
        if let Some(process) = spec.process_mut() {
            process.set_terminal(Some(urls.terminal));
        }
        let prepared = prepare(streams, &format!("container {id}"), &urls)?;
        let directory = Directory::new().map_err(|source| TaskError::System {
            subject: format!("container {id}"),
            what: "make a directory for it",
            source,
        })?;
        let cgroup = Cgroup::create(spec.linux().as_ref()).map_err(cgroup_error)?;
        let cpu = take_cpu_limits(&mut spec);
        let made = async {
            if shares_pod_pid_namespace(&spec) {
                let of_user_namespace = namespace(&spec, LinuxNamespaceType::User).is_some();
                ensure_pid_namespace(exits, of_user_namespace).await?;
            }
            let request = Request {
                id: id.to_string(),
                directory: directory.0.clone(),
                action: Action::Create(Box::new(spec.clone())),
            };
            let launched = launch(exits, &request, prepared, urls.terminal).await?;
            if let Some(cpu) = cpu {
                cgroup.update(&cpu).await.map_err(|error| RuntimeError::Container(error.to_string()))?;
            }
            Ok(launched)
        };
        let (pid, stdio) = match made.await {
            Ok(made) => made,
            Err(source) => {
                if let Err(error) = cgroup.remove().await {
                    tracing::warn!(%error, "a cgroup stays behind");
                }
                return Err(TaskError::Create { id: id.to_string(), source });
            }
        };
        let init = Process::new(id.as_str(), "", urls, State::Created { pid });
        init.set_stdio(stdio);
        Ok(Self {
            id: id.clone(),
            bundle: bundle.to_owned(),
            cgroup,
            init,
            pausing: Pausing::default(),
            disks: OnceLock::new(),
            volumes: Mutex::default(),
            huge_pages: tokio::sync::Mutex::default(),
            spec,
            directory,
            execs: Mutex::default(),
            serial: AtomicU64::new(0),
            deleting: AtomicBool::new(false),
        })
    }

    /// Keeps the volumes mounted and the huge pages set aside until the container is deleted.
    pub async fn keep(&self, volumes: Held, huge_pages: Reserved) {
        *self.volumes.lock().unwrap_or_else(PoisonError::into_inner) = Some(volumes);
        *self.huge_pages.lock().await = Some(huge_pages);
    }

    /// Gives the container other limits; those that `resources` does not name stay.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), TaskError> {
        if let Some(huge_pages) = self.huge_pages.lock().await.as_ref() {
            let set = huge_pages.set(resources).await;
            set.map_err(|source| TaskError::HugePages { id: self.id.to_string(), source })?;
        }
        self.cgroup
            .update(resources)
            .await
            .map_err(|source| TaskError::Cgroup { id: self.id.to_string(), source })
    }

    /// Lets the first process run its program.
    pub fn start(&self) -> Result<i32, TaskError> {
        let State::Created { pid } = self.init.state() else {
            return Err(self.wrong_state("it has been started before, or has ended"));
        };
        let socket = self.directory.0.join(runtime::START_SOCKET);
        UnixStream::connect(&socket)
            .and_then(|mut socket| io::Write::write_all(&mut socket, b"start container"))
            .map_err(|source| TaskError::Start { id: self.id.to_string(), source })?;
        self.init.set_state(State::Running { pid });
        Ok(pid)
    }

    /// Announces a process to be executed.
    pub fn add_exec(&self, exec_id: &ExecId, spec: ProcessSpec, urls: Urls) -> Result<(), TaskError> {
        self.must_run()?;
        let mut execs = self.execs();
        if execs.contains_key(exec_id.as_str()) {
            return Err(TaskError::AlreadyExists(format!("container {}: exec {exec_id}", self.id)));
        }
        let process = Process::new(self.id.as_str(), exec_id.as_str(), urls, State::Added);
        execs.insert(exec_id.clone(), Exec { process, spec });
        Ok(())
    }

    /// Starts a process that was announced; it runs its program when this returns.
    pub async fn start_exec(
        &self,
        exits: &Exits,
        streams: &Arc<Streams>,
        exec_id: &str,
    ) -> Result<Arc<Process>, TaskError> {
        let process = self.process(exec_id)?;
        self.must_run()?;
        let Some(_not_paused) = self.pausing.hold_off().await else {
            return Err(self.wrong_state("it is paused"));
        };
        let spec = self.execs().get(exec_id).map(|exec| exec.spec.clone());
        let (State::Added, Some(mut spec)) = (process.state(), spec) else {
            return Err(TaskError::State {
                subject: process.subject.clone(),
                problem: "it has been started before",
            });
        };
        process.set_state(State::Starting);
        spec.set_terminal(Some(process.urls.terminal));
        match self.run_exec(exits, streams, &process, spec).await {
            Ok((pid, stdio)) => {
                process.set_stdio(stdio);
                process.set_state(State::Running { pid });
                Ok(process)
            }
            Err(error) => {
                let exit = super::Exit::now(255);
                process.set_state(State::Stopped { pid: 0, exit });
                process.finish(exit);
                Err(error)
            }
        }
    }

    async fn run_exec(
        &self,
        exits: &Exits,
        streams: &Arc<Streams>,
        process: &Process,
        spec: ProcessSpec,
    ) -> Result<(i32, Stdio), TaskError> {
        let prepared = prepare(streams, &process.subject, &process.urls)?;
        let directory = spec.cwd().clone();
        let request = Request {
            id: self.id.to_string(),
            directory: self.directory.0.clone(),
            action: Action::Exec {
                spec: Box::new(self.exec_spec(spec)),
                serial: self.serial.fetch_add(1, Ordering::Relaxed),
            },
        };
        launch(exits, &request, prepared, process.urls.terminal).await.map_err(|source| TaskError::Exec {
            id: self.id.to_string(),
            source: in_words(source, &directory),
        })
    }

    /// The container's spec for one more process in it: the same seccomp filter and cgroup, and the
    /// namespaces that its first process is in.
    fn exec_spec(&self, process: ProcessSpec) -> Spec {
        let pid = self.init.pid();
        let mut spec = self.spec.clone();
        spec.set_process(Some(process)).set_mounts(None).set_hooks(None);
        if let Some(linux) = spec.linux_mut() {
            linux.set_resources(None).set_devices(None);
            for namespace in linux.namespaces_mut().iter_mut().flatten() {
                let file = namespace_file(namespace.typ());
                namespace.set_path(Some(PathBuf::from(format!("/proc/{pid}/ns/{file}"))));
            }
        }
        spec
    }

    /// Whether the end of the first process ends all others: it is the first of a PID namespace.
    pub fn has_private_pid_namespace(&self) -> bool {
        namespace(&self.spec, LinuxNamespaceType::Pid).is_some_and(|namespace| namespace.path().is_none())
    }

    /// Waits until every exec that runs has ended, and its end has been told; but not for one that SIGKILL does not end.
    pub async fn execs_ended(&self) {
        let running: Vec<_> = {
            let execs = self.execs();
            let runs =
                |process: &&Arc<Process>| matches!(process.state(), State::Starting | State::Running { .. });
            execs.values().map(|exec| &exec.process).filter(runs).map(Arc::clone).collect()
        };
        let all = futures::future::join_all(running.iter().map(|process| process.wait()));
        let _ = tokio::time::timeout(EXECS_LIMIT, all).await;
    }

    /// The process with that exec id, or the first one for an empty id.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        match self.execs().get(exec_id) {
            Some(exec) => Ok(Arc::clone(&exec.process)),
            None => Err(TaskError::NotFound(format!("container {}: exec {exec_id}", self.id))),
        }
    }

    /// The exec that has this pid.
    pub fn exec_with_pid(&self, pid: u32) -> Option<Arc<Process>> {
        let has_pid = |exec: &&Exec| exec.process.pid().cast_unsigned() == pid;
        self.execs().values().find(has_pid).map(|exec| Arc::clone(&exec.process))
    }

    /// Forgets an exec that has ended or never begun.
    pub fn remove_exec(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        let process = self.process(exec_id)?;
        match process.state() {
            State::Added | State::Stopped { .. } => {
                self.execs().remove(exec_id);
                process.stdio().take();
                Ok(process)
            }
            _ => Err(TaskError::State {
                subject: process.subject.clone(),
                problem: "cannot delete a running process",
            }),
        }
    }

    /// Takes apart what is left of the container. Only one caller at a time gets past the check.
    pub async fn delete(&self) -> Result<(), TaskError> {
        match self.init.state() {
            State::Stopped { .. } | State::Created { .. } => {}
            _ => return Err(self.wrong_state("cannot delete a running container")),
        }
        if self.deleting.swap(true, Ordering::Relaxed) {
            return Err(self.wrong_state("it is being deleted"));
        }
        let removed = self.cgroup.remove().await;
        if let Err(source) = removed {
            self.deleting.store(false, Ordering::Relaxed);
            return Err(TaskError::Cgroup { id: self.id.to_string(), source });
        }
        self.init.wait().await;
        self.init.stdio().take();
        self.execs().clear();
        let volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(volumes) = volumes {
            volumes.release().await;
        }
        self.huge_pages.lock().await.take();
        if let Some(disks) = self.disks.get() {
            disks.detach().await;
        }
        Ok(())
    }

    /// Stops all of its processes, or none.
    pub async fn pause(&self) -> Result<(), TaskError> {
        if !matches!(self.init.state(), State::Running { .. }) {
            return Err(self.wrong_state("only a running container can be paused"));
        }
        self.pausing.pause(&self.cgroup).await.map_err(|error| self.pause_error(error))
    }

    /// Lets its processes go on.
    pub async fn resume(&self) -> Result<(), TaskError> {
        self.pausing.resume(&self.cgroup).await.map_err(|error| self.pause_error(error))
    }

    fn pause_error(&self, error: PauseError) -> TaskError {
        match error {
            PauseError::State(problem) => self.wrong_state(problem),
            PauseError::Cgroup(source) => TaskError::Cgroup { id: self.id.to_string(), source },
        }
    }

    fn must_run(&self) -> Result<(), TaskError> {
        match self.init.state() {
            State::Running { .. } => Ok(()),
            _ => Err(self.wrong_state("init process is not running")),
        }
    }

    /// An error about this container's state.
    pub fn wrong_state(&self, problem: &'static str) -> TaskError {
        TaskError::State { subject: format!("container {}", self.id), problem }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<ExecId, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the CPU's limits out of a spec. They are for the container's program: a small share of a busy guest would keep its
/// first process from being made for minutes.
fn take_cpu_limits(spec: &mut Spec) -> Option<LinuxResources> {
    let resources = spec.linux_mut().as_mut()?.resources_mut().as_mut()?;
    let cpu = resources.cpu().clone()?;
    resources.set_cpu(None);
    let mut limits = LinuxResources::default();
    limits.set_devices(None).set_cpu(Some(cpu));
    Some(limits)
}

/// A process's directory that cannot be entered, with runc's text: libcontainer does not name it.
fn in_words(error: RuntimeError, directory: &Path) -> RuntimeError {
    let RuntimeError::Container(text) = &error else { return error };
    let errno = text.split_once("failed to chdir e=").map(|(_, errno)| errno);
    let problem = match errno.map(|errno| errno.split(|c: char| !c.is_ascii_alphanumeric()).next()) {
        Some(Some("ENOENT")) => "no such file or directory",
        Some(Some("ENOTDIR")) => "not a directory",
        Some(Some("EACCES")) => "permission denied",
        _ => return error,
    };
    RuntimeError::Container(format!(
        "chdir to cwd (\"{}\") set in config.json failed: {problem}",
        directory.display()
    ))
}

fn prepare(streams: &Arc<Streams>, subject: &str, urls: &Urls) -> Result<Prepared, TaskError> {
    Prepared::new(streams, urls).map_err(|source| TaskError::Stdio { subject: subject.to_owned(), source })
}

/// Makes the process and begins to copy its streams.
async fn launch(
    exits: &Exits,
    request: &Request,
    prepared: Prepared,
    terminal: bool,
) -> Result<(i32, Stdio), RuntimeError> {
    let mut console = None;
    let mut theirs = None;
    if terminal {
        let pair = UnixStream::pair()?;
        console = Some(pair.0);
        theirs = Some(pair.1.into());
    }
    let (stdio, ready) = prepared.into_descriptors();
    let pid = runtime::launch(exits, request, Descriptors { stdio, console: theirs }).await?;
    let console = console.map(|socket| receive_console(&socket)).transpose()?;
    let stdio = ready.start(console).map_err(|error| RuntimeError::Container(error.to_string()))?;
    Ok((pid, stdio))
}

/// Names of the files in `/proc/<pid>/ns`.
fn namespace_file(kind: LinuxNamespaceType) -> &'static str {
    match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    }
}

/// `None`: the guest's own.
fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}

fn shares_pod_pid_namespace(spec: &Spec) -> bool {
    let path = namespace(spec, LinuxNamespaceType::Pid).and_then(|namespace| namespace.path().as_ref());
    path.is_some_and(|path| path.as_os_str() == PID_NAMESPACE)
}

/// Makes the pod's PID namespace when the first container wants it.
async fn ensure_pid_namespace(exits: &Exits, of_user_namespace: bool) -> Result<(), RuntimeError> {
    static MAKING: tokio::sync::Mutex<bool> = tokio::sync::Mutex::const_new(false);
    let mut made = MAKING.lock().await;
    if !*made {
        let request = Request {
            id: String::new(),
            directory: PathBuf::from(DIRECTORIES),
            action: Action::PidNamespace { of_user_namespace },
        };
        let stdio = [stdio::null()?, stdio::null()?, stdio::null()?];
        let first = runtime::launch(exits, &request, Descriptors { stdio, console: None }).await?;
        namespaces::keep(&PathBuf::from(format!("/proc/{first}/ns/pid")), Path::new(PID_NAMESPACE))?;
        *made = true;
    }
    Ok(())
}

/// A directory of its own, removed when dropped. Its name is short and nobody else's choice.
struct Directory(PathBuf);

impl Directory {
    fn new() -> io::Result<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("{DIRECTORIES}/{serial}"));
        fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(directory = %self.0.display(), %error, "cannot remove a container's directory");
        }
    }
}
