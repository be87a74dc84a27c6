//! Containers: how a test describes one, and what it can ask of it.

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use tonic::Status;

use crate::{
    Pod, api,
    cri::{
        log::Log,
        streams::{Session, Terminal},
    },
    wait_until,
};

/// The image of the tests, made by `make-images` and imported before they run.
pub const BUSYBOX: &str = "localhost/pericarp/busybox:1";

/// The image [`BUSYBOX`] with USR1 as its stop signal.
pub const BUSYBOX_USR1: &str = "localhost/pericarp/busybox-usr1:1";

/// Paths that kubelet asks to be hidden from a container that is not privileged.
const MASKED_PATHS: [&str; 9] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
/// Paths that kubelet asks to be read-only for a container that is not privileged.
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Describes a container as kubelet would.
#[derive(Clone, Debug)]
pub struct ContainerBuilder {
    pod: Pod,
    config: api::ContainerConfig,
}

/// A container that was created.
#[derive(Clone, Debug)]
pub struct Container {
    /// The container's id.
    pub id: String,
    log_path: PathBuf,
    pod: Pod,
}

/// The output and exit code of a command that ran inside a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Its standard output.
    pub stdout: String,
    /// Its standard error; empty if the command had a terminal, which puts it into `stdout`.
    pub stderr: String,
    /// Its exit code.
    pub exit_code: i32,
}

impl ContainerBuilder {
    pub(crate) fn new(pod: &Pod, name: &str) -> Self {
        let namespaces = pod
            .config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.clone());
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(api::ImageSpec { image: BUSYBOX.to_owned(), ..Default::default() }),
            command: vec!["sleep".to_owned(), "infinity".to_owned()],
            log_path: format!("{name}/0.log"),
            linux: Some(api::LinuxContainerConfig {
                resources: Some(api::LinuxContainerResources::default()),
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: namespaces,
                    masked_paths: MASKED_PATHS.map(str::to_owned).into(),
                    readonly_paths: READONLY_PATHS.map(str::to_owned).into(),
                    seccomp: Some(api::SecurityProfile {
                        profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        };
        Self { pod: pod.clone(), config }
    }

    /// The UID of the container's pod in Kubernetes.
    pub fn pod_uid(&self) -> String {
        self.pod.uid()
    }

    /// Leaves out everything except name, image and command, as critest, the validation suite of CRI, does.
    #[must_use]
    pub fn minimal(mut self) -> Self {
        self.config = api::ContainerConfig {
            metadata: self.config.metadata.map(|metadata| api::ContainerMetadata { attempt: 2, ..metadata }),
            image: self.config.image,
            command: vec!["top".to_owned()],
            linux: Some(api::LinuxContainerConfig::default()),
            ..Default::default()
        };
        self
    }

    /// The command, without a shell.
    #[must_use]
    pub fn command<const N: usize>(mut self, command: [&str; N]) -> Self {
        self.config.command = command.map(str::to_owned).into();
        self
    }

    /// A shell script as the command.
    #[must_use]
    pub fn script(self, script: &str) -> Self {
        self.command(["sh", "-c", script])
    }

    /// Another image than [`BUSYBOX`].
    #[must_use]
    pub fn image(mut self, image: &str) -> Self {
        image.clone_into(&mut self.config.image.get_or_insert_default().image);
        self
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(api::KeyValue { key: key.to_owned(), value: value.into() });
        self
    }

    /// Adds a bind volume.
    #[must_use]
    pub fn mount(mut self, host_path: &str, container_path: &str, readonly: bool) -> Self {
        self.config.mounts.push(api::Mount {
            host_path: host_path.to_owned(),
            container_path: container_path.to_owned(),
            readonly,
            ..Default::default()
        });
        self
    }

    /// Limits and shares.
    #[must_use]
    pub fn resources(mut self, resources: api::LinuxContainerResources) -> Self {
        self.config.linux.get_or_insert_default().resources = Some(resources);
        self
    }

    /// Changes anything that has no method of its own.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut api::ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the security context.
    #[must_use]
    pub fn with_security(mut self, change: impl FnOnce(&mut api::LinuxContainerSecurityContext)) -> Self {
        change(self.config.linux.get_or_insert_default().security_context.get_or_insert_default());
        self
    }

    /// `CreateContainer`.
    pub async fn create(self) -> Result<Container> {
        Box::pin(self.try_create()).await.context("CreateContainer")
    }

    /// `CreateContainer`, with the call's own error for tests of errors.
    pub async fn try_create(self) -> Result<Container, Status> {
        let log_path = self.pod.log_directory().join(&self.config.log_path);
        if let Some(directory) = log_path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config),
            sandbox_config: Some(self.pod.config.clone()),
        };
        let id = self.pod.node.cri.runtime().create_container(request).await?.into_inner().container_id;
        Ok(Container { id, log_path, pod: self.pod })
    }

    /// `CreateContainer` and `StartContainer`.
    pub async fn start(self) -> Result<Container> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }

    /// Starts the container, and waits until it has exited.
    pub async fn run(self) -> Result<(api::ContainerStatus, Log)> {
        let container = self.start().await?;
        let status = container.wait_for_exit().await?;
        Ok((status, container.log()?))
    }
}

impl Container {
    /// `StartContainer`.
    pub async fn start(&self) -> Result<()> {
        self.try_start().await.context("StartContainer")
    }

    /// `StartContainer`, with the call's own error for tests of errors.
    pub async fn try_start(&self) -> Result<(), Status> {
        let request = api::StartContainerRequest { container_id: self.id.clone() };
        self.pod.node.cri.runtime().start_container(request).await.map(drop)
    }

