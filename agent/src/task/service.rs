//! The Task API's calls.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused,
        TaskResumed, TaskStart,
    },
    protobuf::{
        Message, MessageField, MessageFull,
        well_known_types::{any::Any, empty::Empty},
    },
    shim::oci::ProcessDetails,
    shim_async,
    ttrpc::{self, r#async::TtrpcContext},
    types::task::{ProcessInfo, Status},
};
use oci_spec::runtime::Spec;
use pericarp_protos::{
    agent::container_timing::Phase,
    guest::CGROUP_PARENT,
    host::PrepareContainerResponse,
    id::{ContainerId, InvalidId},
};
use tokio::sync::oneshot;

use super::{
    Exit, Exits, TaskError,
    container::{Container, Wanted},
    process::{Process, State, signal},
    spec::{self, SpecError},
};
use crate::{
    cgroup::{self, CgroupError, OomWatcher},
    devices::Attached,
    events::{About, Events, timestamp},
    host::Host,
    huge_pages::{self, HugePages, HugePagesError, Reserved},
    pod::Pod,
    stdio::{Streams, Urls},
    volumes::Volumes,
};

/// Every container of the pod.
pub struct Tasks {
    pod: Arc<Pod>,
    host: Arc<Host>,
    exits: Arc<Exits>,
    streams: Arc<Streams>,
    events: Arc<Events>,
    oom: Option<Arc<OomWatcher>>,
    containers: Mutex<HashMap<ContainerId, Slot>>,
    volumes: Arc<Volumes>,
    huge_pages: Arc<HugePages>,
}

enum Slot {
    /// `Create` is under way.
    Creating,
    Present(Arc<Container>),
}

