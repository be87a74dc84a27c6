//! The calls of containerd's Task API.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api,
    protobuf::{
        MessageField,
        well_known_types::{any::Any, empty::Empty},
    },
    shim::oci::ProcessDetails,
    shim_async,
    ttrpc::{self, r#async::TtrpcContext},
    types::task::{ProcessInfo, Status},
};
use pericarp_protos::id::{ContainerId, InvalidId};

use super::{
    TaskError, TaskService, events, reserve_for_agent,
    spec::{self, SpecError},
};
use crate::{
    container::{Container, ContainerError, Process, ProcessState, send_signal},
    controller::timestamp,
    launch::describe_processes,
    stdio::Urls,
    ttrpc::pack,
};

#[async_trait]
impl shim_async::Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> ttrpc::Result<api::CreateTaskResponse> {
        let id: &ContainerId = &request.id.parse().map_err(TaskError::from)?;
        if !self.pod.is_configured() {
            return Err(TaskError::NotConfigured(format!("container {id}")).into());
        }
        if !request.checkpoint.is_empty() {
            return Err(TaskError::Checkpoint(id.to_string()).into());
        }
        let container = self.create_container(id, &request).await?;
        let mut response = api::CreateTaskResponse::new();
        response.pid = container.init.pid().cast_unsigned();
        Ok(response)
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let container = self.container(&request.id)?;
        let pid = if request.exec_id.is_empty() {
            self.start_container(&container)?
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
            self.container(&request.id)?.remove_exec(&request.exec_id).await.map_err(TaskError::from)?
        };
        let mut response = api::DeleteResponse::new();
        response.pid = process.pid().cast_unsigned();
        if let ProcessState::Stopped { exit, .. } = process.state() {
            response.exit_status = exit.status;
            response.exited_at = MessageField::some(timestamp(exit.at));
        }
        if request.exec_id.is_empty() {
            events::publish_delete(&self.events, request.id, &response);
        }
        Ok(response)
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let spec = parse_any(&request.id, "process", request.spec.as_ref(), spec::process)?;
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
        container.add_exec(&exec_id, spec, urls).map_err(TaskError::from)?;
        events::publish_exec_added(&self.events, request.id, request.exec_id);
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
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
            ProcessState::Added | ProcessState::Starting | ProcessState::Created { .. } => Status::CREATED,
            ProcessState::Running { .. } if container.is_paused() => Status::PAUSED,
            ProcessState::Running { .. } => Status::RUNNING,
            ProcessState::Stopped { exit, .. } => {
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(timestamp(exit.at));
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        let exit = process.wait().await;
        let mut response = api::WaitResponse::new();
        response.exit_status = exit.status;
        response.exited_at = MessageField::some(timestamp(exit.at));
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> ttrpc::Result<Empty> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        if request.all && request.exec_id.is_empty() {
            for pid in pids(&container)? {
                // This fails if the process has ended in the meantime.
                let _ = send_signal(pid.cast_signed(), request.signal);
            }
        } else {
            process.signal(request.signal).map_err(TaskError::from)?;
        }
        if request.signal == libc::SIGKILL.cast_unsigned() {
            tokio::spawn(report_survival(container, process));
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let container = self.container(&request.id)?;
        let mut pids = pids(&container)?;
        if pids.is_empty() {
            // A containerd that has been restarted takes a task without processes for one that was never created, and
            // deletes it without asking for its exit (`ShimManager.loadShims`).
            pids.push(container.init.pid().cast_unsigned());
        }
        let mut response = api::PidsResponse::new();
        for pid in pids {
            let mut info = ProcessInfo::new();
            info.pid = pid;
            if let Some(exec) = container.exec_with_pid(pid) {
                let mut details = ProcessDetails::new();
                details.exec_id.clone_from(&exec.exec_id);
                info.info = MessageField::some(pack("containerd.runc.v1.ProcessDetails", &details));
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await.map_err(TaskError::from)?;
        events::publish_paused(&self.events, request.id);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume().await.map_err(TaskError::from)?;
        events::publish_resumed(&self.events, request.id);
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if matches!(container.init.state(), ProcessState::Stopped { .. }) {
            return Err(TaskError::from(container.state_error("cannot update a stopped container")).into());
        }
        let resources = parse_any(&request.id, "resources", request.resources.as_ref(), spec::resources)?;
        // The machine is resized first, so that it has what the limits allow.
        self.controller
            .fit_resources(&container.id)
            .await
            .map_err(|source| TaskError::Resize { id: request.id.clone(), source })?;
        reserve_for_agent().await;
        container.update(&resources).await.map_err(TaskError::from)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let container = self.container(&request.id)?;
        if !container.cgroup.directory().exists() {
            return Err(TaskError::NotFound(format!("container {}: cgroup", request.id)).into());
        }
        let metrics = pericarp_cgroup_stats::read_with_zeros(container.cgroup.directory());
        let mut response = api::StatsResponse::new();
        response.stats = MessageField::some(pack(pericarp_cgroup_stats::METRICS_TYPE, &metrics));
        Ok(response)
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        if matches!(process.state(), ProcessState::Stopped { .. }) {
            let problem = "cannot resize a stopped process";
            let error = ContainerError::State { subject: process.subject.clone(), problem };
            return Err(TaskError::from(error).into());
        }
        // A terminal's size has 16 bits; a larger one is cut to the largest.
        let clamp = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        process.resize(clamp(request.width), clamp(request.height)).map_err(TaskError::from)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
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
        // containerd also calls this before there is a container.
        response.task_pid =
            self.container(&request.id).map_or(0, |container| container.init.pid().cast_unsigned());
        response.version = env!("CARGO_PKG_VERSION").into();
        Ok(response)
    }

    /// Does nothing: containerd asks a shim to exit with its last container, but the pod goes on.
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

impl TaskService {
    /// A container, and its process with this exec id.
    fn process(&self, id: &str, exec_id: &str) -> Result<(Arc<Container>, Arc<Process>), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        Ok((container, process))
    }
}

/// Logs what holds up a process that SIGKILL does not end: in the kernel it may wait for a file system for ever.
async fn report_survival(container: Arc<Container>, process: Arc<Process>) {
    if !process.outlives_sigkill().await {
        return;
    }
    let (pid, state) = (process.pid(), process.state());
    let described = tokio::task::spawn_blocking(move || {
        let mut pids = pids(&container).unwrap_or_default();
        pids.retain(|other| *other != pid.cast_unsigned());
        pids.insert(0, pid.cast_unsigned());
        describe_processes(&pids)
    });
    let processes = described.await.unwrap_or_default();
    tracing::error!(process = process.subject, ?state, processes, "SIGKILL has not ended a process");
}

/// The pids of all processes of a container.
fn pids(container: &Container) -> Result<Vec<u32>, TaskError> {
    Ok(container.cgroup.pids().map_err(|source| container.cgroup_error(source))?)
}

/// Parses the JSON that containerd puts into an `Any`. `what` names it in errors.
fn parse_any<T>(
    id: &str,
    what: &str,
    any: Option<&Any>,
    parse_json: impl FnOnce(&[u8]) -> Result<T, SpecError>,
) -> Result<T, TaskError> {
    let json = any.map(|any| any.value.as_slice()).unwrap_or_default();
    parse_json(json).map_err(|error| TaskError::Invalid {
        subject: format!("container {id}"),
        problem: format!("the {what} in the request cannot be read: {error}"),
    })
}