    /// `ContainerStatus`.
    pub async fn status(&self) -> Result<api::ContainerStatus> {
        let request = api::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let response =
            self.pod.node.cri.runtime().container_status(request).await.context("ContainerStatus")?;
        response.into_inner().status.context("ContainerStatus returned no status")
    }

    /// Waits until the container has exited, by asking for its status as kubelet does. (CRI's event stream is an alpha
    /// feature.)
    pub async fn wait_for_exit(&self) -> Result<api::ContainerStatus> {
        let mut last = None;
        wait_until(&format!("container {} to exit", self.id), async || {
            let status = self.status().await;
            // To be told nothing of the container is an error, and none to wait out.
            let is_over =
                status.as_ref().map_or(true, |status| status.state() == api::ContainerState::ContainerExited);
            last = Some(status);
            Ok(is_over)
        })
        .await?;
        last.context("it was not asked for its status")?
    }

    /// Waits until the container has written exactly `stdout` to its standard output.
    pub async fn wait_for_output(&self, stdout: &str) -> Result<()> {
        let what = format!("{stdout:?} from container {}", self.id);
        wait_until(&what, async || Ok(self.log()?.stdout() == stdout)).await
    }

    /// `ExecSync` without a time limit.
    pub async fn exec<const N: usize>(&self, command: [&str; N]) -> Result<ExecOutput> {
        self.try_exec(command, Duration::ZERO).await.with_context(|| format!("ExecSync {command:?}"))
    }

    /// `ExecSync` of a shell script that must succeed; returns its output.
    pub async fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(["sh", "-c", script]).await?;
        if output.exit_code != 0 {
            bail!("{script:?} in the container: {output:?}");
        }
        Ok(output.stdout.trim_end().to_owned())
    }

    /// `ExecSync`, with the call's own error for tests of errors. A `limit` of zero means none.
    pub async fn try_exec<const N: usize>(
        &self,
        command: [&str; N],
        limit: Duration,
    ) -> Result<ExecOutput, Status> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.map(str::to_owned).into(),
            timeout: limit.as_secs().try_into().unwrap_or(i64::MAX),
        };
        let response = self.pod.node.cri.runtime().exec_sync(request).await?.into_inner();
        Ok(ExecOutput {
            stdout: String::from_utf8_lossy(&response.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&response.stderr).into_owned(),
            exit_code: response.exit_code,
        })
    }

    /// `Exec`: a command with streams that stay open.
    pub async fn exec_stream<const N: usize>(
        &self,
        command: [&str; N],
        terminal: Terminal,
    ) -> Result<Session> {
        let request = api::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.map(str::to_owned).into(),
            tty: terminal == Terminal::Yes,
            stdin: true,
            stdout: true,
            stderr: terminal == Terminal::No,
        };
        let response = self.pod.node.cri.runtime().exec(request).await.context("Exec")?;
        Session::open(&response.into_inner().url).await
    }

    /// `Exec` without input and without a terminal; waits for the end of the command.
    pub async fn exec_output<const N: usize>(&self, command: [&str; N]) -> Result<ExecOutput> {
        let request = api::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.map(str::to_owned).into(),
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let response = self.pod.node.cri.runtime().exec(request).await.context("Exec")?;
        Session::open(&response.into_inner().url).await?.wait_for_end().await
    }

    /// `Attach`: the streams of the container's own process.
    pub async fn attach(&self, terminal: Terminal) -> Result<Session> {
        let request = api::AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            tty: terminal == Terminal::Yes,
            stdout: true,
            stderr: terminal == Terminal::No,
        };
        let response = self.pod.node.cri.runtime().attach(request).await.context("Attach")?;
        Session::open(&response.into_inner().url).await
    }

    /// `StopContainer`: the stop signal, then KILL after `grace` seconds.
    pub async fn stop(&self, grace: i64) -> Result<()> {
        let request = api::StopContainerRequest { container_id: self.id.clone(), timeout: grace };
        self.pod.node.cri.runtime().stop_container(request).await.context("StopContainer")?;
        Ok(())
    }

    /// `RemoveContainer`.
    pub async fn remove(&self) -> Result<()> {
        let request = api::RemoveContainerRequest { container_id: self.id.clone() };
        self.pod.node.cri.runtime().remove_container(request).await.context("RemoveContainer")?;
        Ok(())
    }

    /// `UpdateContainerResources`.
    pub async fn update(&self, resources: api::LinuxContainerResources) -> Result<()> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources),
            ..Default::default()
        };
        let mut runtime = self.pod.node.cri.runtime();
        runtime.update_container_resources(request).await.context("UpdateContainerResources")?;
        Ok(())
    }

    /// `ContainerStats`.
    pub async fn stats(&self) -> Result<api::ContainerStats> {
        let request = api::ContainerStatsRequest { container_id: self.id.clone() };
        let response =
            self.pod.node.cri.runtime().container_stats(request).await.context("ContainerStats")?;
        response.into_inner().stats.context("ContainerStats returned no statistics")
    }

    /// `ReopenContainerLog`.
    pub async fn reopen_log(&self) -> Result<()> {
        let request = api::ReopenContainerLogRequest { container_id: self.id.clone() };
        self.pod.node.cri.runtime().reopen_container_log(request).await.context("ReopenContainerLog")?;
        Ok(())
    }

    /// Where containerd writes the log.
    pub fn log_path(&self) -> &PathBuf {
        &self.log_path
    }

    /// The log as it is now.
    pub fn log(&self) -> Result<Log> {
        Log::read(&self.log_path)
    }
}
