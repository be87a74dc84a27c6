//! A machine and a guest of whom it can be said how they take a resize.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use pericarp_protos::{
    agent::{self, Agent as AgentService, create_agent},
    ttrpc::{
        self,
        asynchronous::{Server, TtrpcContext},
    },
    vmm::{Machine, ResizeRequest, ResizeResponse, WaitMemoryRequest, WaitMemoryResponse, create_machine},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{UnixListener, UnixStream},
};

use super::*;
use crate::{
    host::{machine::file, size::PodResources},
    pod::{
        life::{Life, Running},
        owned::Resource,
        tests::undriven,
    },
};

/// Which of the steps fails, each time that it is about more than one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fails {
    Nothing,
    Machine,
    Guest,
    /// The guest brings fewer processors online.
    Processors,
    Memory,
    /// The host's cgroup cannot be written.
    Pin,
}

/// Sizes that machine and guest have been told.
#[derive(Clone)]
struct Told {
    fails: Fails,
    sizes: Arc<Mutex<Vec<(u32, u64)>>>,
    guest: Arc<Mutex<Vec<u32>>>,
}

impl Told {
    fn check(&self, step: Fails, vcpus: u32) -> ttrpc::Result<()> {
        if self.fails == step && vcpus > 1 {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, "not today")));
        }
        Ok(())
    }
}

#[async_trait]
impl Machine for Told {
    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        self.sizes.lock().unwrap().push((request.vcpus, request.memory_bytes >> 20));
        self.check(Fails::Machine, request.vcpus)?;
        Ok(ResizeResponse::default())
    }

    async fn wait_memory(&self, _: &TtrpcContext, _: WaitMemoryRequest) -> ttrpc::Result<WaitMemoryResponse> {
        let vcpus = self.sizes.lock().unwrap().last().map_or(0, |(vcpus, _)| *vcpus);
        self.check(Fails::Memory, vcpus)?;
        Ok(WaitMemoryResponse::default())
    }
}

#[async_trait]
impl AgentService for Told {
    async fn resize(
        &self,
        _: &TtrpcContext,
        request: agent::ResizeRequest,
    ) -> ttrpc::Result<agent::ResizeResponse> {
        self.guest.lock().unwrap().push(request.vcpus);
        self.check(Fails::Guest, request.vcpus)?;
        let short = self.fails == Fails::Processors && request.vcpus > 1;
        let vcpus = request.vcpus - u32::from(short);
        Ok(agent::ResizeResponse { vcpus, ..agent::ResizeResponse::default() })
    }
}

/// A running pod whose machine has one vCPU and 512 MiB, and what its machine and guest are told.
struct RunningPod {
    directory: tempfile::TempDir,
    task: PodTask,
    told: Told,
    /// Stands for its machine's process.
    process: std::process::Child,
    _servers: [Server; 2],
}

impl RunningPod {
    async fn new(fails: Fails) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (pod, mut task) = undriven(directory.path());
        let of_pod = directory.path().join("abc");
        std::fs::create_dir(&of_pod).unwrap();
        let told = Told { fails, sizes: Arc::default(), guest: Arc::default() };
        let serve = async |name: &str, service| {
            let address = format!("unix://{}", of_pod.join(name).display());
            let mut server = Server::new().bind(&address).unwrap().register_service(service);
            server.start().await.unwrap();
            server
        };
        let machine = serve(file::CONTROL, create_machine(Arc::new(told.clone()))).await;
        let agent = serve("agent.sock", create_agent(Arc::new(told.clone()))).await;
        let listener = UnixListener::bind(of_pod.join(file::VSOCK)).unwrap();
        // The machine's part: the greeting, and then the guest's bytes.
        tokio::spawn(async move {
            while let Ok((mut host, _)) = listener.accept().await {
                let mut guest = UnixStream::connect(of_pod.join("agent.sock")).await.unwrap();
                tokio::spawn(async move {
                    while host.read_u8().await.is_ok_and(|byte| byte != b'\n') {}
                    host.write_all(b"OK 7\n").await.unwrap();
                    let _ = copy_bidirectional(&mut host, &mut guest).await;
                });
            }
        });
        let cgroup = directory.path().join("cgroup");
        if fails != Fails::Pin {
            std::fs::create_dir(&cgroup).unwrap();
        }
        task.owned.add(Resource::Cgroup { path: cgroup });
        let process = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        task.life = Life::running_with(Running::new(process.id(), PodResources::default(), pod.size));
        Self { directory, task, told, process, _servers: [machine, agent] }
    }

    async fn fit_limits(&mut self, container: &str, limits: Limits) -> Result<(), String> {
        self.task.fit_limits(&container.parse().unwrap(), limits).await.map_err(|error| chain(&error))
    }

    fn limits(&self) -> &std::collections::HashMap<ContainerId, Limits> {
        &self.task.life.running().unwrap().limits
    }

    fn sizes(&self) -> Vec<(u32, u64)> {
        self.told.sizes.lock().unwrap().clone()
    }

    /// The cgroup's CPUs, or nothing.
    fn pinned(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("cgroup/cpuset.cpus")).unwrap_or_default()
    }

    fn vcpus_and_mib(&self) -> Option<(u8, u32)> {
        self.task.life.running().unwrap().size.map(|size| (size.vcpus, size.memory_mib))
    }
}

