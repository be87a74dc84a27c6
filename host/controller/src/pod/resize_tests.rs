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
use crate::pod::tests::pod;

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

/// A pod whose machine has one vCPU and 512 MiB, and what its machine and guest are told.
struct Place {
    directory: tempfile::TempDir,
    pod: Arc<Pod>,
    told: Told,
    _servers: [Server; 2],
}

impl Place {
    async fn new(fails: Fails) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let pod = pod(directory.path());
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
        let place = Place { directory, pod, told, _servers: [machine, agent] };
        let cgroup = place.directory.path().join("cgroup");
        if fails != Fails::Pin {
            std::fs::create_dir(&cgroup).unwrap();
        }
        place.pod.state().cgroup = Some(cgroup);
        place
    }

    async fn fit(&self, container: &str, limits: Limits) -> Result<(), String> {
        self.pod.fit(&container.parse().unwrap(), limits, &[]).await.map_err(|error| chain(&error))
    }

    fn sizes(&self) -> Vec<(u32, u64)> {
        self.told.sizes.lock().unwrap().clone()
    }

    /// The cgroup's CPUs, or nothing.
    fn pinned(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("cgroup/cpuset.cpus")).unwrap_or_default()
    }

    fn vcpus_and_mib(&self) -> Option<(u8, u32)> {
        self.pod.state().size_now.map(|size| (size.vcpus, size.memory_mib))
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
    let place = Place::new(Fails::Nothing).await;
    place.fit("c1", on_cpu(limits(1, 600), "0")).await.unwrap();
    place.fit("c2", on_cpu(limits(1, 200), "1")).await.unwrap();
    assert_eq!(place.sizes(), [(1, 600), (2, 800)]);
    assert_eq!((place.vcpus_and_mib(), place.pinned().as_str()), (Some((2, 800)), "0,1"));
}

#[tokio::test]
async fn a_machine_is_let_go_when_one_of_its_containers_may_run_anywhere() {
    let place = Place::new(Fails::Nothing).await;
    // What the cgroup above has.
    for (file, all) in [("cpuset.cpus.effective", "0-7"), ("cpuset.mems.effective", "0")] {
        std::fs::write(place.directory.path().join(file), all).unwrap();
    }
    place.fit("c1", on_cpu(limits(1, 200), "2")).await.unwrap();
    assert_eq!(place.pinned(), "2");
    place.fit("c2", limits(1, 200)).await.unwrap();
    assert_eq!(place.pinned(), "0-7");
    place.fit("c2", on_cpu(limits(1, 200), "3")).await.unwrap();
    assert_eq!(place.pinned(), "2,3");
}

#[tokio::test]
async fn a_size_that_is_refused_leaves_no_trace() {
    let place = Place::new(Fails::Nothing).await;
    place.fit("c1", limits(1, 256)).await.unwrap();
    // A new container, and a new size for one that there is: both more than the host has.
    for (container, limits) in [("large", limits(1, 100_000)), ("c1", limits(99, 256))] {
        let error = place.fit(container, limits).await.unwrap_err();
        assert!(error.contains("are the most that this host allows"), "{error}");
    }
    assert_eq!(place.sizes(), []);
    place.fit("c2", limits(1, 256)).await.unwrap();
    assert_eq!(place.sizes(), [(2, 512)]);
    place.fit("large", limits(1, 100_000)).await.unwrap_err();
    let state = place.pod.state();
    assert_eq!(state.limits.len(), 2, "{:?}", state.limits);
    assert_eq!(state.limits["c1"], limits(1, 256));
}

#[tokio::test]
async fn a_resize_that_fails_leaves_the_pod_as_it_was() {
    for fails in [Fails::Machine, Fails::Guest, Fails::Processors, Fails::Memory, Fails::Pin] {
        let place = Place::new(fails).await;
        let before = limits(1, 600);
        place.fit("c1", before.clone()).await.unwrap();
        let error = place.fit("c1", on_cpu(limits(2, 800), "1")).await.unwrap_err();
        assert!(error.contains("machine") || error.contains("guest"), "{fails:?}: {error}");
        assert_eq!(place.sizes(), [(1, 600), (2, 800), (1, 600)], "{fails:?}");
        assert_eq!(place.told.guest.lock().unwrap().last(), Some(&1), "{fails:?}");
        assert_eq!(place.vcpus_and_mib(), Some((1, 600)), "{fails:?}");
        assert_eq!(place.pinned(), "", "{fails:?}");
        assert_eq!(place.pod.state().limits["c1"], before, "{fails:?}");
        // What is possible still is.
        place.fit("c1", limits(1, 700)).await.unwrap();
        assert_eq!(place.vcpus_and_mib(), Some((1, 700)), "{fails:?}");
    }
}

fn to_be_killed(limits: Limits, oom_score_adj: i64) -> Limits {
    Limits { oom_score_adj, ..limits }
}

#[tokio::test]
async fn the_hosts_kernel_kills_a_machine_when_it_would_kill_its_containers() {
    let mut machine = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let pid = machine.id();
    let number = || std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
    let place = Place::new(Fails::Guest).await;
    place.pod.state().phase = Phase::Running { pid };
    place.fit("c1", to_be_killed(limits(1, 256), 750)).await.unwrap();
    assert_eq!(number(), "750");
    place.fit("c2", to_be_killed(limits(1, 256), 1000)).await.unwrap_err();
    assert_eq!(number(), "750");
    place.fit("c2", to_be_killed(Limits::default(), 900)).await.unwrap();
    assert_eq!(number(), "650");
    place.pod.share.lock().await.create().unwrap();
    place.pod.release_container(&"c1".parse().unwrap()).await.unwrap();
    place.pod.share.lock().await.remove().unwrap();
    assert_eq!(number(), "900");
    machine.kill().unwrap();
    machine.wait().unwrap();
    let error = place.fit("c2", to_be_killed(Limits::default(), 800)).await.unwrap_err();
    assert!(error.contains("oom_score_adj"), "{error}");
}

#[tokio::test]
async fn a_resize_that_nobody_waits_for_any_more_leaves_no_limits() {
    let place = Place::new(Fails::Nothing).await;
    let c1 = "c1".parse().unwrap();
    let mut fitting = Box::pin(place.pod.fit(&c1, limits(2, 800), &[]));
    // As far as it comes without an answer of the machine's.
    let waker = std::task::Waker::noop();
    let polled = fitting.as_mut().poll(&mut std::task::Context::from_waker(waker));
    assert!(polled.is_pending());
    assert_eq!(place.pod.state().limits.len(), 1);
    drop(fitting);
    assert!(place.pod.state().limits.is_empty());
}