impl Tasks {
    /// No containers yet. Needs a tokio runtime.
    pub fn new(
        pod: Arc<Pod>,
        host: Arc<Host>,
        exits: Arc<Exits>,
        streams: Arc<Streams>,
        events: Arc<Events>,
    ) -> Arc<Self> {
        let oom = match OomWatcher::new() {
            Ok(oom) => Some(Arc::new(oom)),
            Err(error) => {
                tracing::warn!(%error, "running out of memory will not be reported");
                None
            }
        };
        if let Some(oom) = oom.clone() {
            let events = Arc::clone(&events);
            tokio::spawn(async move { oom.run(|container_id| publish_oom(&events, container_id)).await });
        }
        Arc::new(Self {
            pod,
            host,
            exits,
            streams,
            events,
            oom,
            containers: Mutex::default(),
            volumes: Arc::default(),
            huge_pages: Arc::default(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.containers().get(id) {
            Some(Slot::Present(container)) => Ok(Arc::clone(container)),
            _ => Err(TaskError::NotFound(format!("container {id}"))),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<ContainerId, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the controller prepare the container, and makes it.
    async fn make(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
    ) -> Result<Arc<Container>, TaskError> {
        let prepared = self
            .host
            .prepare_container(id)
            .await
            .map_err(|source| TaskError::Prepare { id: id.to_string(), source })?;
        let began = Instant::now();
        let made = self.make_prepared(id, request, prepared).await;
        match &made {
            Ok(_) => self.events.timing(id.as_str(), Phase::PHASE_CREATE, began.elapsed()),
            Err(_) => self.release(id).await,
        }
        made
    }

    async fn make_prepared(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
        prepared: PrepareContainerResponse,
    ) -> Result<Arc<Container>, TaskError> {
        let invalid = |problem| TaskError::Invalid { subject: format!("container {id}"), problem };
        self.pod.mount_share().map_err(invalid)?;
        leave_room_for_agent().await;
        let mut spec = spec::container(&prepared.spec)
            .map_err(|error| invalid(format!("its OCI spec cannot be read: {error}")))?;
        let huge_pages = self.huge_pages.of(id.as_str());
        set_huge_pages(&huge_pages, &mut spec)
            .await
            .map_err(|source| TaskError::HugePages { id: id.to_string(), source })?;
        let (disks, spec) = Attached::new(spec, prepared.disks)
            .await
            .map_err(|source| TaskError::Disks { id: id.to_string(), source })?;
        let volumes = self.volumes.hold(&spec).await;
        match Box::pin(self.make_container(id, request, spec)).await {
            // A new container has none yet.
            Ok(container) => {
                let _ = container.disks.set(disks);
                container.keep(volumes, huge_pages).await;
                Ok(container)
            }
            Err(error) => {
                volumes.release().await;
                disks.detach().await;
                Err(error)
            }
        }
    }

    async fn make_container(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
        spec: Spec,
    ) -> Result<Arc<Container>, TaskError> {
        let urls = Urls {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let expectation = self.exits.expect();
        let wanted = Wanted { id, bundle: &request.bundle, spec, urls };
        let container = Arc::new(Container::create(&self.exits, &self.streams, wanted).await?);
        let exit = expectation.wait_for(container.init.pid());
        drop(expectation);
        self.publish_create(request, &container);
        self.watch_exit(&container, &container.init, exit);
        Ok(container)
    }

    fn publish_create(&self, request: &api::CreateTaskRequest, container: &Container) {
        let mut io = TaskIO::new();
        io.stdin.clone_from(&request.stdin);
        io.stdout.clone_from(&request.stdout);
        io.stderr.clone_from(&request.stderr);
        io.terminal = request.terminal;
        let mut event = TaskCreate::new();
        event.container_id.clone_from(&request.id);
        event.bundle.clone_from(&request.bundle);
        event.io = MessageField::some(io);
        event.pid = container.init.pid().cast_unsigned();
        self.events.publish(About::Container, "/tasks/create", &event);
    }

    async fn release(&self, id: &ContainerId) {
        if let Err(error) = self.host.release_container(id).await {
            tracing::warn!(%id, %error, "the controller has not released a container");
        }
    }

    /// Waits for the end of a process, in a task of its own.
    fn watch_exit(&self, container: &Arc<Container>, process: &Arc<Process>, exit: oneshot::Receiver<Exit>) {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let (events, oom) = (Arc::clone(&self.events), self.oom.clone());
        tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            let pid = process.pid();
            process.set_state(State::Stopped { pid, exit });
            let is_init = process.exec_id.is_empty();
            if is_init {
                // Whoever hears of the end wants to know why.
                if oom.is_some_and(|oom| oom.has_killed(container.id.as_str())) {
                    publish_oom(&events, container.id.as_str());
                }
                end_of_init(&container).await;
            }
            let mut event = TaskExit::new();
            event.container_id = container.id.to_string();
            event.id = if is_init { container.id.to_string() } else { process.exec_id.clone() };
            event.pid = pid.cast_unsigned();
            event.exit_status = exit.status;
            event.exited_at = MessageField::some(timestamp(exit.at));
            let about = if is_init { About::Container } else { About::Exec };
            events.publish(about, "/tasks/exit", &event);
            process.finish(exit);
        });
    }

    fn start_init(&self, container: &Container) -> Result<i32, TaskError> {
        let began = Instant::now();
        if let Some(oom) = &self.oom
            && let Err(error) = oom.watch(container.id.as_str(), &container.cgroup)
        {
            tracing::debug!(%error, "running out of memory will not be reported");
        }
        let pid = container.start()?;
        let mut event = TaskStart::new();
        event.container_id = container.id.to_string();
        event.pid = pid.cast_unsigned();
        self.events.publish(About::Container, "/tasks/start", &event);
        self.events.timing(container.id.as_str(), Phase::PHASE_START, began.elapsed());
        Ok(pid)
    }

    async fn start_exec(&self, container: &Arc<Container>, exec_id: &str) -> Result<i32, TaskError> {
        let expectation = self.exits.expect();
        let process = container.start_exec(&self.exits, &self.streams, exec_id).await?;
        let pid = process.pid();
        let exit = expectation.wait_for(pid);
        drop(expectation);
        let mut event = TaskExecStarted::new();
        event.container_id = container.id.to_string();
        exec_id.clone_into(&mut event.exec_id);
        event.pid = pid.cast_unsigned();
        self.events.publish(About::Exec, "/tasks/exec-started", &event);
        self.watch_exit(container, &process, exit);
        Ok(pid)
    }

    async fn delete_container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let container = self.container(id)?;
        container.delete().await?;
        self.release(&container.id).await;
        self.containers().remove(&container.id);
        Ok(container)
    }
}

#[async_trait]
impl shim_async::Task for Tasks {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id: &ContainerId = &request.id.parse().map_err(TaskError::from)?;
        let subject = || format!("container {id}");
        if !self.pod.is_configured() {
            let problem = "the pod has not been configured";
            return Err(TaskError::State { subject: subject(), problem }.into());
        }
        if !request.checkpoint.is_empty() {
            return Err(TaskError::Checkpoint(id.to_string()).into());
        }
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => return Err(TaskError::AlreadyExists(subject()).into()),
            Entry::Vacant(slot) => slot.insert(Slot::Creating),
        };
        let made = self.make(id, &request).await;
        let mut containers = self.containers();
        match made {
            Ok(container) => {
                let mut response = api::CreateTaskResponse::new();
                response.pid = container.init.pid().cast_unsigned();
                containers.insert(id.clone(), Slot::Present(container));
                Ok(response)
            }
            Err(error) => {
                containers.remove(id);
                Err(error.into())
            }
        }
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let container = self.container(&request.id)?;
        let pid = if request.exec_id.is_empty() {
            self.start_init(&container)?
        } else {
            self.start_exec(&container, &request.exec_id).await?
        };
        let mut response = api::StartResponse::new();
        response.pid = pid.cast_unsigned();
        Ok(response)
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        let process = if request.exec_id.is_empty() {
            Arc::clone(&self.delete_container(&request.id).await?.init)
        } else {
            self.container(&request.id)?.remove_exec(&request.exec_id)?
        };
        let mut response = api::DeleteResponse::new();
        response.pid = process.pid().cast_unsigned();
        if let State::Stopped { exit, .. } = process.state() {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(timestamp(exit.at));
        }
        if request.exec_id.is_empty() {
            let mut event = TaskDelete::new();
            event.container_id = request.id;
            event.pid = response.pid;
            event.exit_status = response.exit_status;
            event.exited_at = response.exited_at.clone();
            self.events.publish(About::Container, "/tasks/delete", &event);
        }
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let spec = parse(&request.id, "process", request.spec.as_ref(), spec::process)?;
        let urls = Urls {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let exec_id = request.exec_id.parse().map_err(|error: InvalidId| TaskError::Invalid {
            subject: format!("container {}", request.id),
            problem: error.to_string(),
        })?;
        container.add_exec(&exec_id, spec, urls)?;
        let mut event = TaskExecAdded::new();
        event.container_id = request.id;
        event.exec_id = request.exec_id;
        self.events.publish(About::Exec, "/tasks/exec-added", &event);
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let mut response = api::StateResponse::new();
        response.id = request.id;
        response.exec_id = request.exec_id;
        response.bundle.clone_from(&container.bundle);
        response.pid = process.pid().cast_unsigned();
        response.stdin.clone_from(&process.urls.stdin);
        response.stdout.clone_from(&process.urls.stdout);
        response.stderr.clone_from(&process.urls.stderr);
        response.terminal = process.urls.terminal;
        let status = match process.state() {
            State::Added | State::Starting | State::Created { .. } => Status::CREATED,
            State::Running { .. } if container.pausing.is_paused() => Status::PAUSED,
            State::Running { .. } => Status::RUNNING,
            State::Stopped { exit, .. } => {
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at));
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        let exit = process.wait().await;
        let mut response = api::WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(timestamp(exit.at));
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        if request.all && request.exec_id.is_empty() {
            let pids = container.cgroup.pids().map_err(cgroup_error(&request.id))?;
            for pid in pids {
                // One that has ended in the meantime is what was wanted.
                let _ = signal(pid.cast_signed(), request.signal);
            }
        } else {
            process.signal(request.signal)?;
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let container = self.container(&request.id)?;
        let mut pids = container.cgroup.pids().map_err(cgroup_error(&request.id))?;
        if pids.is_empty() {
            // A containerd that was started again takes a task without processes for one that was never made, and deletes
            // it without having looked at its exit (`ShimManager.loadShims`).
            pids.push(container.init.pid().cast_unsigned());
        }
        let mut response = api::PidsResponse::new();
        for pid in pids {
            let mut info = ProcessInfo::new();
            info.pid = pid;
            if let Some(exec) = container.exec_with_pid(pid) {
                let mut details = ProcessDetails::new();
                details.exec_id.clone_from(&exec.exec_id);
                info.info = MessageField::some(any("containerd.runc.v1.ProcessDetails", &details));
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await?;
        let mut event = TaskPaused::new();
        event.container_id = request.id;
        self.events.publish(About::Container, "/tasks/paused", &event);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume().await?;
        let mut event = TaskResumed::new();
        event.container_id = request.id;
        self.events.publish(About::Container, "/tasks/resumed", &event);
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if matches!(container.init.state(), State::Stopped { .. }) {
            return Err(container.wrong_state("cannot update a stopped container").into());
        }
        let resources = parse(&request.id, "resources", request.resources.as_ref(), spec::resources)?;
        // First, so that there is what the limits promise.
        self.host
            .fit_resources(&container.id)
            .await
            .map_err(|source| TaskError::Fit { id: request.id.clone(), source })?;
        leave_room_for_agent().await;
        container.update(&resources).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let container = self.container(&request.id)?;
        if !container.cgroup.directory().exists() {
            return Err(TaskError::NotFound(format!("container {}: cgroup", request.id)).into());
        }
        let metrics = container.cgroup.metrics();
        let mut response = api::StatsResponse::new();
        response.stats = MessageField::some(any("io.containerd.cgroups.v2.Metrics", &metrics));
        Ok(response)
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if matches!(process.state(), State::Stopped { .. }) {
            let problem = "cannot resize a stopped process";
            return Err(TaskError::State { subject: process.subject.clone(), problem }.into());
        }
        let cells = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        process.resize(cells(request.width), cells(request.height))?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin
            && let Some(stdio) = &*process.stdio()
        {
            stdio.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> ttrpc::Result<api::ConnectResponse> {
        let mut response = api::ConnectResponse::new();
        response.shim_pid = std::process::id();
        // containerd also connects before there is a container.
        response.task_pid =
            self.container(&request.id).map_or(0, |container| container.init.pid().cast_unsigned());
        response.version = env!("CARGO_PKG_VERSION").into();
        Ok(response)
    }

    /// containerd asks a shim to end with its last container. The pod lives on.
    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(TaskError::Checkpoint(request.id).into())
    }
}

/// What must have happened before anybody is told that a container's first process has ended.
async fn end_of_init(container: &Container) {
    // Without a PID namespace of its own, its other processes outlive the first.
    if !container.has_private_pid_namespace()
        && let Err(error) = container.cgroup.kill()
    {
        tracing::warn!(%error, "processes of an ended container may be left");
    }
    // containerd stops reading the moment it learns of the end. For an exec it does not.
    let drained = container.init.stdio().as_ref().map(crate::stdio::Stdio::drained);
    if let Some(drained) = drained {
        drained.await;
    }
    container.execs_ended().await;
}

fn publish_oom(events: &Events, container_id: &str) {
    let mut event = TaskOOM::new();
    container_id.clone_into(&mut event.container_id);
    events.publish(About::Container, "/tasks/oom", &event);
}

/// The guest's memory may have changed since the last time.
async fn leave_room_for_agent() {
    let limiting = tokio::task::spawn_blocking(|| cgroup::leave_room_for_agent(CGROUP_PARENT));
    if let Err(error) = limiting.await.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        tracing::warn!(%error, "the containers' common limits are not those of the guest's size");
    }
}

fn cgroup_error(id: &str) -> impl FnOnce(CgroupError) -> TaskError {
    move |source| TaskError::Cgroup { id: id.to_owned(), source }
}

/// Sets aside what a new container may use, and makes the volumes of it that it names.
async fn set_huge_pages(reserved: &Reserved, spec: &mut Spec) -> Result<(), HugePagesError> {
    if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        reserved.set(resources).await?;
    }
    huge_pages::mount_volumes(spec)
}

/// Reads the JSON that containerd puts into an `Any`.
fn parse<T>(
    id: &str,
    what: &str,
    any: Option<&Any>,
    read: impl FnOnce(&[u8]) -> Result<T, SpecError>,
) -> Result<T, TaskError> {
    let json = any.map(|any| any.value.as_slice()).unwrap_or_default();
    read(json).map_err(|error| TaskError::Invalid {
        subject: format!("container {id}"),
        problem: format!("the {what} in the request cannot be read: {error}"),
    })
}

fn any(type_url: &str, message: &impl MessageFull) -> Any {
    let mut any = Any::new();
    type_url.clone_into(&mut any.type_url);
    // Encoding into memory cannot fail for messages of this size.
    any.value = Message::write_to_bytes(message).unwrap_or_default();
    any
}
