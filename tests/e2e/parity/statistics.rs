//! The numbers of a container and of a pod, beside runc's for the same load.

use std::fs;

use anyhow::{Context, Result, ensure};
use pericarp_tests::{
    Container, Node, Pod, Runtime, api,
    node::{contention::BusyProcess, machine::MachineProcess},
    on_pericarp_alone, wait_until,
};

/// The load: so much of a CPU's time, so much memory, and a file of so many bytes.
const CPU_MS: u64 = 4000;
const MEMORY_MIB: u64 = 128;
const FILE_MIB: u64 = 32;
/// How far a number may be from runc's, in hundredths of it.
const TOLERANCE: u64 = 10;
/// How much more CPU time a pod may have had: the machine's own work is the pod's. On a node that emulates its CPU,
/// each exit of the guest, as at each tick of its clock, costs a hundred times as much as on a real one.
const POD_CPU_TOLERANCE: u64 = 30;

/// Writes the file, then takes memory when something is written to `/go`, then works when something is once more.
const SCRIPT: &str = "dd if=/dev/zero of=/file bs=1M count=32 2> /dev/null
    mkfifo /go
    echo waiting
    cat /go
    peer load 0 128 &
    cat /go
    exec peer load 4000 0";

const POD_CPU: &str = "the pod's CPU time, ns";

/// What kubelet takes.
#[derive(Clone, Copy, Debug, Default)]
struct Numbers {
    /// In nanoseconds.
    cpu: u64,
    /// The working set in bytes.
    memory: u64,
}

impl Numbers {
    fn of(cpu: Option<api::CpuUsage>, memory: Option<api::MemoryUsage>) -> Result<Self> {
        let cpu = cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("no CPU time")?.value;
        let memory = memory.and_then(|memory| memory.working_set_bytes).context("no working set")?.value;
        Ok(Self { cpu, memory })
    }

    async fn of_container(container: &Container) -> Result<Self> {
        let stats = container.stats().await?;
        Self::of(stats.cpu, stats.memory)
    }

    async fn of_pod(pod: &Pod) -> Result<Self> {
        let stats = pod.stats().await?.linux.context("no statistics of Linux")?;
        Self::of(stats.cpu, stats.memory)
    }
}

/// What a load adds to a container's and a pod's numbers, by their names.
async fn cost(node: &Node) -> Result<[(&'static str, u64); 5]> {
    let pod = node.pod(&node.runtime.to_string()).run().await?;
    let container = pod.container("load").script(SCRIPT).start().await?;
    let numbers =
        async || anyhow::Ok([Numbers::of_container(&container).await?, Numbers::of_pod(&pod).await?]);
    container.wait_for_output("waiting\n").await?;
    let at_first = numbers().await?;
    container.shell("echo 1 > /go").await?;
    container.wait_for_output("waiting\n1\nloaded\n").await?;
    let with_memory = numbers().await?;
    container.shell("echo 2 > /go").await?;
    container.wait_for_output("waiting\n1\nloaded\n2\nloaded\n").await?;
    let at_last = numbers().await?;
    let mut file = 0;
    // containerd looks at the snapshots every ten seconds.
    wait_until("the container's file to be counted", async || {
        let layer = container.stats().await?.writable_layer.and_then(|layer| layer.used_bytes);
        file = layer.map_or(0, |bytes| bytes.value);
        Ok(file >= FILE_MIB << 20)
    })
    .await?;
    pod.stop().await?;
    pod.remove().await?;
    let memory = |of: usize| with_memory[of].memory.saturating_sub(at_first[of].memory);
    let cpu = |of: usize| at_last[of].cpu.saturating_sub(with_memory[of].cpu);
    Ok([
        ("the container's CPU time, ns", cpu(0)),
        ("the container's memory, bytes", memory(0)),
        ("the container's files, bytes", file),
        (POD_CPU, cpu(1)),
        ("the pod's memory, bytes", memory(1)),
    ])
}

#[test]
fn a_load_is_counted_as_it_is_of_runc() -> Result<()> {
    // Alone, as what else the node does slows a machine's exits.
    on_pericarp_alone(async |node| {
        let theirs = cost(&node.with_runtime(Runtime::Runc)).await?;
        let ours = cost(node).await?;
        println!("{theirs:?}\n{ours:?}");
        let nominal = [CPU_MS * 1_000_000, MEMORY_MIB << 20, FILE_MIB << 20];
        for ((what, number), expected) in theirs.iter().zip(nominal) {
            ensure!(
                *number > expected / 10 * 8,
                "{what}: {number} of runc: the load is not what it should be"
            );
        }
        for ((what, ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            let more = if what == POD_CPU { POD_CPU_TOLERANCE } else { TOLERANCE };
            let range = theirs / 100 * (100 - TOLERANCE)..=theirs / 100 * (100 + more);
            ensure!(range.contains(&ours), "{what}: {ours}, of runc {theirs}");
        }
        Ok(())
    })
}

/// A guest's kernel has to know when its vCPU did not run (`CONFIG_PARAVIRT_TIME_ACCOUNTING`).
#[test]
fn a_container_is_charged_for_the_cpu_that_it_has_had_and_not_for_what_it_waited() -> Result<()> {
    on_pericarp_alone(async |node| {
        let pod = node.pod("waits").run().await?;
        let container = pod.container("waits").script("mkfifo /go && cat /go && exec peer load 3000 1");
        let container = container.start().await?;
        let machine = MachineProcess::of_pod(&pod.id)?.context("the pod's machine")?;
        let busy = BusyProcess::start()?;
        let (charged_before, before) =
            (Numbers::of_container(&container).await?.cpu, schedstat(machine.pid)?);
        container.shell("echo go > /go").await?;
        container.wait_for_output("go\nloaded\n").await?;
        let (charged_after, after) = (Numbers::of_container(&container).await?.cpu, schedstat(machine.pid)?);
        drop(busy);
        let charged = charged_after - charged_before;
        let [worked, waited] = [after[0] - before[0], after[1] - before[1]];
        println!("charged {charged} ns; the machine worked {worked} ns and waited {waited} ns");
        ensure!(waited > 1_000_000_000, "its vCPU waited {waited} ns: the test shows nothing");
        // The machine's own work comes on top of the container's.
        ensure!(charged < worked + worked / 10, "{charged} ns are charged; the machine worked {worked} ns");
        // A little of that was worked before the shell became the load.
        ensure!(charged > 2_500_000_000, "{charged} ns are charged for 3 s of work");
        Ok(())
    })
}

/// How long a process's threads had a CPU, and how long they waited for one, in nanoseconds (kernel:
/// `Documentation/scheduler/sched-stats.rst`).
fn schedstat(pid: i32) -> Result<[u64; 2]> {
    let mut sums = [0; 2];
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = thread?.path().join("schedstat");
        let line = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let mut numbers = line.split_whitespace();
        for sum in &mut sums {
            let number = numbers.next().context("too few fields")?;
            *sum += number.parse::<u64>().with_context(|| format!("{}: {line:?}", path.display()))?;
        }
    }
    Ok(sums)
}
