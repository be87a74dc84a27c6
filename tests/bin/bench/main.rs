//! Pericarp's pods beside runc's on the same node, run by `scripts/bench`: `bench PODS JSON_FILE`,
//! `bench streams JSON_FILE` for standard input and output alone, or `bench at-once PODS JSON_FILE` for many pods.
//!
//! Prints tables; the file has every figure.

mod calls;
mod density;
mod figures;
mod network;
mod streams;

use std::{env, fs};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["streams", file] => streams_only(file).await,
        ["at-once", pods, file] => at_once(number(pods)?, file).await,
        [pods, file] => all(number(pods)?, file).await,
        _ => bail!("usage: bench PODS|streams|at-once PODS JSON_FILE"),
    }
}

fn number(pods: &str) -> Result<usize> {
    pods.parse().with_context(|| format!("number of pods {pods:?}"))
}

async fn all(pods: usize, file: &str) -> Result<()> {
    let streams = Box::pin(streams::measure()).await?;
    let network = Box::pin(network::measure(pods)).await?;
    let calls = Box::pin(calls::measure(pods)).await?;
    calls.times.print("call, ms");
    calls.timeline.print("timeline of a start, ms");
    calls.memory.print("memory per pod with one idle container, MiB");
    streams.print("standard input and output");
    network.traffic.print("between node and pod");
    network.cpu.print("CPU of the machine's threads, ms per MiB");
    network.exits.print("exits of the guest per answer of a byte");
    network.start.print("start of a pod without CNI, ms");
    let report = json!({
        "node_kernel": fs::read_to_string("/proc/sys/kernel/osrelease")?.trim(),
        "calls_ms": calls.times.json(),
        "timeline_ms": calls.timeline.json(),
        "memory_mib": calls.memory.json(),
        "streams": streams.json(),
        "traffic": network.traffic.json(),
        "machine_cpu_ms_per_mib": network.cpu.json(),
        "exits_per_answer": network.exits.json(),
        "start_without_cni_ms": network.start.json(),
    });
    write(file, &report)
}

fn write(file: &str, report: &Value) -> Result<()> {
    fs::write(file, serde_json::to_vec_pretty(report)?).with_context(|| format!("write {file}"))
}

async fn at_once(pods: usize, file: &str) -> Result<()> {
    let density = Box::pin(density::measure(pods)).await?;
    density.times.print(&format!("{pods} pods at once, ms"));
    density.costs.print("what they cost");
    write(file, &json!({ "times_ms": density.times.json(), "costs": density.costs.json() }))
}

async fn streams_only(file: &str) -> Result<()> {
    let streams = Box::pin(streams::measure()).await?;
    streams.print("standard input and output");
    write(file, &streams.json())
}
