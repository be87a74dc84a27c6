//! Starting a pod: what its machine needs on the host, the machine, and its guest.

use std::{
    fs::DirBuilder,
    io,
    os::{
        fd::OwnedFd,
        unix::{fs::DirBuilderExt as _, net::UnixStream},
    },
    pin::pin,
    sync::Arc,
    time::Duration,
};

use pericarp_protos::{guest, ttrpc};
use pericarp_vmm::{
    ConsoleConfig, InheritedDescriptors, MachineConfig, NetConfig, PortForward, ShareConfig, VsockConfig,
    VsockSockets, monotonic_ns,
};
use thiserror::Error;
use tokio::time::{Instant, sleep};

use super::{
    Pod,
    boot_queue::BootPlace,
    files::PodFiles,
    life::Running,
    owned::Resource,
    record::Stage,
    start_budget::{Exceeded, StartBudget},
    task::{PodTask, Reply},
};
use crate::{
    config::rate_limits,
    fault::FaultPoint,
    guest::{
        Agent,
        ready::{self, Ready},
    },
    host::{
        cgroup::{self, Cgroup},
        machine::{self, Machine},
        machine_times::{MachineTimes, Times},
        network::{self, NetworkError, PodNetwork},
        process::Process,
        size::Size,
        user_namespace::{UserNamespace, UserNamespaceError},
    },
    telemetry::error_chain::chain,
};

/// vCPUs that a machine can grow to unless it starts with more: each that it might have costs its guest memory.
const VCPUS_MAX: u8 = 8;

