//! How fast output and input go through: a container's log, and the streams of an exec.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use pericarp_tests::{Container, Node, Runtime, cri::streams::Terminal};

use crate::figures::Comparison;

const MEBIBYTE: usize = 1 << 20;
/// What goes through at once, in MiB and in bytes.
const TRANSFER_MIB: u32 = 4;
const TRANSFER: usize = TRANSFER_MIB as usize * MEBIBYTE;
/// How often each transfer is repeated.
const TRANSFERS: usize = 3;
/// A line of a log: 100 bytes with its end.
const LINE: &str =
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 abcdefghijklmnopqrstuvw";

/// Both pods exist all the time, and the runtimes take turns.
pub async fn measure() -> Result<Comparison> {
    let ours = Node::connect(Runtime::Pericarp, "bench-streams").await?;
    let outcome = transfers(&ours).await;
    ours.clean_up().await?;
    outcome.context("measure streams")
}

async fn transfers(ours: &Node) -> Result<Comparison> {
    let mut measured = Comparison::default();
    let theirs = ours.with_runtime(Runtime::Runc);
    let mut pods = Vec::new();
    for node in [&theirs, ours] {
        let pod = node.pod(&node.runtime.to_string()).run().await?;
        let container = pod.idle_container("idle").await?;
        pods.push((node.runtime, pod, container));
    }
    for round in 0..TRANSFERS {
        for (runtime, pod, container) in &pods {
            let figures = measured.of(*runtime);
            let lines = format!("yes '{LINE}' | head -c {TRANSFER}");
            let start = Instant::now();
            let writer = pod.container(&format!("log-{round}")).script(&lines).start().await?;
            writer.wait_for_exit().await?;
            figures.add("log of lines, MiB/s", rate(start));
            ensure!(writer.log()?.stdout().len() >= TRANSFER, "the log is not whole");
            figures.add("exec output of lines, MiB/s", output(container, &lines).await?);
            let blocks = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", TRANSFER >> 16);
            figures.add("exec output of 64 KiB blocks, MiB/s", output(container, &blocks).await?);
            figures.add("exec input, MiB/s", input(container).await?);
        }
        println!("bench: {} of {TRANSFERS} rounds of streams", round + 1);
    }
    Ok(measured)
}

fn rate(start: Instant) -> f64 {
    f64::from(TRANSFER_MIB) / start.elapsed().as_secs_f64()
}

async fn output(container: &Container, script: &str) -> Result<f64> {
    let start = Instant::now();
    let session = container.exec_stream(["sh", "-c", script], Terminal::No).await?;
    let length = session.wait_for_end().await?.stdout.len();
    ensure!(length == TRANSFER, "{length} bytes have arrived of {TRANSFER}");
    Ok(rate(start))
}

async fn input(container: &Container) -> Result<f64> {
    let start = Instant::now();
    let script = format!("head -c {TRANSFER} | wc -c");
    let mut session = container.exec_stream(["sh", "-c", &script], Terminal::No).await?;
    let piece = "i".repeat(1 << 15);
    for _ in 0..TRANSFER / piece.len() {
        session.write(&piece).await?;
    }
    let taken = session.wait_for_end().await?.stdout;
    ensure!(taken.trim() == TRANSFER.to_string(), "{taken:?} bytes have arrived of {TRANSFER}");
    Ok(rate(start))
}
