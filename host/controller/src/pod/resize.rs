//! Making a running machine fit what its containers may use.

use std::{path::PathBuf, time::Duration};

use pericarp_protos::ttrpc;
use thiserror::Error;

use super::{Phase, Pod, containers::ContainerError};
use crate::{
    cgroup,
    cpuset::CpuSet,
    guest::Agent,
    machine::{Control, file},
    size::{self, Limits, Size},
};

/// How long the guest may take to plug memory: some hundred milliseconds per GiB.
const MEMORY_LIMIT: Duration = Duration::from_secs(20);

/// The machine cannot have another size.
#[derive(Debug, Error)]
pub enum ResizeError {
    #[error(transparent)]
    Size(#[from] size::Error),
    #[error("the machine does not take its new size of {vcpus} vCPUs and {memory_mib} MiB")]
    Machine {
        vcpus: u8,
        memory_mib: u32,
        #[source]
        source: ttrpc::Error,
    },
    #[error("the guest does not use its new size of {vcpus} vCPUs and {memory_mib} MiB")]
    Guest {
        vcpus: u8,
        memory_mib: u32,
        #[source]
        source: ttrpc::Error,
    },
    #[error("the guest uses {online} of the {vcpus} vCPUs that it has now")]
    Vcpus { vcpus: u8, online: u32 },
    #[error(
        "cgroup {cgroup:?}: the machine cannot be kept on CPUs {cpus:?} and memory nodes {mems:?} of the host"
    )]
    Pin {
        cpus: String,
        mems: String,
        cgroup: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the guest's agent cannot be reached")]
    Agent(#[source] std::io::Error),
}

impl Pod {
    /// The guest's hint that containerd has other limits for a container.
    pub(super) async fn fit_container(&self, id: &str) -> Result<(), ContainerError> {
        // As for any other request: the id is looked up, and the limits are containerd's, not the guest's.
        let record = self.look_up(id).await?;
        let share = self.share.lock().await;
        let Phase::Running { .. } = self.phase() else { return Err(ContainerError::Ended) };
        self.fit(id, Limits::of_spec(&record.spec), &share.containers()).await
    }

    /// Makes the machine fit its containers, of which `id` has these limits. The share is locked meanwhile, so that this
    /// is done by one at a time.
    pub(super) async fn fit(
        &self,
        id: &str,
        limits: Limits,
        containers: &[String],
    ) -> Result<(), ContainerError> {
        self.state().limits.insert(id.to_owned(), limits);
        // After a restart of the controller, nothing is known of those that were there before.
        for other in containers {
            if !self.state().limits.contains_key(other)
                && let Ok(record) = self.look_up(other).await
            {
                self.state().limits.insert(other.clone(), Limits::of_spec(&record.spec));
            }
        }
        let all: Vec<Limits> = self.state().limits.values().cloned().collect();
        let node = self.node();
        let size = Size::fitting(self.size, &self.config, &all, &node.config, node.host)
            .map_err(ResizeError::from)?;
        let now = self.state().size_now;
        if now != Some(size) {
            self.resize(size, now.unwrap_or(self.size)).await?;
            self.state().size_now = Some(size);
            tracing::info!(pod = self.id, ?size, "machine resized");
        }
        Ok(self.pin(&all)?)
    }

    /// Keeps the machine on the host's CPUs and memory nodes that its containers may use together.
    fn pin(&self, containers: &[Limits]) -> Result<(), ResizeError> {
        let cpus = CpuSet::together(containers.iter().map(|container| &container.cpus));
        let mems = CpuSet::together(containers.iter().map(|container| &container.mems));
        let wanted = (cpus, mems);
        if self.state().pinned.as_ref() == Some(&wanted) {
            return Ok(());
        }
        if let Some(cgroup) = self.cgroup() {
            let (cpus, mems) = &wanted;
            let (cpus, mems) = (cpus.to_string(), mems.to_string());
            cgroup::pin(&cgroup, &cpus, &mems).map_err(|source| ResizeError::Pin {
                cpus,
                mems,
                cgroup,
                source,
            })?;
        }
        self.state().pinned = Some(wanted);
        Ok(())
    }

    async fn resize(&self, size: Size, before: Size) -> Result<(), ResizeError> {
        let Size { vcpus, memory_mib } = size;
        let machine_error = |source| ResizeError::Machine { vcpus, memory_mib, source };
        let machine = Control::connect(&self.directory).await.map_err(machine_error)?;
        let answer = machine.resize(vcpus, u64::from(memory_mib) << 20).await.map_err(machine_error)?;
        let agent = Agent::connect(&self.directory.join(file::VSOCK)).await.map_err(ResizeError::Agent)?;
        let online = agent
            .resize(vcpus, answer.memory_device)
            .await
            .map_err(|source| ResizeError::Guest { vcpus, memory_mib, source })?;
        if online != u32::from(vcpus) {
            return Err(ResizeError::Vcpus { vcpus, online });
        }
        match machine.wait_memory(MEMORY_LIMIT).await {
            // The guest goes on giving back what it can; its containers' limits hold already.
            Err(error) if memory_mib <= before.memory_mib => {
                tracing::warn!(pod = self.id, %error, "the guest has not given back its memory yet");
                Ok(())
            }
            other => other.map_err(machine_error),
        }
    }
}