impl Drop for RunningPod {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// Limits by which a pod of one such container has that many vCPUs and that much memory.
fn limits(vcpus: u64, mib: u64) -> Limits {
    Limits { cpu_milli: Some(vcpus * 1000), memory_bytes: Some(mib << 20), ..Limits::default() }
}

fn on_cpu(limits: Limits, cpus: &str) -> Limits {
    Limits { cpus: CpuSet::parse(cpus).unwrap(), ..limits }
}

#[tokio::test]
async fn a_machine_is_made_as_large_as_its_containers_may_need() {
    let mut place = RunningPod::new(Fails::Nothing).await;
    place.fit_limits("c1", on_cpu(limits(1, 600), "0")).await.unwrap();
    place.fit_limits("c2", on_cpu(limits(1, 200), "1")).await.unwrap();
    assert_eq!(place.sizes(), [(1, 600), (2, 800)]);
    assert_eq!((place.vcpus_and_mib(), place.pinned().as_str()), (Some((2, 800)), "0,1"));
}

#[tokio::test]
async fn a_machine_is_let_go_when_one_of_its_containers_may_run_anywhere() {
    let mut place = RunningPod::new(Fails::Nothing).await;
    // What the cgroup above has.
    for (file, all) in [("cpuset.cpus.effective", "0-7"), ("cpuset.mems.effective", "0")] {
        std::fs::write(place.directory.path().join(file), all).unwrap();
    }
    place.fit_limits("c1", on_cpu(limits(1, 200), "2")).await.unwrap();
    assert_eq!(place.pinned(), "2");
    place.fit_limits("c2", limits(1, 200)).await.unwrap();
    assert_eq!(place.pinned(), "0-7");
    place.fit_limits("c2", on_cpu(limits(1, 200), "3")).await.unwrap();
    assert_eq!(place.pinned(), "2,3");
}

#[tokio::test]
async fn a_size_that_is_refused_leaves_no_trace() {
    let mut place = RunningPod::new(Fails::Nothing).await;
    place.fit_limits("c1", limits(1, 256)).await.unwrap();
    // A new container, and a new size for one that there is: both more than the host has.
    for (container, limits) in [("large", limits(1, 100_000)), ("c1", limits(99, 256))] {
        let error = place.fit_limits(container, limits).await.unwrap_err();
        assert!(error.contains("are the most that this host allows"), "{error}");
    }
    assert_eq!(place.sizes(), []);
    place.fit_limits("c2", limits(1, 256)).await.unwrap();
    assert_eq!(place.sizes(), [(2, 512)]);
    place.fit_limits("large", limits(1, 100_000)).await.unwrap_err();
    assert_eq!(place.limits().len(), 2, "{:?}", place.limits());
    assert_eq!(place.limits()["c1"], limits(1, 256));
}

#[tokio::test]
async fn a_resize_that_fails_leaves_the_pod_as_it_was() {
    for fails in [Fails::Machine, Fails::Guest, Fails::Processors, Fails::Memory, Fails::Pin] {
        let mut place = RunningPod::new(fails).await;
        let before = limits(1, 600);
        place.fit_limits("c1", before.clone()).await.unwrap();
        let error = place.fit_limits("c1", on_cpu(limits(2, 800), "1")).await.unwrap_err();
        assert!(error.contains("machine") || error.contains("guest"), "{fails:?}: {error}");
        assert_eq!(place.sizes(), [(1, 600), (2, 800), (1, 600)], "{fails:?}");
        assert_eq!(place.told.guest.lock().unwrap().last(), Some(&1), "{fails:?}");
        assert_eq!(place.vcpus_and_mib(), Some((1, 600)), "{fails:?}");
        assert_eq!(place.pinned(), "", "{fails:?}");
        assert_eq!(place.limits()["c1"], before, "{fails:?}");
        // What is possible still is.
        place.fit_limits("c1", limits(1, 700)).await.unwrap();
        assert_eq!(place.vcpus_and_mib(), Some((1, 700)), "{fails:?}");
    }
}

fn to_be_killed(limits: Limits, oom_score_adj: i64) -> Limits {
    Limits { oom_score_adj, ..limits }
}

#[tokio::test]
async fn the_hosts_kernel_kills_a_machine_when_it_would_kill_its_containers() {
    let mut place = RunningPod::new(Fails::Guest).await;
    let pid = place.process.id();
    let number = || std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    place.fit_limits("c1", to_be_killed(limits(1, 256), 750)).await.unwrap();
    assert_eq!(number(), "750");
    place.fit_limits("c2", to_be_killed(limits(1, 256), 1000)).await.unwrap_err();
    assert_eq!(number(), "750");
    place.fit_limits("c2", to_be_killed(Limits::default(), 900)).await.unwrap();
    assert_eq!(number(), "650");
    place.task.release(&"c1".parse().unwrap()).await.unwrap();
    assert_eq!(number(), "900");
    place.process.kill().unwrap();
    place.process.wait().unwrap();
    let error = place.fit_limits("c2", to_be_killed(Limits::default(), 800)).await.unwrap_err();
    assert!(error.contains("oom_score_adj"), "{error}");
}

fn pod_limits(vcpus: u64, mib: u64) -> CpuAndMemory {
    CpuAndMemory { cpu_milli: Some(vcpus * 1000), memory_bytes: Some(mib << 20) }
}

#[tokio::test]
async fn a_pod_that_may_use_more_or_less_gets_a_machine_for_it_and_that_is_on_record() {
    let mut place = RunningPod::new(Fails::Nothing).await;
    place.fit_limits("c1", Limits::default()).await.unwrap();
    for (limits, size) in [(pod_limits(2, 700), (2, 700)), (pod_limits(1, 600), (1, 600))] {
        place.task.resize(limits, CpuAndMemory::default()).await.unwrap();
        assert_eq!(place.vcpus_and_mib(), Some(size));
        let record = crate::pod::record::Record::read(&place.directory.path().join("abc")).unwrap().unwrap();
        assert_eq!(record.resources.unwrap().limits, limits);
    }
    let overhead = CpuAndMemory { memory_bytes: Some(100 << 20), ..CpuAndMemory::default() };
    place.task.resize(pod_limits(1, 600), overhead).await.unwrap();
    assert_eq!(place.vcpus_and_mib(), Some((1, 700)));
}

#[tokio::test]
async fn a_size_of_a_pod_that_cannot_be_had_is_refused_and_nothing_changes() {
    let mut place = RunningPod::new(Fails::Guest).await;
    place.task.resize(pod_limits(1, 600), CpuAndMemory::default()).await.unwrap();
    let error = place.task.resize(pod_limits(1, 100_000), CpuAndMemory::default()).await.unwrap_err();
    assert!(matches!(error, PodError::Resize { source: ResizeError::Size(_), .. }), "{error:?}");
    let error = place.task.resize(pod_limits(2, 800), CpuAndMemory::default()).await.unwrap_err();
    assert!(matches!(error, PodError::Resize { source: ResizeError::Guest { .. }, .. }), "{error:?}");
    assert_eq!(place.vcpus_and_mib(), Some((1, 600)));
    assert_eq!(place.task.life.running().unwrap().resources.limits, pod_limits(1, 600));
    place.task.life.advance(Life::Ended);
    let error = place.task.resize(pod_limits(1, 600), CpuAndMemory::default()).await.unwrap_err();
    assert!(matches!(error, PodError::NotRunning { .. }), "{error:?}");
    // For the stand-in of its machine.
    place.task.life = Life::Created;
}
