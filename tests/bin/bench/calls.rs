//! CRI's calls, one pod after the other, and what each pod costs.

use anyhow::{Context, Result, bail};
use pericarp_tests::{
    Node, Pod, Runtime,
    cri::timeline,
    node::{machine::MachineProcess, process},
};

use crate::figures::{Comparison, Figures, timed};

/// What is measured.
#[derive(Default)]
pub struct Calls {
    pub times: Comparison,
    pub timeline: Figures,
    pub memory: Figures,
}

/// The runtimes take turns, so that whatever else the node does falls on both.
pub async fn measure(pods: usize) -> Result<Calls> {
    let mut measured = Calls::default();
    // The first pod of each runtime warms the node's caches and is not counted.
    for round in 0..=pods {
        for runtime in [Runtime::Runc, Runtime::Pericarp] {
            let node = Node::connect(runtime, "bench").await?;
            let mut of_pod = Calls::default();
            let outcome = Box::pin(one_pod(&node, round, &mut of_pod)).await;
            node.clean_up().await?;
            outcome.with_context(|| format!("pod {round} of {runtime}"))?;
            if round > 0 {
                measured.times.of(runtime).extend(std::mem::take(of_pod.times.of(runtime)));
                measured.timeline.extend(of_pod.timeline);
                measured.memory.extend(of_pod.memory);
            }
        }
        println!("bench: {round} of {pods} pods of each runtime");
    }
    Ok(measured)
}

async fn one_pod(node: &Node, round: usize, measured: &mut Calls) -> Result<()> {
    let times = measured.times.of(node.runtime);
    let pod = node.pod(&format!("{}-{round}", node.runtime));
    let pod = timed(times, "RunPodSandbox", Box::pin(pod.run())).await?;
    let container = timed(times, "CreateContainer", pod.container("idle").create()).await?;
    timed(times, "StartContainer", container.start()).await?;
    let output = timed(times, "ExecSync true", container.exec(["true"])).await?;
    if output.exit_code != 0 {
        bail!("true failed: {output:?}");
    }
    if node.runtime == Runtime::Pericarp {
        let info = pod.info().await?;
        for (phase, milliseconds) in timeline::boot_timeline(&info)? {
            measured.timeline.add(&phase, milliseconds);
        }
        for (phase, milliseconds) in timeline::container_timeline(&info, &container.id)? {
            measured.timeline.add(&format!("container: {phase}"), milliseconds);
        }
        measure_memory(&pod, &info, &mut measured.memory)?;
    }
    let times = measured.times.of(node.runtime);
    timed(times, "StopPodSandbox", pod.stop()).await?;
    timed(times, "RemovePodSandbox", pod.remove()).await
}

fn measure_memory(pod: &Pod, info: &serde_json::Value, memory: &mut Figures) -> Result<()> {
    let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
    let mut add = |name: &str, bytes: f64| memory.add(name, bytes / f64::from(1 << 20));
    add("machine, PSS", process::proportional_memory(machine.pid)?);
    add("controller, PSS (for all pods)", process::proportional_memory(process::controller_pid()?)?);
    let resident = info["pericarp"]["residentBytes"].as_f64();
    add("guest pages resident", resident.with_context(|| format!("no residentBytes in {info}"))?);
    Ok(())
}
