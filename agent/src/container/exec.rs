//! Processes that are executed in a container.

use std::{
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use oci_spec::runtime::{Process as ProcessSpec, Spec};
use pericarp_protos::id::ExecId;

use super::{
    Container, ContainerError, namespaces,
    process::{Process, ProcessState, receive_console},
};
use crate::{
    launch::{self, Action, Descriptors, Exit, LaunchError, Reaper, Request},
    stdio::{PreparedStdio, Stdio, Streams, Urls},
};

/// How long the end of a container waits for the ends of its execs, all of which have been killed, and how long the
/// deletion of an exec waits for the end of its start.
const EXECS_LIMIT: Duration = Duration::from_secs(10);

/// How many execs of a container are started at a time; others wait. Each start has a process of the agent's, and a
/// container can make its starts slow: there would be one more for each of its probes.
pub const STARTING_MAX: usize = 16;

/// A process that was added to a container.
pub struct Exec {
    process: Arc<Process>,
    spec: ProcessSpec,
}

impl Container {
    /// Adds a process, which [`Self::start_exec`] executes.
    pub fn add_exec(&self, exec_id: &ExecId, spec: ProcessSpec, urls: Urls) -> Result<(), ContainerError> {
        self.check_running()?;
        let mut execs = self.execs();
        if execs.contains_key(exec_id.as_str()) {
            return Err(ContainerError::AlreadyExists(format!("container {}: exec {exec_id}", self.id)));
        }
        let process = Process::new(self.id.as_str(), exec_id.as_str(), urls, ProcessState::Added);
        execs.insert(exec_id.clone(), Exec { process, spec });
        Ok(())
    }

    /// Starts a process that has been added. Its program runs when this returns.
    pub async fn start_exec(
        &self,
        reaper: &Reaper,
        streams: &Arc<Streams>,
        exec_id: &str,
    ) -> Result<Arc<Process>, ContainerError> {
        let process = self.process(exec_id)?;
        self.check_running()?;
        let Some(_pause_guard) = self.pause_control.prevent_pause().await else {
            return Err(self.state_error("it is paused"));
        };
        let spec = self.execs().get(exec_id).map(|exec| exec.spec.clone());
        let (ProcessState::Added, Some(mut spec)) = (process.state(), spec) else {
            return Err(ContainerError::State {
                subject: process.subject.clone(),
                problem: "it has been started before",
            });
        };
        process.set_state(ProcessState::Starting);
        spec.set_terminal(Some(process.urls.terminal));
        let launched = tokio::select! {
            _place = self.starting.acquire() => self.launch_exec(reaper, streams, &process, spec).await,
            () = process.start_given_up() => {
                Err(ContainerError::Exec { id: self.id.to_string(), source: LaunchError::Killed })
            }
        };
        match launched {
            Ok((pid, stdio)) => {
                process.set_stdio(stdio);
                process.set_state(ProcessState::Running { pid });
                if process.is_start_given_up() {
                    // Its exit is reported as that of any other.
                    let _ = process.signal(libc::SIGKILL.cast_unsigned());
                }
                Ok(process)
            }
            Err(error) => {
                let exit = Exit::now(255);
                process.set_state(ProcessState::Stopped { pid: 0, exit });
                process.finish(exit);
                Err(error)
            }
        }
    }

    async fn launch_exec(
        &self,
        reaper: &Reaper,
        streams: &Arc<Streams>,
        process: &Process,
        spec: ProcessSpec,
    ) -> Result<(i32, Stdio), ContainerError> {
        let stdio = prepare_stdio(streams, &process.subject, &process.urls)?;
        let working_directory = spec.cwd().clone();
        let request = Request {
            id: self.id.to_string(),
            directory: self.directory.path().to_owned(),
            action: Action::Exec {
                spec: Box::new(self.exec_spec(spec)),
                serial: self.next_exec.fetch_add(1, Ordering::Relaxed),
            },
        };
        let launched =
            launch_with_stdio(reaper, &request, stdio, process.urls.terminal, process.start_given_up());
        launched.await.map_err(|source| {
            let source = explain_chdir_error(source, &working_directory);
            ContainerError::Exec { id: self.id.to_string(), source }
        })
    }

    /// The container's spec for another process in it: with the same seccomp filter and cgroup, and the namespaces of
    /// the first process.
    fn exec_spec(&self, process: ProcessSpec) -> Spec {
        let pid = self.init.pid();
        let mut spec = self.spec.clone();
        spec.set_process(Some(process)).set_mounts(None).set_hooks(None);
        if let Some(linux) = spec.linux_mut() {
            linux.set_resources(None).set_devices(None);
            for namespace in linux.namespaces_mut().iter_mut().flatten() {
                let file = namespaces::file_name(namespace.typ());
                namespace.set_path(Some(PathBuf::from(format!("/proc/{pid}/ns/{file}"))));
            }
        }
        spec
    }

    /// Waits until every running exec has ended and its exit event has been published, but not longer than a limit:
    /// SIGKILL may not end a process.
    pub async fn wait_for_execs(&self) {
        let is_running = |process: &&Arc<Process>| {
            matches!(process.state(), ProcessState::Starting | ProcessState::Running { .. })
        };
        let running: Vec<_> =
            self.execs().values().map(|exec| &exec.process).filter(is_running).map(Arc::clone).collect();
        let all = futures::future::join_all(running.iter().map(|process| process.wait()));
        let _ = tokio::time::timeout(EXECS_LIMIT, all).await;
    }

    /// The process with this exec id, or the first process for an empty id.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        match self.execs().get(exec_id) {
            Some(exec) => Ok(Arc::clone(&exec.process)),
            None => Err(ContainerError::NotFound(format!("container {}: exec {exec_id}", self.id))),
        }
    }

    /// The exec that has this pid.
    pub fn exec_with_pid(&self, pid: u32) -> Option<Arc<Process>> {
        let has_pid = |exec: &&Exec| exec.process.pid().cast_unsigned() == pid;
        self.execs().values().find(has_pid).map(|exec| Arc::clone(&exec.process))
    }

    /// Removes an exec that has ended or has not been started, and returns it. One that is being started is ended:
    /// containerd deletes it without killing it when its client has given up.
    pub async fn remove_exec(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        let process = self.process(exec_id)?;
        if process.state() == ProcessState::Starting {
            process.give_up_start();
            let _ = tokio::time::timeout(EXECS_LIMIT, process.wait()).await;
        }
        match process.state() {
            ProcessState::Added | ProcessState::Stopped { .. } => {
                self.execs().remove(exec_id);
                process.stdio().take();
                Ok(process)
            }
            _ => Err(ContainerError::State {
                subject: process.subject.clone(),
                problem: "cannot delete a running process",
            }),
        }
    }

    fn check_running(&self) -> Result<(), ContainerError> {
        match self.init.state() {
            ProcessState::Running { .. } => Ok(()),
            _ => Err(self.state_error("init process is not running")),
        }
    }
}

