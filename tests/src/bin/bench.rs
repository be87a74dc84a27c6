//! Pericarp's pods beside runc's on the same node, run by `scripts/bench`: `bench PODS JSON_FILE`.
//!
//! One pod after the other, the two runtimes taking turns, so that whatever else the node does falls on both. Prints a table;
//! the file has every figure.

use std::{collections::BTreeMap, env, fs, future::Future, time::Instant};

use anyhow::{Context, Result, bail};
use pericarp_tests::{
    Node, Pod, Runtime,
    machine::{self, MachineProcess},
    report::{self, Summary},
};
use serde_json::json;

/// Values of each figure, in the order in which figures were first seen.
#[derive(Default)]
struct Figures(Vec<(String, Vec<f64>)>);

impl Figures {
    fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    fn summaries(&self) -> Vec<(&str, Summary)> {
        self.0.iter().filter_map(|(name, values)| Some((name.as_str(), Summary::of(values)?))).collect()
    }

    fn of(&self, name: &str) -> Option<Summary> {
        self.0.iter().find(|(known, _)| known == name).and_then(|(_, values)| Summary::of(values))
    }
}

const CALLS: [&str; 6] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ExecSync true",
    "StopPodSandbox",
    "RemovePodSandbox",
];

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [pods, file] = &arguments[..] else { bail!("usage: bench PODS JSON_FILE") };
    let pods: usize = pods.parse().with_context(|| format!("number of pods {pods:?}"))?;
    let (mut calls, mut boot, mut memory) = (BTreeMap::new(), Figures::default(), Figures::default());
    // The first pod of each runtime warms the node's caches and is not counted.
    for round in 0..=pods {
        for runtime in [Runtime::Runc, Runtime::Pericarp] {
            let node = Node::connect(runtime, "bench").await?;
            let mut times = Figures::default();
            let outcome = Box::pin(one_pod(&node, round, &mut times, &mut boot, &mut memory)).await;
            node.clean_up().await?;
            outcome.with_context(|| format!("pod {round} of {runtime}"))?;
            if round == 0 {
                (boot, memory) = Default::default();
                continue;
            }
            let all: &mut Figures = calls.entry(runtime.to_string()).or_default();
            for (name, values) in times.0 {
                for value in values {
                    all.add(&name, value);
                }
            }
        }
        println!("bench: {round} of {pods} pods of each runtime");
    }
    print_calls(&calls);
    print_figures("timeline of a start, ms", &boot);
    print_figures("memory per pod with one idle container, MiB", &memory);
    write_json(file, &calls, &boot, &memory)
}

async fn one_pod(
    node: &Node,
    round: usize,
    times: &mut Figures,
    boot: &mut Figures,
    memory: &mut Figures,
) -> Result<()> {
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
        for (phase, milliseconds) in report::boot_timeline(&info)? {
            boot.add(&phase, milliseconds);
        }
        for (phase, milliseconds) in report::container_timeline(&info, &container.id)? {
            boot.add(&format!("container: {phase}"), milliseconds);
        }
        measure_memory(&pod, &info, memory)?;
    }
    timed(times, "StopPodSandbox", pod.stop()).await?;
    timed(times, "RemovePodSandbox", pod.remove()).await
}

async fn timed<T>(times: &mut Figures, call: &str, future: impl Future<Output = Result<T>>) -> Result<T> {
    let start = Instant::now();
    let outcome = Box::pin(future).await;
    times.add(call, start.elapsed().as_secs_f64() * 1e3);
    outcome
}

fn measure_memory(pod: &Pod, info: &serde_json::Value, memory: &mut Figures) -> Result<()> {
    let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
    let mut add = |name: &str, bytes: f64| memory.add(name, bytes / f64::from(1 << 20));
    add("machine, PSS", machine::proportional_memory(machine.pid)?);
    add("controller, PSS (for all pods)", machine::proportional_memory(machine::controller_pid()?)?);
    let resident = info["pericarp"]["residentBytes"].as_f64();
    add("guest pages resident", resident.with_context(|| format!("no residentBytes in {info}"))?);
    Ok(())
}

fn print_calls(calls: &BTreeMap<String, Figures>) {
    println!(
        "\n{:<18}{:>12}{:>12}{:>12}{:>12}{:>8}",
        "call, ms", "pericarp p50", "p95", "runc p50", "p95", "ratio"
    );
    for call in CALLS {
        let of = |runtime: &str| calls.get(runtime).and_then(|figures| figures.of(call));
        let (Some(ours), Some(theirs)) = (of("pericarp"), of("runc")) else { continue };
        let ratio = ours.p50 / theirs.p50;
        println!(
            "{call:<18}{:>12.0}{:>12.0}{:>12.0}{:>12.0}{ratio:>8.2}",
            ours.p50, ours.p95, theirs.p50, theirs.p95
        );
    }
}

fn print_figures(title: &str, figures: &Figures) {
    println!("\n{title:<44}{:>9}{:>9}", "p50", "p95");
    for (name, summary) in figures.summaries() {
        println!("  {name:<42}{:>9.1}{:>9.1}", summary.p50, summary.p95);
    }
}

fn write_json(file: &str, calls: &BTreeMap<String, Figures>, boot: &Figures, memory: &Figures) -> Result<()> {
    let object = |figures: &Figures| {
        let summaries = figures.summaries().into_iter();
        summaries.map(|(name, summary)| (name.to_owned(), json!(summary))).collect::<serde_json::Map<_, _>>()
    };
    let calls: serde_json::Map<_, _> =
        calls.iter().map(|(runtime, figures)| (runtime.clone(), object(figures).into())).collect();
    let report = json!({
        "node_kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "calls_ms": calls,
        "timeline_ms": object(boot),
        "memory_mib": object(memory),
    });
    fs::write(file, serde_json::to_vec_pretty(&report)?).with_context(|| format!("write {file}"))
}
