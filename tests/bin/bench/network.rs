//! The network between the node and a pod: how much goes through, how long an answer takes, what the machine's threads
//! spend on it, and what it adds to a pod's start.

use std::{
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_protos::sandbox::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStatusRequest,
};
use pericarp_tests::{
    Node, Runtime,
    cri::timeline,
    direct::{
        controller::{self, pod_config},
        netns::NetworkNamespace,
    },
    node::{controller::NODE_CONTROLLER, machine::MachineProcess},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::figures::{Comparison, Figures};

const MEBIBYTE: usize = 1 << 20;
/// What goes each way at once, in MiB and in bytes.
const TRANSFER_MIB: u32 = 32;
const TRANSFER: usize = TRANSFER_MIB as usize * MEBIBYTE;
/// How often each transfer is repeated.
const TRANSFERS: usize = 5;
/// Answers that are waited for, one after the other, on one connection.
const QUESTIONS: u16 = 500;

/// What is measured.
#[derive(Default)]
pub struct Network {
    pub traffic: Comparison,
    pub cpu: Figures,
    pub exits: Figures,
    pub start: Figures,
}

/// `pods` is how often a start is measured.
pub async fn measure(pods: usize) -> Result<Network> {
    let mut measured = Network::default();
    let ours = Node::connect(Runtime::Pericarp, "bench-network").await?;
    let outcome = traffic(&ours, &mut measured).await;
    ours.clean_up().await?;
    outcome.context("measure traffic")?;
    for round in 0..=pods {
        for (name, commands) in [("without an interface", ""), ("with one interface", VETH)] {
            let (milliseconds, loading) = start_of_pod(&format!("bench{round}"), commands).await?;
            if round > 0 {
                measured.start.add(name, milliseconds);
                // That takes long or short as the host happens to have large pages, and hides everything else.
                measured.start.add(&format!("{name}, but for loading the kernel"), milliseconds - loading);
            }
        }
        println!("bench: {round} of {pods} pods with a network and without");
    }
    Ok(measured)
}

/// Both pods exist all the time, and the runtimes take turns.
async fn traffic(ours: &Node, measured: &mut Network) -> Result<()> {
    let theirs = ours.with_runtime(Runtime::Runc);
    let mut servers = Vec::new();
    for node in [&theirs, ours] {
        let pod = node.pod(&node.runtime.to_string()).run().await?;
        let container = pod.container("peer").command(["peer", "serve", "[::]:8080"]).start().await?;
        container.wait_for_output("ready\n").await?;
        let address = *pod.addresses().await?.first().context("the pod's address")?;
        servers.push((node.runtime, pod, SocketAddr::new(address, 8080)));
    }
    for round in 0..TRANSFERS {
        for (runtime, pod, address) in &servers {
            let figures = measured.traffic.of(*runtime);
            let machine = MachineProcess::of_pod(&pod.id)?;
            let before = machine.map(MachineProcess::cpu_time).transpose()?;
            figures.add("TCP into the pod, MiB/s", rate(give(*address).await?));
            figures.add("TCP out of the pod, MiB/s", rate(receive(*address).await?));
            if let (Some(machine), Some(before)) = (machine, before) {
                for (thread, spent) in machine.cpu_time()?.since(&before) {
                    let per_mebibyte = spent.as_secs_f64() * 1e3 / f64::from(2 * TRANSFER_MIB);
                    if per_mebibyte > 0.0 {
                        measured.cpu.add(&thread, per_mebibyte);
                    }
                }
            }
            let before = machine.map(MachineProcess::vm_exits).transpose()?;
            for microseconds in ask(*address).await? {
                figures.add("TCP answer of a byte, us", microseconds);
            }
            if let (Some(machine), Some(before)) = (machine, before) {
                for (name, exits) in machine.vm_exits()?.since(before) {
                    measured.exits.add(name, f64::from(exits) / f64::from(QUESTIONS));
                }
            }
        }
        println!("bench: {} of {TRANSFERS} rounds of traffic", round + 1);
    }
    Ok(())
}

fn rate(time: Duration) -> f64 {
    f64::from(TRANSFER_MIB) / time.as_secs_f64()
}

/// Into the pod, until it has read everything.
async fn give(server: SocketAddr) -> Result<Duration> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(b"sink\n").await?;
    let piece = vec![b'b'; MEBIBYTE / 4];
    let start = Instant::now();
    for _ in 0..TRANSFER / piece.len() {
        stream.write_all(&piece).await?;
    }
    stream.shutdown().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    ensure!(answer.trim() == TRANSFER.to_string(), "{answer:?} bytes have arrived of {TRANSFER}");
    Ok(start.elapsed())
}

/// How long the pod takes to send [`TRANSFER`] bytes to the node.
async fn receive(server: SocketAddr) -> Result<Duration> {
    let mut stream = TcpStream::connect(server).await?;
    let start = Instant::now();
    stream.write_all(format!("source {TRANSFER}\n").as_bytes()).await?;
    let mut buffer = vec![0; MEBIBYTE / 4];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => total += length,
        }
    }
    ensure!(total == TRANSFER, "{total} bytes have arrived of {TRANSFER}");
    Ok(start.elapsed())
}

/// Times of answers, in microseconds.
async fn ask(server: SocketAddr) -> Result<Vec<f64>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    stream.write_all(b"echo\n").await?;
    let mut times = Vec::with_capacity(QUESTIONS.into());
    let mut byte = [0];
    for _ in 0..QUESTIONS {
        let start = Instant::now();
        stream.write_all(b"?").await?;
        stream.read_exact(&mut byte).await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// An interface as the bridge plugin leaves it, without the bridge.
const VETH: &str = "ip link add eth0 type veth peer name peer0; ip link set peer0 up; ip link set eth0 up; \
                    ip address add 10.1.2.3/24 dev eth0; ip route add default via 10.1.2.1";

/// How long the controller takes to start a pod in a network namespace made by `commands`, in milliseconds: CNI's part,
/// which is the same for every runtime, is left out. And how long of that the kernel's loading into the machine took.
async fn start_of_pod(id: &str, commands: &str) -> Result<(f64, f64)> {
    let netns = NetworkNamespace::new(id).await?;
    netns.run(commands).await?;
    let mut client = controller::connect(Path::new(NODE_CONTROLLER)).await?;
    let sandbox_id = id.to_owned();
    let create = ControllerCreateRequest {
        sandbox_id: sandbox_id.clone(),
        options: Some(controller::options(&pod_config(id))),
        netns_path: netns.path(),
        ..Default::default()
    };
    let start = Instant::now();
    client.create(create).await?;
    client.start(ControllerStartRequest { sandbox_id: sandbox_id.clone(), ..Default::default() }).await?;
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    let status =
        ControllerStatusRequest { sandbox_id: sandbox_id.clone(), verbose: true, ..Default::default() };
    let info = client.status(status).await?.into_inner().info;
    let pericarp = info.get("pericarp").context("verbose status has no \"pericarp\"")?;
    let info = serde_json::json!({ "pericarp": serde_json::from_str::<serde_json::Value>(pericarp)? });
    let timeline = timeline::boot_timeline(&info)?;
    let loading = timeline.iter().find(|(phase, _)| phase == "kernelLoad").map_or(0.0, |(_, time)| *time);
    client.shutdown(ControllerShutdownRequest { sandbox_id, ..Default::default() }).await?;
    netns.remove().await?;
    Ok((milliseconds, loading))
}
