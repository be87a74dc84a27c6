//! Making a running machine fit what its containers may use.

use std::{path::PathBuf, sync::Arc, time::Duration};

use pericarp_protos::{id::ContainerId, ttrpc};
use thiserror::Error;

use super::{PodError, containers::ContainerError, task::PodTask};
use crate::{
    guest::Agent,
    host::{
        cgroup,
        cpuset::CpuSet,
        oom,
        size::{self, CpuAndMemory, Limits, Size},
    },
    telemetry::error_chain::chain,
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

impl PodTask {
    /// Makes the machine fit what the pod may use now. On an error the pod is as it was.
    pub(super) async fn resize(
        &mut self,
        limits: CpuAndMemory,
        overhead: CpuAndMemory,
    ) -> Result<(), PodError> {
        let (pod, phase) = (self.pod.title(), self.life.phase());
        let Some(running) = self.life.running_mut() else { return Err(PodError::NotRunning { pod, phase }) };
        let before = running.resources;
        let (limits_before, size_before) = (self.all_limits(), self.wanted_size());
        if let Some(running) = self.life.running_mut() {
            running.resources.limits = limits;
            running.resources.overhead = overhead;
        }
        let resized = self.refit(&limits_before, size_before).await;
        if resized.is_err()
            && let Some(running) = self.life.running_mut()
        {
            running.resources = before;
        }
        if resized.is_ok() {
            self.record_resources().await;
        }
        resized.map_err(|source| PodError::Resize { pod, source })
    }

    /// Puts on record what the pod may use now, for the next controller.
    async fn record_resources(&self) {
        let Some(running) = self.life.running() else { return };
        let (pod, resources) = (Arc::clone(&self.pod), running.resources);
        let written =
            self.pod.blocking.run(move || pod.record.change(|record| record.resources = Some(resources)));
        if let Err(error) = written.await {
            tracing::warn!(pod = self.pod.id(), %error, "the pod's new size is not on record");
        }
    }

    /// Makes the machine fit its containers, of which `id` has these limits. On an error the pod is as it was.
    pub(super) async fn fit_limits(
        &mut self,
        id: &ContainerId,
        limits: Limits,
    ) -> Result<(), ContainerError> {
        self.look_up_limits(id).await?;
        let (limits_before, size_before) = (self.all_limits(), self.wanted_size());
        let running = self.life.running_mut().ok_or(ContainerError::Ended)?;
        let before = running.limits.insert(id.clone(), limits);
        let fitted = self.refit(&limits_before, size_before).await;
        if fitted.is_err()
            && let Some(running) = self.life.running_mut()
        {
            match before {
                Some(before) => running.limits.insert(id.clone(), before),
                None => running.limits.remove(id),
            };
        }
        Ok(fitted?)
    }

    /// Looks up what the other containers may use, of whom a controller that has taken the pod over knows nothing.
    async fn look_up_limits(&mut self, except: &ContainerId) -> Result<(), ContainerError> {
        let share = self.pod.share();
        let containers = self.pod.blocking.run(move || share.containers()).await;
        for other in containers.iter().filter(|other| *other != except) {
            let running = self.life.running().ok_or(ContainerError::Ended)?;
            if !running.limits.contains_key(other)
                && let Ok(request) = self.pod.look_up(other).await
                && let Some(running) = self.life.running_mut()
            {
                running.limits.insert(other.clone(), request.limits());
            }
        }
        Ok(())
    }

    pub(super) fn forget_limits(&mut self, id: &ContainerId) {
        if let Some(running) = self.life.running_mut() {
            running.limits.remove(id);
        }
    }

    pub(super) fn all_limits(&self) -> Vec<Limits> {
        self.life.running().map(|running| running.limits.values().cloned().collect()).unwrap_or_default()
    }

    /// The size that the machine should have for what pod and containers may use.
    fn wanted_size(&self) -> Result<Size, size::Error> {
        let pod = &self.pod;
        let resources = self.life.running().map_or(pod.spec.resources, |running| running.resources);
        let environment = &pod.environment;
        Size::fitting(pod.size, &resources, &self.all_limits(), &environment.config, environment.capacity)
    }

    /// Makes the machine fit what has just been changed, or as it was before: with those limits and that size.
    async fn refit(
        &mut self,
        limits_before: &[Limits],
        size_before: Result<Size, size::Error>,
    ) -> Result<(), ResizeError> {
        let size = self.wanted_size()?;
        if let Err(error) = self.become_size(size, &self.all_limits()).await {
            // Where nothing is known of the size, because another controller has set it, this is what it should be.
            let known = self.life.running().and_then(|running| running.size);
            let size = known.or(size_before.ok()).unwrap_or(self.pod.size);
            self.roll_back(size, limits_before).await;
            return Err(error);
        }
        Ok(())
    }

    /// Changes what has to be changed. On an error, some of it may have been.
    async fn become_size(&mut self, size: Size, containers: &[Limits]) -> Result<(), ResizeError> {
        let now = self.life.running().and_then(|running| running.size);
        if now != Some(size) {
            self.set_size(size, now.unwrap_or(self.pod.size)).await?;
        }
        self.pin(containers).await?;
        self.set_oom_score(containers)?;
        if let Some(running) = self.life.running_mut() {
            running.size = Some(size);
        }
        self.publish(|_| ());
        if now != Some(size) {
            let Size { vcpus, memory_mib } = size;
            self.pod.caused_by_guest(|| {
                tracing::info!(pod = self.pod.id(), vcpus, memory_mib, "machine resized");
            });
        }
        Ok(())
    }

    /// Undoes what a resize that failed may have done.
    async fn roll_back(&mut self, size: Size, containers: &[Limits]) {
        if let Some(running) = self.life.running_mut() {
            // Unknown, so that all of it is set again, if not now then by the next resize.
            running.size = None;
            running.pinned = None;
        }
        if let Err(error) = self.become_size(size, containers).await {
            let error = chain(&error);
            let Size { vcpus, memory_mib } = size;
            self.pod.caused_by_guest(|| {
                let pod = self.pod.id();
                tracing::warn!(pod, vcpus, memory_mib, error, "the machine cannot be given back its size");
            });
        }
    }

    /// Keeps the machine on the host's CPUs and memory nodes that its containers may use together.
    async fn pin(&mut self, containers: &[Limits]) -> Result<(), ResizeError> {
        let cpus = CpuSet::together(containers.iter().map(|container| &container.cpus));
        let mems = CpuSet::together(containers.iter().map(|container| &container.mems));
        let wanted = (cpus, mems);
        if self.life.running().is_none_or(|running| running.pinned.as_ref() == Some(&wanted)) {
            return Ok(());
        }
        if let Some(cgroup) = self.owned.cgroup() {
            let (cpus, mems) = (wanted.0.to_string(), wanted.1.to_string());
            let pinned = self.pod.blocking.run({
                let (cgroup, cpus, mems) = (cgroup.clone(), cpus.clone(), mems.clone());
                move || cgroup::pin(&cgroup, &cpus, &mems)
            });
            pinned.await.map_err(|source| ResizeError::Pin { cpus, mems, cgroup, source })?;
        }
        if let Some(running) = self.life.running_mut() {
            running.pinned = Some(wanted);
        }
        Ok(())
    }

    /// Has the host's kernel kill the machine when it would kill its containers.
    pub(super) fn set_oom_score(&self, containers: &[Limits]) -> Result<(), ResizeError> {
        let number = oom::of_machine(containers.iter().map(|container| container.oom_score_adj));
        match (number, self.life.running()) {
            (Some(number), Some(running)) => {
                let pid = running.pid;
                oom::set(pid, number).map_err(|source| ResizeError::OomScore { number, pid, source })
            }
            _ => Ok(()),
        }
    }

    /// Has machine and guest take on a size.
    async fn set_size(&self, size: Size, before: Size) -> Result<(), ResizeError> {
        let Size { vcpus, memory_mib } = size;
        let machine_error = |source| ResizeError::Machine { vcpus, memory_mib, source };
        let machine = &self.pod.control;
        let answer = machine.resize(vcpus, u64::from(memory_mib) << 20).await.map_err(machine_error)?;
        let agent = Agent::connect(&self.pod.files.vsock()).await.map_err(ResizeError::Agent)?;
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
                self.pod.caused_by_guest(|| {
                    tracing::warn!(pod = self.pod.id(), %error, "the guest has not given back its memory yet");
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
