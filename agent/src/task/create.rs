//! Creating, starting and deleting containers.

use std::{collections::hash_map::Entry, sync::Arc, time::Instant};

use containerd_shim_protos::api;
use pericarp_protos::{agent::container_timing::Phase, host::PrepareContainerResponse, id::ContainerId};

use super::{ContainerEntry, TaskError, TaskService, events, reserve_for_agent, spec};
use crate::{
    container::{Attachments, Container, ContainerConfig},
    stdio::Urls,
};

impl TaskService {
    /// Creates a container whose first process waits for its start.
    pub(super) async fn create_container(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
    ) -> Result<Arc<Container>, TaskError> {
        match self.containers().entry(id.clone()) {
            Entry::Occupied(_) => return Err(TaskError::AlreadyExists(format!("container {id}"))),
            Entry::Vacant(entry) => entry.insert(ContainerEntry::Creating),
        };
        let created = self.prepare_and_create(id, request).await;
        let mut containers = self.containers();
        match &created {
            Ok(container) => containers.insert(id.clone(), ContainerEntry::Created(Arc::clone(container))),
            Err(_) => containers.remove(id),
        };
        created
    }

    /// Has the controller prepare the container, and creates it.
    async fn prepare_and_create(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
    ) -> Result<Arc<Container>, TaskError> {
        let prepared = self
            .controller
            .prepare_container(id)
            .await
            .map_err(|source| TaskError::Prepare { id: id.to_string(), source })?;
        let start = Instant::now();
        let created = Box::pin(self.create_prepared(id, request, prepared)).await;
        match &created {
            Ok(_) => self.events.record_timing(id.as_str(), Phase::PHASE_CREATE, start.elapsed()),
            Err(_) => self.release(id).await,
        }
        created
    }

    async fn create_prepared(
        &self,
        id: &ContainerId,
        request: &api::CreateTaskRequest,
        prepared: PrepareContainerResponse,
    ) -> Result<Arc<Container>, TaskError> {
        let invalid = |problem| TaskError::Invalid { subject: format!("container {id}"), problem };
        self.pod.mount_share().map_err(invalid)?;
        reserve_for_agent().await;
        let spec = spec::container(&prepared.spec)
            .map_err(|error| invalid(format!("its OCI spec cannot be read: {error}")))?;
        let (attachments, spec) = Attachments::attach(id, &self.storage, spec, prepared).await?;
        let urls = Urls {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let config = ContainerConfig { id, bundle: &request.bundle, spec, urls, attachments };
        let subscription = self.reaper.subscribe();
        let container = Arc::new(Container::create(&self.reaper, &self.streams, config).await?);
        let exit = subscription.wait_for(container.init.pid());
        drop(subscription);
        events::publish_create(&self.events, request, &container);
        self.watch_exit(&container, &container.init, exit);
        Ok(container)
    }

    async fn release(&self, id: &ContainerId) {
        if let Err(error) = self.controller.release_container(id).await {
            tracing::warn!(%id, %error, "the controller has not released a container");
        }
    }

    /// Starts the first process of a container, and returns its pid.
    pub(super) fn start_container(&self, container: &Container) -> Result<i32, TaskError> {
        let start = Instant::now();
        if let Some(oom) = &self.oom
            && let Err(error) = oom.watch(container.id.as_str(), &container.cgroup)
        {
            tracing::debug!(%error, "running out of memory will not be reported");
        }
        let pid = container.start()?;
        events::publish_start(&self.events, container, pid);
        self.events.record_timing(container.id.as_str(), Phase::PHASE_START, start.elapsed());
        Ok(pid)
    }

    /// Starts a process that has been added to a container, and returns its pid.
    pub(super) async fn start_exec(
        &self,
        container: &Arc<Container>,
        exec_id: &str,
    ) -> Result<i32, TaskError> {
        let subscription = self.reaper.subscribe();
        let process = container.start_exec(&self.reaper, &self.streams, exec_id).await?;
        let exit = subscription.wait_for(process.pid());
        drop(subscription);
        events::publish_exec_started(&self.events, container, &process);
        let pid = process.pid();
        self.watch_exit(container, &process, exit);
        Ok(pid)
    }

    /// Deletes a container, and returns it.
    pub(super) async fn delete_container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let container = self.container(id)?;
        container.delete().await?;
        self.release(&container.id).await;
        self.containers().remove(&container.id);
        Ok(container)
    }
}
