//! Many pods on one node: started at once, asked about all together, taken over by a new controller, ended at once.

use std::{fs, time::Instant};

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use pericarp_tests::{
    Node, Pod, Runtime, api,
    node::{
        controller::KilledController,
        machine::MachineProcess,
        process::{self, controller_pid},
    },
};
use tonic::Code;

use crate::figures::{Comparison, Figures, timed};

/// How often each of the calls about all pods is made.
const CALLS: usize = 10;

/// What is measured.
#[derive(Default)]
pub struct Density {
    pub times: Comparison,
    pub costs: Figures,
}

/// The runtimes take turns: each has the node's memory to itself.
pub async fn measure(pods: usize) -> Result<Density> {
    let mut measured = Density::default();
    for runtime in [Runtime::Runc, Runtime::Pericarp] {
        let node = Node::connect(runtime, "dense").await?;
        let outcome = Box::pin(of_runtime(&node, pods, &mut measured)).await;
        node.clean_up().await?;
        outcome.with_context(|| format!("{pods} pods of {runtime}"))?;
    }
    Ok(measured)
}

async fn of_runtime(node: &Node, count: usize, measured: &mut Density) -> Result<()> {
    let times = measured.times.of(node.runtime);
    let started = stream::iter(0..count).map(|number| start(node, number)).buffer_unordered(count);
    let started: Vec<(Pod, f64)> = timed(times, "all started", started.try_collect()).await?;
    for (_, took) in &started {
        times.add("one of them started", *took);
    }
    println!("bench: {count} pods of {} run", node.runtime);
    let pods: Vec<Pod> = started.into_iter().map(|(pod, _)| pod).collect();
    if node.runtime == Runtime::Pericarp {
        costs(&pods, &mut measured.costs)?;
    }
    ask(node, &pods, times).await?;
    if node.runtime == Runtime::Pericarp {
        let restart = async { KilledController::kill()?.restart().await };
        timed(&mut measured.costs, "a new controller serves after, ms", restart).await?;
    }
    let ended = stream::iter(&pods).map(async |pod| {
        pod.stop().await?;
        pod.remove().await
    });
    timed(times, "all ended", ended.buffer_unordered(count).try_collect::<Vec<()>>()).await?;
    Ok(())
}

/// Starts a pod with an idle container; returns how long its start took.
async fn start(node: &Node, number: usize) -> Result<(Pod, f64)> {
    let begun = Instant::now();
    let pod = node.pod(&format!("{}-{number}", node.runtime)).run().await?;
    pod.idle_container("idle").await?;
    Ok((pod, milliseconds(begun)))
}

/// What kubelet asks about all pods of a node.
async fn ask(node: &Node, pods: &[Pod], times: &mut Figures) -> Result<()> {
    let mut runtime = node.cri.runtime();
    for _ in 0..CALLS {
        let of_pods = runtime.list_pod_sandbox_stats(api::ListPodSandboxStatsRequest::default());
        let response = timed(times, "ListPodSandboxStats", of_pods).await?;
        anyhow::ensure!(response.into_inner().stats.len() >= pods.len(), "statistics of too few pods");
        let begun = Instant::now();
        match runtime.list_pod_sandbox_metrics(api::ListPodSandboxMetricsRequest::default()).await {
            Ok(_) => times.add("ListPodSandboxMetrics", milliseconds(begun)),
            // Since containerd 2.2.
            Err(status) if status.code() == Code::Unimplemented => {}
            Err(status) => return Err(status.into()),
        }
        let of_containers = runtime.list_container_stats(api::ListContainerStatsRequest::default());
        timed(times, "ListContainerStats", of_containers).await?;
        let list = runtime.list_pod_sandbox(api::ListPodSandboxRequest::default());
        timed(times, "ListPodSandbox", list).await?;
    }
    for pod in pods {
        timed(times, "PodSandboxStatus", pod.status()).await?;
    }
    Ok(())
}

/// What each pod, and all of them, cost the node.
fn costs(pods: &[Pod], costs: &mut Figures) -> Result<()> {
    let mebibytes = |pid| anyhow::Ok(process::proportional_memory(pid)? / f64::from(1 << 20));
    for pod in pods {
        let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
        costs.add("machine: memory, PSS in MiB", mebibytes(machine.pid)?);
        costs.add("machine: descriptors", entries(machine.pid, "fd")?);
        costs.add("machine: threads", entries(machine.pid, "task")?);
    }
    let controller = controller_pid()?;
    costs.add("controller, all pods: memory, PSS in MiB", mebibytes(controller)?);
    costs.add("controller, all pods: descriptors", entries(controller, "fd")?);
    costs.add("controller, all pods: threads", entries(controller, "task")?);
    Ok(())
}

/// How many entries a directory of a process has in `/proc`.
fn entries(pid: i32, name: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/{name}");
    let count = fs::read_dir(&path).with_context(|| format!("read {path}"))?.count();
    Ok(f64::from(u32::try_from(count)?))
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
