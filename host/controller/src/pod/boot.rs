//! Starting a pod.

use std::{
    fs::DirBuilder,
    io,
    os::unix::{fs::DirBuilderExt as _, net::UnixListener},
    path::Path,
    sync::Arc,
};

use pericarp_protos::{guest, ttrpc};
use pericarp_vmm::{
    ConsoleConfig, MachineConfig, NetConfig, PortForward, ShareConfig, VsockConfig, monotonic_ns,
};
use thiserror::Error;

use super::{
    Ended, Phase, Pod, PodError,
    record::{End, Record, Stage},
};
use crate::{
    cgroup::{self, Cgroup},
    errors::chain,
    fault,
    guest::{
        Agent,
        ready::{self, Ready},
    },
    machine::{self, Exit, Machine, file},
    mounts, nested,
    network::NetworkError,
    share::Share,
    size::Size,
    undo::Undo,
    user_namespace::UserNamespaceError,
};

/// vCPUs that a machine can grow to unless it starts with more: each that it might have costs its guest memory.
const VCPUS_MAX: u8 = 8;
/// Bytes of a log that an error quotes.
const QUOTE_MAX: u64 = 600;

/// A pod's machine cannot be started.
#[derive(Debug, Error)]
pub enum BootError {
    #[error("cannot make its {what}")]
    Make {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("its containers cannot have the pod's user namespace")]
    UserNamespace(#[from] UserNamespaceError),
    #[error("its machine cannot be given the pod's network")]
    Network(#[source] NetworkError),
    #[error("the machine ended before its guest was ready: {message}")]
    MachineEnded { message: String },
    #[error("the guest was not ready after {seconds} s; the last it printed: {console:?}")]
    NotReady { seconds: u64, console: String },
    #[error("the guest's agent cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the guest's agent does not make the guest into the pod")]
    Configure(#[source] ttrpc::Error),
}

fn make(what: &'static str) -> impl FnOnce(io::Error) -> BootError {
    move |source| BootError::Make { what, source }
}

impl Pod {
    /// Starts the machine and makes its guest into the pod. On an error nothing is left of it, or what cannot be undone yet
    /// is kept for [`Pod::shutdown`]: see [`Pod::is_undone`].
    pub async fn start(self: &Arc<Self>) -> Result<(), PodError> {
        let start = monotonic_ns();
        let _lifecycle = self.lifecycle.lock().await;
        {
            let mut state = self.state();
            if state.phase != Phase::Created {
                return Err(PodError::Phase { pod: self.name(), phase: state.phase.clone() });
            }
            state.phase = Phase::Starting;
            state.marks.start = start;
        }
        let booted = self.boot().await;
        match booted {
            Ok(pid) => {
                let mut state = self.state();
                state.marks.end = monotonic_ns();
                // A machine that ended in this instant keeps its end.
                if state.phase == Phase::Starting {
                    state.phase = Phase::Running { pid };
                }
                drop(state);
                self.report_timeline();
                Ok(())
            }
            Err(source) => {
                self.state().phase = Phase::Ended;
                if let Err(error) = self.undo_all().await {
                    tracing::error!(pod = self.id, %error, "cannot undo a failed start");
                }
                Err(PodError::Boot { pod: self.name(), source })
            }
        }
    }

    async fn boot(self: &Arc<Self>) -> Result<u32, BootError> {
        // Rather than when the first container needs it.
        self.user_namespace()?;
        let mut network = self.set_up_network().await?;
        fault::point("network-made");
        let forward = self.take_forward(&mut network);
        let (machine, host_listener) = self.make_machine(std::mem::take(&mut network.nets), forward)?;
        let pid = machine.pid();
        self.watch(machine);
        let (ready, ready_at) = self.wait_until_ready(host_listener).await?;
        fault::point("guest-ready");
        let agent = Agent::connect(&self.directory.join(file::VSOCK)).await.map_err(BootError::Connect)?;
        let limit = self.node.config.ready_timeout();
        agent.configure(&self.configuration(network), limit).await.map_err(BootError::Configure)?;
        {
            let mut state = self.state();
            state.marks.ready = ready_at;
            state.guest_kernel = ready.kernel;
            state.marks.since_init = u64::try_from(ready.since_init.as_nanos()).unwrap_or(0);
            state.marks.configured = monotonic_ns();
        }
        self.serve_requests();
        self.follow_events();
        self.watch_network();
        self.write_record(pid, Stage::Running).map_err(make("state file"))?;
        fault::point("pod-recorded");
        Ok(pid)
    }

    /// Makes everything on the host that the machine needs, and the machine. What is made is undone by the
    /// pod's undo lists.
    fn make_machine(
        &self,
        nets: Vec<NetConfig>,
        forward: Option<PortForward>,
    ) -> Result<(Machine, UnixListener), BootError> {
        let directory = &self.directory;
        DirBuilder::new().mode(0o700).create(directory).map_err(make("directory"))?;
        self.state().directory = self.undo_directory();
        fault::point("directory-made");

        let mut running = std::mem::take(&mut self.state().running);
        let made = self.spawn(&mut running, nets, forward);
        // Registered before any error is returned, so that it is undone.
        self.state().running = running;
        made
    }

    fn spawn(
        &self,
        running: &mut Undo,
        nets: Vec<NetConfig>,
        forward: Option<PortForward>,
    ) -> Result<(Machine, UnixListener), BootError> {
        let directory = &self.directory;
        let share = Share::at(directory.join(file::SHARE));
        running.push("remove the pod's share", {
            let share = share.clone();
            move || share.remove().map_err(|error| io::Error::other(chain(&error)))
        });
        share
            .create()
            .map_err(|error| BootError::Make { what: "share", source: io::Error::other(chain(&error)) })?;
        let control = machine::bind(&directory.join(file::CONTROL)).map_err(make("control socket"))?;
        let host_service =
            machine::bind(&host_service_path(directory)).map_err(make("host service socket"))?;
        let parent = self.config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str());
        let cgroup = Cgroup::make(parent, &self.sandbox).map_err(make("cgroup"))?;
        let entrance = match &cgroup {
            Some(cgroup) => {
                let path = cgroup.path().to_owned();
                self.state().cgroup = Some(path.clone());
                running.push("remove the pod's cgroup", move || cgroup::remove(&path));
                Some(cgroup.entrance().map_err(make("cgroup"))?)
            }
            None => None,
        };
        let config = self.machine_config(nets);
        let (machine, pidfd) = Machine::spawn(directory, &config, &control, forward.as_ref(), entrance)
            .map_err(make("machine process"))?;
        fault::point("machine-spawned");
        // The machine's alone: it ends with it.
        drop(forward);
        running.push("end the pod's machine", move || machine::kill(&pidfd));
        // From here a controller that starts after a crash finds the machine and ends it.
        self.write_record(machine.pid(), Stage::Starting).map_err(make("state file"))?;
        fault::point("machine-recorded");
        Ok((machine, host_service))
    }

    pub(super) fn write_record(&self, pid: u32, stage: Stage) -> io::Result<()> {
        Record::of(self, pid, stage)?.write(&self.directory)
    }

    /// The step that removes the pod's directory.
    pub(super) fn undo_directory(&self) -> Undo {
        let mut undo = Undo::default();
        let directory = self.directory.clone();
        undo.push("remove the pod's directory", move || Ok(mounts::remove_tree(&directory)?));
        undo
    }

    fn machine_config(&self, nets: Vec<NetConfig>) -> MachineConfig {
        let config = &self.node.config;
        let most = Size::most(config, self.node.host);
        MachineConfig {
            id: self.id.clone(),
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            cmdline: config.kernel_cmdline.clone(),
            vcpus: self.size.vcpus,
            vcpus_max: most.vcpus.min(VCPUS_MAX),
            memory_mib: self.size.memory_mib,
            memory_max_mib: most.memory_mib,
            disk_slots: MachineConfig::DISK_SLOTS,
            // What is refused was refused when the pod was new.
            nested_virtualization: nested::of(&self.config, config).unwrap_or(false),
            console: ConsoleConfig {
                path: self.directory.join(file::CONSOLE),
                limit_bytes: config.console_limit_kib << 10,
            },
            vsock: VsockConfig {
                path: self.directory.join(file::VSOCK),
                host_ports: vec![guest::HOST_PORT],
                forward_port: Some(guest::FORWARD_PORT),
            },
            share: Some(ShareConfig {
                tag: guest::SHARE_TAG.into(),
                directory: self.directory.join(file::SHARE),
            }),
            nets,
        }
    }

    /// Waits for the agent's first word; answers with the time of it, too. From then on nobody in the guest reaches the host.
    async fn wait_until_ready(&self, listener: UnixListener) -> Result<(Ready, u64), BootError> {
        let timeout = self.node.config.ready_timeout();
        let ready = tokio::select! {
            ready = ready::receive(listener) => ready.map_err(make("host service"))?,
            _ended = self.wait() => return Err(self.machine_ended()),
            () = tokio::time::sleep(timeout) => {
                let console = machine::last_printed(&self.directory.join(file::CONSOLE));
                return Err(BootError::NotReady { seconds: timeout.as_secs(), console });
            }
        };
        let at = monotonic_ns();
        std::fs::remove_file(host_service_path(&self.directory)).map_err(make("host service"))?;
        Ok((ready, at))
    }

    fn machine_ended(&self) -> BootError {
        BootError::MachineEnded { message: self.last_words(self.cgroup().as_deref()) }
    }

    /// Why the machine ended, in its own last words if it had any. `cgroup` is the machine's, if it was in one.
    pub(super) fn last_words(&self, cgroup: Option<&Path>) -> String {
        if let Some(words) = self.own_last_words() {
            return words;
        }
        if cgroup.is_some_and(cgroup::was_out_of_memory) {
            return "the host has killed it because the pod's cgroup was out of memory: give the pod more, or its \
                    containers less"
                .to_owned();
        }
        let console = machine::last_printed(&self.directory.join(file::CONSOLE));
        format!("the last its guest printed: {console:?}")
    }

    /// The error with which the machine has ended by itself.
    pub(super) fn own_last_words(&self) -> Option<String> {
        let log = machine::tail(&self.directory.join(file::LOG), QUOTE_MAX);
        log.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(str::to_owned)
    }

    /// Records the end of the machine when it comes.
    pub(super) fn watch(self: &Arc<Self>, machine: Machine) {
        self.state().watched = true;
        let pod = self.clone();
        tokio::spawn(async move {
            let exit = pod.outlive(&machine).await.unwrap_or(Exit::Unknown);
            let expected = pod.has_ended(exit);
            // Nothing of it is of use any more. A start that failed cleans up by itself before this.
            if !expected && let Err(error) = pod.stop().await {
                tracing::error!(pod = pod.id, error = chain(&error), "cannot clean up after a machine");
            }
        });
    }

    /// Waits for the end of the machine, and brings it about when the pod is stopped or the guest is stuck.
    async fn outlive(&self, machine: &Machine) -> io::Result<Exit> {
        tokio::select! {
            exit = machine.exited() => return exit,
            () = self.stopping.notified() => {}
            silent = self.falls_silent() => {
                let reason = format!("the guest has given no answer for {} s", silent.as_secs());
                tracing::warn!(pod = self.id, reason, "a stuck machine is ended");
                self.state().reason = Some(reason);
            }
        }
        if let Err(error) = machine.signal_kill() {
            tracing::error!(pod = self.id, %error, "cannot end a machine");
        }
        machine.exited().await
    }

    /// Answers whether that was to be expected.
    fn has_ended(&self, exit: Exit) -> bool {
        let mut state = self.state();
        let expected = state.phase == Phase::Ended;
        state.phase = Phase::Ended;
        if expected {
            tracing::info!(pod = self.id, ?exit, "machine stopped");
        } else {
            let words = self.last_words(state.cgroup.as_deref());
            tracing::warn!(pod = self.id, ?exit, words, "machine ended unexpectedly");
            // A stuck guest's is known.
            state.reason.get_or_insert_with(|| format!("the machine ended unexpectedly ({exit:?}): {words}"));
        }
        let reason = state.reason.clone();
        drop(state);
        fault::point("machine-ended");
        let ended = Ended { exit, at: std::time::SystemTime::now() };
        self.record_end(End::new(ended, reason));
        fault::point("end-recorded");
        self.ended.send_replace(Some(ended));
        expected
    }

    /// For a controller that is started before containerd has removed the pod.
    fn record_end(&self, end: End) {
        let written =
            Record::read(&self.directory).map_err(io::Error::other).and_then(|record| match record {
                Some(record) => record.with_end(end).write(&self.directory),
                None => Ok(()),
            });
        if let Err(error) = written {
            tracing::warn!(pod = self.id, %error, "the end of a machine is not on record");
        }
    }

    /// Asks the machine for its part of the timeline, after containerd has its answer.
    fn report_timeline(self: &Arc<Self>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let status = machine::status(&pod.directory).await;
            match (pod.timeline(status.as_ref().ok()), status) {
                (Some(timeline), _) => {
                    tracing::info!(pod = pod.id, name = pod.name(), ?timeline, "pod started");
                }
                // It was stopped right away.
                _ if pod.end().is_some() => {}
                (None, Err(error)) => {
                    tracing::warn!(pod = pod.id, %error, "pod started, its machine tells no times");
                }
                (None, Ok(_)) => tracing::warn!(pod = pod.id, "pod started, its machine tells no times"),
            }
        });
    }
}

/// Where the agent's first word arrives.
pub(super) fn host_service_path(directory: &Path) -> std::path::PathBuf {
    directory.join(format!("{}_{}", file::VSOCK, guest::HOST_PORT))
}