/// A pod's machine cannot be started.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("it was stopped before it was its turn")]
    Stopped,
    #[error("whoever asked for it has gone away")]
    GivenUp,
    #[error("cannot make its {what}")]
    Make {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "this node has no user namespace for its machine; `pericarp check` says why, and after that is corrected the \
         controller has to be started again"
    )]
    NoJail,
    #[error("its containers cannot have the pod's user namespace")]
    UserNamespace(#[from] UserNamespaceError),
    #[error("its machine cannot be given the pod's network")]
    Network(#[source] NetworkError),
    #[error("the machine ended before its guest was ready: {message}")]
    MachineEnded { message: String },
    #[error(
        "the guest was not ready after {seconds} s in which it could have worked; the last it printed: {console:?}"
    )]
    NotReady { seconds: u64, console: String },
    #[error(
        "the guest was not ready after {seconds} s; its machine had a CPU for {worked_ms} ms of them: the node has too \
         much to do; the last it printed: {console:?}"
    )]
    Starved { seconds: u64, worked_ms: u128, console: String },
    #[error(
        "the first word of the guest's agent is not understood; initramfs and controller have to be of one version"
    )]
    FirstWord(#[source] io::Error),
    #[error("the guest's agent cannot be reached")]
    Connect(#[source] io::Error),
    #[error("the guest's agent does not make the guest into the pod")]
    Configure(#[source] ttrpc::Error),
}

fn make(what: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Make { what, source }
}

/// What a machine inherits, and the end of the guest's connection to the host that stays here.
struct Sockets {
    of_machine: InheritedDescriptors,
    guest: UnixStream,
}

impl Sockets {
    fn make(files: &PodFiles, user_namespace: Option<&OwnedFd>) -> Result<Self, StartError> {
        let control = machine::bind(&files.control()).map_err(make("control socket"))?;
        let descriptors =
            machine::bind_descriptors(&files.descriptors()).map_err(make("descriptors' socket"))?;
        let listener = machine::bind(&files.vsock()).map_err(make("vsock socket"))?;
        let (guest, host) = UnixStream::pair().map_err(make("connection to its guest"))?;
        let vsock = VsockSockets { listener, host: Some(host), forward: None };
        let user_namespace = user_namespace.ok_or(StartError::NoJail)?;
        let user_namespace = Some(user_namespace.try_clone().map_err(make("user namespace"))?);
        Ok(Self { of_machine: InheritedDescriptors { control, descriptors, vsock, user_namespace }, guest })
    }
}

impl PodTask {
    /// Makes everything that the pod needs. What is made is on the list of what it owns before it is made, also if this
    /// fails. `caller` waits for it; a start for which nobody waits any more is given up, as nobody would ever ask for
    /// it again.
    pub(super) async fn boot<T>(&mut self, caller: &mut Reply<T>) -> Result<Running, StartError> {
        // Rather than when the first container needs it.
        self.pod.user_namespace().await?;
        let pod = Arc::clone(&self.pod);
        let place = tokio::select! {
            place = pod.environment.boots.enter() => place,
            () = pod.stop_requested() => return Err(StartError::Stopped),
            () = caller.closed() => return Err(StartError::GivenUp),
        };
        let begun = Instant::now();
        self.publish(|status| status.marks.queued = monotonic_ns());
        self.make_directory().await?;
        let (mut network, mut sockets, cgroup) = self.make_surroundings().await?;
        let forward = take_forward(&pod, &mut network);
        self.publish(|status| {
            status.interfaces = network.status();
            status.port_forward = forward.as_ref().map(|forward| match forward {
                Ok(_) => "works".to_owned(),
                Err(reason) => format!("does not work: {reason}"),
            });
            status.marks.network = monotonic_ns();
        });
        sockets.of_machine.vsock.forward = forward.and_then(Result::ok);
        let nets = std::mem::take(&mut network.nets);
        let pid = self.make_machine(nets, sockets.of_machine, cgroup).await?;
        let (ready, ready_at) = tokio::select! {
            ready = pod.wait_until_ready(pid, sockets.guest, place) => ready?,
            () = caller.closed() => return Err(StartError::GivenUp),
        };
        FaultPoint::GuestReady.reached();
        tokio::select! {
            configured = pod.configure_guest(network, begun) => configured?,
            _ended = pod.wait() => return Err(pod.machine_ended().await),
        }
        self.publish(|status| {
            status.marks.ready = ready_at;
            status.guest_kernel = ready.kernel;
            // A guest that runs for longer than can be counted does not tell the truth.
            status.marks.since_init = u64::try_from(ready.since_init.as_nanos()).unwrap_or(0);
            status.marks.configured = monotonic_ns();
        });
        self.record(Stage::Running).await?;
        FaultPoint::PodRecorded.reached();
        pod.serve_requests();
        pod.follow_events();
        pod.watch_network();
        Ok(Running::new(pid, pod.spec.resources, pod.size))
    }

    /// Makes the directory, and in it the first record: a controller that is started after a crash finds what there may
    /// be.
    async fn make_directory(&mut self) -> Result<(), StartError> {
        let path = self.pod.files.directory().to_owned();
        self.owned.add(Resource::Directory { path: path.clone() });
        let made = self.pod.blocking.run(move || DirBuilder::new().mode(0o700).create(path)).await;
        made.map_err(make("directory"))?;
        FaultPoint::DirectoryMade.reached();
        if let Some(netns) = self.pod.spec.netns.clone() {
            self.owned.add(Resource::Network { netns });
        }
        if let Some(path) = cgroup::path_of(&self.pod.spec.cgroup_parent, &self.pod.spec.id) {
            self.owned.add(Resource::Cgroup { path });
        }
        self.record(Stage::Starting).await?;
        FaultPoint::PodRecordedFirst.reached();
        Ok(())
    }

    /// Makes the network, and meanwhile sockets and cgroup.
    async fn make_surroundings(&mut self) -> Result<(PodNetwork, Sockets, Option<Cgroup>), StartError> {
        let pod = &self.pod;
        let (files, id, parent) = (pod.files.clone(), pod.spec.id.clone(), pod.spec.cgroup_parent.clone());
        let environment = Arc::clone(&pod.environment);
        let others = pod.blocking.run(move || {
            let sockets = Sockets::make(&files, environment.machines_user_namespace.as_ref())?;
            let cgroup = Cgroup::make(&parent, &id).map_err(make("cgroup"))?;
            Ok::<_, StartError>((sockets, cgroup))
        });
        let netns = pod.spec.netns.clone().unwrap_or_default();
        let network = network::set_up(&netns, pod.size.vcpus);
        // Both to their ends: what has been made has to be known when it is removed.
        let (others, network) = tokio::join!(others, network);
        let network = network.map_err(StartError::Network)?;
        FaultPoint::NetworkMade.reached();
        let (sockets, cgroup) = others?;
        Ok((network, sockets, cgroup))
    }

    /// Makes the machine, and has it watched. Returns its process id.
    async fn make_machine(
        &mut self,
        nets: Vec<NetConfig>,
        inherited: InheritedDescriptors,
        cgroup: Option<Cgroup>,
    ) -> Result<u32, StartError> {
        let config = self.pod.machine_config(nets);
        let directory = self.pod.files.directory().to_owned();
        let spawned = self.pod.blocking.run(move || {
            let cgroup = cgroup.map(|cgroup| cgroup.directory()).transpose()?;
            Machine::spawn(&directory, &config, inherited, cgroup)
        });
        let machine = spawned.await.map_err(make("machine process"))?;
        let pid = machine.pid();
        let process = Process::of(pid);
        self.is_machine_watched = true;
        self.pod.watch_machine(machine);
        let process = process.map_err(make("machine process"))?;
        self.owned.add(Resource::Machine { process });
        FaultPoint::MachineSpawned.reached();
        // From here a controller that starts after a crash finds the machine's process on record.
        self.record(Stage::Starting).await?;
        FaultPoint::MachineRecorded.reached();
        Ok(pid)
    }

    /// Puts the pod on record as it is now.
    async fn record(&self, stage: Stage) -> Result<(), StartError> {
        self.publish(|_| ());
        let (pod, owned) = (Arc::clone(&self.pod), self.owned.clone());
        let written = self.pod.blocking.run(move || {
            let status = pod.status.borrow().clone();
            pod.record.change(|record| {
                record.stage = stage;
                record.owned = owned;
                record.interfaces = status.interfaces;
                record.port_forward = status.port_forward;
            })
        });
        written.await.map_err(make("record"))
    }
}

/// What port-forward needs, or why there is none. A pod without it is a pod nonetheless.
pub(super) fn take_forward(pod: &Pod, network: &mut PodNetwork) -> Option<Result<PortForward, String>> {
    let forward = network.forward.take()?;
    Some(forward.map_err(|error| {
        let reason = chain(&error);
        tracing::warn!(pod = pod.id(), error = reason, "port-forward to this pod will not work");
        reason
    }))
}

impl Pod {
    /// The pod's user namespace on the host, if it has one.
    pub(super) async fn user_namespace(&self) -> Result<Option<UserNamespace>, UserNamespaceError> {
        if self.spec.id_map.is_none() {
            return Ok(None);
        }
        let netns = self.spec.netns.clone().unwrap_or_default();
        self.blocking.run(move || UserNamespace::of_netns(&netns)).await.map(Some)
    }

    pub(super) fn machine_config(&self, nets: Vec<NetConfig>) -> MachineConfig {
        let config = &self.environment.config;
        let most = Size::most(config, self.environment.capacity);
        MachineConfig {
            id: self.id().to_owned(),
            kernel: config.kernel.clone(),
            initramfs: config.initramfs.clone(),
            cmdline: config.kernel_cmdline.clone(),
            vcpus: self.size.vcpus,
            vcpus_max: most.vcpus.min(VCPUS_MAX),
            memory_mib: self.size.memory_mib,
            memory_max_mib: most.memory_mib,
            disk_slots: MachineConfig::DISK_SLOTS,
            nested_virtualization: self.spec.nested_virtualization,
            console: ConsoleConfig {
                path: self.files.console(),
                limit_bytes: config.console_limit_kib << 10,
            },
            vsock: VsockConfig { host_port: Some(guest::HOST_PORT), forward_port: Some(guest::FORWARD_PORT) },
            share: Some(ShareConfig { tag: guest::SHARE_TAG.into(), directory: None }),
            nets,
            rate_limits: rate_limits::tightest(&config.rate_limits, &self.spec.rate_limits),
        }
    }

    /// Waits for the agent's first word; returns the time of it, too. From then on nobody in the guest reaches the
    /// host.
    async fn wait_until_ready(
        &self,
        machine: u32,
        guest: UnixStream,
        place: BootPlace,
    ) -> Result<(Ready, u64), StartError> {
        let mut place = Some(place);
        // A machine that is throttled, or hangs, has little use for its place: others get it when a boot should be
        // over.
        let mut turn_over = pin!(sleep(self.environment.config.ready_timeout()));
        let mut ready = pin!(ready::receive(guest));
        let mut too_long = pin!(self.start_takes_too_long(machine));
        let ready = loop {
            tokio::select! {
                ready = &mut ready => break ready.map_err(StartError::FirstWord)?,
                _ended = self.wait() => return Err(self.machine_ended().await),
                error = &mut too_long => return Err(error),
                () = &mut turn_over, if place.is_some() => place = None,
            }
        };
        Ok((ready, monotonic_ns()))
    }

    async fn machine_ended(&self) -> StartError {
        StartError::MachineEnded { message: self.last_words().await }
    }

    /// Makes the guest into the pod, within what is left of the time for the start.
    async fn configure_guest(&self, network: PodNetwork, begun: Instant) -> Result<(), StartError> {
        let config = &self.environment.config;
        let left = || config.start_timeout().saturating_sub(begun.elapsed()).max(config.ready_timeout());
        let agent = Agent::connect_within(&self.files.vsock(), left()).await.map_err(StartError::Connect)?;
        agent.configure(&self.configuration(network), left()).await.map_err(StartError::Configure)
    }

    /// Resolves when the start has exceeded what it may take.
    async fn start_takes_too_long(&self, machine: u32) -> StartError {
        let config = &self.environment.config;
        let budget = StartBudget { working: config.ready_timeout(), wall: config.start_timeout() };
        let times = MachineTimes::of(machine, self.status.borrow().owned.cgroup());
        let begun = Instant::now();
        let mut left = budget.working.min(budget.wall);
        loop {
            sleep(left).await;
            let times = times.clone();
            let machine = self.blocking.run(move || times.read().since(&Times::default())).await;
            let elapsed = begun.elapsed();
            let exceeded = match budget.left(elapsed, machine) {
                Ok(more) => {
                    // Not too often, when there is little left and the node has much to do.
                    left = more.max(Duration::from_millis(100));
                    continue;
                }
                Err(exceeded) => exceeded,
            };
            let console = self.last_printed().await;
            let seconds = elapsed.as_secs();
            return match exceeded {
                Exceeded::Working => StartError::NotReady { seconds: budget.working.as_secs(), console },
                Exceeded::Wall => {
                    StartError::Starved { seconds, worked_ms: machine.worked.as_millis(), console }
                }
            };
        }
    }

    /// What the guest has printed last.
    pub(super) async fn last_printed(&self) -> String {
        let console = self.files.console();
        self.blocking.run(move || machine::last_printed(&console)).await
    }

    /// Asks the machine for its part of the timeline, after the caller has its answer.
    pub(super) fn log_timeline(self: &Arc<Self>) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let _ = pod.machine_status().await;
            match pod.timeline() {
                Some(timeline) => tracing::info!(
                    pod = pod.id(),
                    name = pod.title(),
                    queued_ms = timeline.queued,
                    network_ms = timeline.network,
                    vmm_spawn_ms = timeline.vmm_spawn,
                    kvm_setup_ms = timeline.kvm_setup,
                    kernel_load_ms = timeline.kernel_load,
                    kernel_to_init_ms = timeline.kernel_to_init,
                    agent_ready_ms = timeline.agent_ready,
                    configure_ms = timeline.configure,
                    total_ms = timeline.total,
                    "pod started"
                ),
                // It was stopped right away.
                None if pod.end().is_some() => {}
                None => tracing::warn!(pod = pod.id(), "pod started; its machine tells no times"),
            }
        });
    }
}
