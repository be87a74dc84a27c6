//! A first look at Pericarp on a node, run by `scripts/quickstart`: one pod from `RunPodSandbox` to `RemovePodSandbox`.

use std::{fs, time::Instant};

use anyhow::{Context, Result};
use pericarp_tests::{Node, Runtime, cri::timeline, node::machine::MachineProcess};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let node = Node::connect(Runtime::Pericarp, "quickstart").await?;
    let outcome = tour(&node).await;
    node.clean_up().await.context("clean up")?;
    outcome
}

async fn tour(node: &Node) -> Result<()> {
    let of_node = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!(
        "the node's kernel is {}, its name {}",
        of_node.trim(),
        fs::read_to_string("/proc/sys/kernel/hostname")?.trim()
    );

    let start = Instant::now();
    let pod = node.pod("hello").run().await?;
    println!("RunPodSandbox: pod {} after {:.0?}", &pod.id[..12], start.elapsed());
    let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
    println!("the pod is process {} on the node, a virtual machine", machine.pid);

    let start = Instant::now();
    let script = "echo kernel: $(uname -r); echo hostname: $(hostname)
        grep MemTotal /proc/meminfo; exec sleep infinity";
    let container = pod.container("hello").script(script).start().await?;
    println!("CreateContainer, StartContainer: after {:.0?}; its log:", start.elapsed());
    while container.log()?.lines.len() < 3 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    for line in container.log()?.stdout().lines() {
        println!("    {line}");
    }

    let start = Instant::now();
    let output = container.shell("cat /proc/cmdline; ps").await?;
    println!(
        "ExecSync: after {:.0?}; the guest's kernel command line, and the container's processes:",
        start.elapsed()
    );
    for line in output.lines() {
        println!("    {line}");
    }

    let info = pod.info().await?;
    println!("the controller's timeline of the pod's start, in milliseconds:");
    print_phases(&timeline::boot_timeline(&info)?);
    println!("and of the container's:");
    print_phases(&timeline::container_timeline(&info, &container.id)?);

    let start = Instant::now();
    pod.stop().await?;
    pod.remove().await?;
    println!("StopPodSandbox, RemovePodSandbox: after {:.0?}", start.elapsed());
    Ok(())
}

fn print_phases(phases: &[(String, f64)]) {
    for (phase, milliseconds) in phases {
        println!("    {phase:<14} {milliseconds:8.1}");
    }
}
