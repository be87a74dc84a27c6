//! Making a running machine fit what its containers may use.

use std::{path::PathBuf, time::Duration};

use pericarp_protos::{id::ContainerId, ttrpc};
use thiserror::Error;

use super::{Phase, Pod, containers::ContainerError};
use crate::{
    cgroup,
    cpuset::CpuSet,
    errors::chain,
    guest::Agent,
    machine::{Control, file},
    oom,
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
    #[error(
        "the oom_score_adj of the machine, process {pid}, cannot be set to {number}; to lower it the controller needs \
         CAP_SYS_RESOURCE"
    )]
    OomScore {
        number: i64,
        pid: u32,
        #[source]
        source: std::io::Error,
    },
    #[error("the guest's agent cannot be reached")]
    Agent(#[source] std::io::Error),
}

/// The limits of a container, noted as its own. They are forgotten again unless it turns out that it can have them, also when
/// whoever waits for that has given up.
struct AskedFor<'a> {
    pod: &'a Pod,
    container: &'a ContainerId,
    /// What it had.
    before: Option<Limits>,
    stays: bool,
}

impl<'a> AskedFor<'a> {
    fn note(pod: &'a Pod, container: &'a ContainerId, limits: Limits) -> AskedFor<'a> {
        let before = pod.state().limits.insert(container.clone(), limits);
        AskedFor { pod, container, before, stays: false }
    }

    fn stays(mut self) {
        self.stays = true;
    }
}

impl Drop for AskedFor<'_> {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        let mut state = self.pod.state();
        match self.before.take() {
            Some(before) => state.limits.insert(self.container.clone(), before),
            None => state.limits.remove(self.container),
        };
    }
}

impl Pod {
    /// The guest's hint that containerd has other limits for a container.
    pub(super) async fn fit_container(&self, id: &ContainerId) -> Result<(), ContainerError> {
        // As for any other request: the id is looked up, and the limits are containerd's, not the guest's.
        let record = self.look_up(id).await?;
        let share = self.share.lock().await;
        let Phase::Running { .. } = self.phase() else { return Err(ContainerError::Ended) };
        self.fit(id, Limits::of_spec(&record.spec), &share.containers()).await
    }

    /// Makes the machine fit its containers, of which `id` has these limits. The share is locked meanwhile, so that this
    /// is done by one at a time. On an error the pod is as it was.
    pub(super) async fn fit(
        &self,
        id: &ContainerId,
        limits: Limits,
        containers: &[ContainerId],
    ) -> Result<(), ContainerError> {
        // After a restart of the controller, nothing is known of those that were there before.
        for other in containers.iter().filter(|other| *other != id) {
            if !self.state().limits.contains_key(other)
                && let Ok(record) = self.look_up(other).await
            {
                self.state().limits.insert(other.clone(), Limits::of_spec(&record.spec));
            }
        }
        let before = self.all_limits();
        let asked_for = AskedFor::note(self, id, limits);
        let wanted = self.all_limits();
        let size = self.fitting(&wanted).map_err(ResizeError::from)?;
        if let Err(error) = self.become_size(size, &wanted).await {
            // Where nothing is known of the size, because another controller has set it, this is what it should be.
            let size = self.state().size_now.or_else(|| self.fitting(&before).ok()).unwrap_or(self.size);
            self.roll_back(size, &before).await;
            return Err(error.into());
        }
        asked_for.stays();
        Ok(())
    }

    pub(super) fn all_limits(&self) -> Vec<Limits> {
        self.state().limits.values().cloned().collect()
    }

    fn fitting(&self, containers: &[Limits]) -> Result<Size, size::Error> {
        Size::fitting(self.size, &self.config, containers, &self.node.config, self.node.host)
    }

    /// Changes what has to be changed. On an error, some of it may have been.
    async fn become_size(&self, size: Size, containers: &[Limits]) -> Result<(), ResizeError> {
        let now = self.state().size_now;
        if now != Some(size) {
            self.resize(size, now.unwrap_or(self.size)).await?;
        }
        self.pin(containers)?;
        self.set_oom_score(containers)?;
        self.state().size_now = Some(size);
        if now != Some(size) {
            self.caused_by_guest(|| tracing::info!(pod = self.id, ?size, "machine resized"));
        }
        Ok(())
    }

    /// Undoes what a resize that failed may have done.
    async fn roll_back(&self, size: Size, containers: &[Limits]) {
        {
            // Unknown, so that all of it is set again, if not now then by the next resize.
            let mut state = self.state();
            state.size_now = None;
            state.pinned = None;
        }
        if let Err(error) = self.become_size(size, containers).await {
            let error = chain(&error);
            self.caused_by_guest(|| {
                tracing::warn!(pod = self.id, ?size, error, "the machine cannot be given back its size");
            });
        }
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

    /// Has the host's kernel kill the machine when it would kill its containers.
    pub(super) fn set_oom_score(&self, containers: &[Limits]) -> Result<(), ResizeError> {
        let number = oom::of_machine(containers.iter().map(|container| container.oom_score_adj));
        match (number, self.phase()) {
            (Some(number), Phase::Running { pid }) => {
                oom::set(pid, number).map_err(|source| ResizeError::OomScore { number, pid, source })
            }
            _ => Ok(()),
        }
    }

    /// Has machine and guest take on a size.
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
                self.caused_by_guest(|| {
                    tracing::warn!(pod = self.id, %error, "the guest has not given back its memory yet");
                });
                Ok(())
            }
            other => other.map_err(machine_error),
        }
    }
}

#[cfg(test)]
#[path = "resize_tests.rs"]
mod tests;