/// Claims the streams of a new process and creates its pipes. `subject` names the process in errors.
pub fn prepare_stdio(
    streams: &Arc<Streams>,
    subject: &str,
    urls: &Urls,
) -> Result<PreparedStdio, ContainerError> {
    PreparedStdio::new(streams, urls)
        .map_err(|source| ContainerError::Stdio { subject: subject.to_owned(), source })
}

/// Creates a process and begins to copy its streams. Returns its pid. When `killed` resolves, this is given up.
pub async fn launch_with_stdio(
    reaper: &Reaper,
    request: &Request,
    prepared: PreparedStdio,
    terminal: bool,
    killed: impl Future<Output = ()>,
) -> Result<(i32, Stdio), LaunchError> {
    let (receiver, sender) = if terminal {
        let (receiver, sender) = UnixStream::pair()?;
        (Some(receiver), Some(sender.into()))
    } else {
        (None, None)
    };
    let (stdio, agent_ends) = prepared.into_ends();
    let pid = launch::launch(reaper, request, Descriptors { stdio, console: sender }, killed).await?;
    let console = receiver.map(|socket| receive_console(&socket)).transpose()?;
    let stdio =
        agent_ends.start_copying(console).map_err(|error| LaunchError::Container(error.to_string()))?;
    Ok((pid, stdio))
}

/// Replaces libcontainer's error of a working directory that cannot be entered by runc's, which names the directory.
fn explain_chdir_error(error: LaunchError, directory: &Path) -> LaunchError {
    let LaunchError::Container(text) = &error else { return error };
    let errno = text.split_once("failed to chdir e=").map(|(_, errno)| errno);
    let problem = match errno.map(|errno| errno.split(|c: char| !c.is_ascii_alphanumeric()).next()) {
        Some(Some("ENOENT")) => "no such file or directory",
        Some(Some("ENOTDIR")) => "not a directory",
        Some(Some("EACCES")) => "permission denied",
        _ => return error,
    };
    LaunchError::Container(format!(
        "chdir to cwd (\"{}\") set in config.json failed: {problem}",
        directory.display()
    ))
}
