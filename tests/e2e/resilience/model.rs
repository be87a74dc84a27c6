//! Random operations, and after each of them a comparison with what should be there.
//!
//! `PERICARP_SOAK_SEED` replays a run, `PERICARP_SOAK_OPERATIONS` makes it longer: see `scripts/soak`.

mod cancellation;
mod random;

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use pericarp_tests::{
    Container, Node, Pod, api,
    node::{
        containerd::StoppedContainerd,
        controller::{KilledController, NODE_RUN_DIR, pod_directories},
        machine::MachineProcess,
        process,
    },
    on_pericarp_alone_for, wait_until,
};
use rustix::process::Signal;
use tokio::time::timeout;
use tonic::{Code, Status};

use self::{
    cancellation::Call,
    random::{Random, number},
};
use super::{
    clean_up, directory,
    faults::{OF_REMOVAL, OF_START, OF_STOP},
    wait_until_ready,
};

/// The operations of each of the two runs by default: few, because everybody waits for them with every change.
const OPERATIONS: u32 = 20;
/// The seed by default: always the same, so that a failure is the fault of what has changed. `scripts/soak` explores.
const SEED: u64 = 1;
/// How long one operation may take, which is far longer than any does. One that hangs is reported with what the guests
/// have printed, long before the run's own limit.
const OPERATION_LIMIT: Duration = Duration::from_secs(300);

/// The time limit of a run, for each of its operations.
const LIMIT_EACH: Duration = Duration::from_secs(24);
const PODS_MAX: usize = 3;
const CONTAINERS_MAX: usize = 3;
/// By how many bytes the controller's memory may grow.
const GROWTH_MAX: f64 = 2.0 * 1024.0 * 1024.0;

/// Further fault points, which a controller may reach during any operation.
const OTHER_POINTS: [&str; 6] = [
    "container-looked-up",
    "container-prepared",
    "container-released",
    "event-handed-on",
    "machine-ended",
    "end-recorded",
];

/// What may happen to the controller during an operation.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// The controller is killed when it reaches a fault point.
    At(&'static str),
    /// The controller is killed so many milliseconds after the operation began.
    After(u64),
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    RunPod,
    StartContainer,
    Exec,
    StopContainer,
    RemoveContainer,
    StopPod,
    RemovePod,
    KillMachine,
    KillController,
    DamageRecord,
    RestartContainerd(Signal),
    GiveUp(Call),
}

impl Operation {
    /// Whether the operation kills the controller itself, or leaves it unable to read where to die.
    fn is_a_fault(self) -> bool {
        matches!(self, Self::KillController | Self::DamageRecord | Self::RestartContainerd(_))
    }
}

/// The pods and containers that should exist.
struct Model<'a> {
    node: &'a Node,
    random: Random,
    pods: Vec<ModelPod>,
    names: u32,
}

struct ModelPod {
    pod: Pod,
    runs: bool,
    containers: Vec<ModelContainer>,
}

struct ModelContainer {
    container: Container,
    runs: bool,
}

impl Model<'_> {
    fn choose(&mut self, with_faults: bool) -> (Operation, Fault) {
        let operation = match self.random.below(if with_faults { 100 } else { 84 }) {
            0..14 if self.pods.len() < PODS_MAX => Operation::RunPod,
            0..8 | 75..80 => Operation::RemovePod,
            8..12 => Operation::GiveUp(Call::RunPod),
            12..15 => Operation::GiveUp(Call::StartContainer),
            15..17 => Operation::GiveUp(Call::StopPod),
            17..36 => Operation::StartContainer,
            36..52 => Operation::Exec,
            52..62 => Operation::StopContainer,
            62..70 => Operation::RemoveContainer,
            70..75 => Operation::StopPod,
            80..84 => Operation::KillMachine,
            84..92 => Operation::KillController,
            92..96 => Operation::DamageRecord,
            96..98 => Operation::RestartContainerd(Signal::TERM),
            _ => Operation::RestartContainerd(Signal::KILL),
        };
        let points = [&OF_START[..], &OF_STOP, &OF_REMOVAL, &OTHER_POINTS].concat();
        let fault = match self.random.below(6) {
            _ if operation.is_a_fault() || matches!(operation, Operation::GiveUp(_)) => Fault::None,
            0 | 1 if with_faults => Fault::At(points[self.random.below(points.len())]),
            2 if with_faults => Fault::After(self.random.next() % 1500),
            _ => Fault::None,
        };
        (operation, fault)
    }

    /// A random pod; one that runs if `running` is set.
    fn any_pod(&mut self, running: bool) -> Option<usize> {
        let fit: Vec<_> = (0..self.pods.len()).filter(|at| self.pods[*at].runs || !running).collect();
        (!fit.is_empty()).then(|| fit[self.random.below(fit.len())])
    }

    /// A random container; one that runs if `running` is set.
    fn any_container(&mut self, running: bool) -> Option<(usize, usize)> {
        let mut fit = Vec::new();
        for (pod, of_pod) in self.pods.iter().enumerate() {
            for (at, container) in of_pod.containers.iter().enumerate() {
                if container.runs || !running {
                    fit.push((pod, at));
                }
            }
        }
        (!fit.is_empty()).then(|| fit[self.random.below(fit.len())])
    }

    fn name(&mut self, kind: &str) -> String {
        self.names += 1;
        format!("{kind}-{}", self.names)
    }

    /// Does the operation and corrects the model. Returns false if there was nothing to do it to.
    async fn apply(&mut self, operation: Operation, fault: Fault) -> Result<bool> {
        match operation {
            Operation::RunPod => self.run_pod(fault).await,
            Operation::RemovePod => self.remove_pod(fault).await,
            Operation::StartContainer => self.start_container(fault).await,
            Operation::Exec => self.exec(fault).await,
            Operation::StopContainer => self.stop_container(fault).await,
            Operation::RemoveContainer => self.remove_container(fault).await,
            Operation::StopPod => self.stop_pod(fault).await,
            Operation::KillMachine => self.kill_machine(fault).await,
            Operation::KillController => {
                KilledController::kill()?.restart().await?;
                Ok(true)
            }
            Operation::DamageRecord => self.damage_record().await,
            Operation::GiveUp(call) => self.give_up(call).await,
            Operation::RestartContainerd(signal) => {
                StoppedContainerd::stop(signal).await?.restart(self.node).await?;
                Ok(true)
            }
        }
    }

    async fn run_pod(&mut self, fault: Fault) -> Result<bool> {
        let name = self.name("pod");
        let (run, hit) = during(fault, Box::pin(self.node.pod(&name).try_run())).await?;
        let mut run = run?;
        let undialled = |error: &Status| !hit && error.code() == Code::Unavailable;
        if run.as_ref().is_err_and(undialled) {
            // Where the last fault has left no pod, nothing has had containerd dial the new controller yet.
            wait_until("a controller in containerd's eyes", async || {
                run = Box::pin(self.node.pod(&name).try_run()).await?;
                Ok(!run.as_ref().is_err_and(undialled))
            })
            .await?;
        }
        match run {
            Ok(pod) => self.pods.push(ModelPod { pod, runs: true, containers: Vec::new() }),
            Err(error) => ensure!(hit, "RunPodSandbox without a fault: {error}"),
        }
        Ok(true)
    }

    async fn start_container(&mut self, fault: Fault) -> Result<bool> {
        let Some(at) = self.any_pod(true) else { return Ok(false) };
        if self.pods[at].containers.len() == CONTAINERS_MAX {
            return Ok(false);
        }
        let name = self.name("container");
        let script = "trap 'exit 3' TERM; echo started; while :; do sleep 1 & wait; done";
        let container = self.pods[at].pod.container(&name).script(script).create().await?;
        let (started, hit) = during(fault, container.try_start()).await?;
        match started {
            Ok(()) => {
                // Before that, nothing in it minds a TERM.
                container.wait_for_output("started\n").await?;
                self.pods[at].containers.push(ModelContainer { container, runs: true });
            }
            Err(error) => {
                ensure!(hit, "StartContainer without a fault: {error}");
                wait_until("its removal", async || container.remove().await.map(|()| true)).await?;
            }
        }
        Ok(true)
    }

    async fn exec(&mut self, fault: Fault) -> Result<bool> {
        let Some((pod, at)) = self.any_container(true) else { return Ok(false) };
        let word = self.name("word");
        let command = format!("echo {word}");
        let container = &self.pods[pod].containers[at].container;
        let (said, _) = during(fault, container.shell(&command)).await?;
        // Whatever became of the controller: a container does not need it.
        ensure!(said? == word, "another word than {word}");
        Ok(true)
    }

    async fn stop_container(&mut self, fault: Fault) -> Result<bool> {
        let Some((pod, at)) = self.any_container(true) else { return Ok(false) };
        let container = &mut self.pods[pod].containers[at];
        let (stopped, _) = during(fault, container.container.stop(30)).await?;
        stopped?;
        container.runs = false;
        let status = container.container.wait_for_exit().await?;
        ensure!(status.exit_code == 3, "{status:?}");
        Ok(true)
    }

    async fn remove_container(&mut self, fault: Fault) -> Result<bool> {
        let Some((pod, at)) = self.any_container(false) else { return Ok(false) };
        let container = self.pods[pod].containers.remove(at).container;
        let (removed, _) = during(fault, container.remove()).await?;
        removed?;
        Ok(true)
    }

    async fn stop_pod(&mut self, fault: Fault) -> Result<bool> {
        let Some(at) = self.any_pod(false) else { return Ok(false) };
        let pod = &mut self.pods[at];
        let (stopped, hit) = during(fault, pod.pod.stop()).await?;
        if let Err(error) = stopped {
            ensure!(hit, "StopPodSandbox without a fault: {error:#}");
            // containerd takes its time to dial a new controller.
            wait_until("the pod's stop", async || pod.pod.stop().await.map(|()| true)).await?;
        }
        pod.end();
        Ok(true)
    }

    async fn remove_pod(&mut self, fault: Fault) -> Result<bool> {
        let Some(at) = self.any_pod(false) else { return Ok(false) };
        let pod = self.pods.remove(at).pod;
        let (removed, hit) = during(fault, self.node.remove_pod(&pod.id)).await?;
        if let Err(error) = removed {
            ensure!(hit, "RemovePodSandbox without a fault: {error:#}");
        }
        clean_up(self.node, &pod.id).await?;
        Ok(true)
    }

    async fn kill_machine(&mut self, fault: Fault) -> Result<bool> {
        let Some(at) = self.any_pod(true) else { return Ok(false) };
        let pod = &mut self.pods[at];
        let machine = MachineProcess::of_pod(&pod.pod.id)?.context("the pod's machine")?;
        let (killed, _) = during(fault, async { machine.kill() }).await?;
        killed?;
        pod.end();
        Ok(true)
    }

    async fn damage_record(&mut self) -> Result<bool> {
        let Some(at) = self.any_pod(false) else { return Ok(false) };
        let killed = KilledController::kill()?;
        let file = ["state.json", "progress.json"][self.random.below(2)];
        let path = directory(&self.pods[at].pod.id).join(file);
        if let Ok(content) = fs::read(&path) {
            fs::write(&path, &content[..self.random.below(content.len())])?;
        }
        killed.restart().await?;
        Ok(true)
    }

    /// The differences between the node and the model.
    async fn differences(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for pod in &self.pods {
            let runs = pod.pod.is_ready().await?;
            if runs != pod.runs {
                found.push(format!("pod {} is READY: {runs}", pod.pod.id));
            }
            for container in &pod.containers {
                let status = container.container.status().await?;
                if (status.state() == api::ContainerState::ContainerRunning) != container.runs {
                    found.push(format!(
                        "container {} of pod {}: {status:?}",
                        container.container.id, pod.pod.id
                    ));
                }
            }
        }
        let known: BTreeSet<_> = self.node.pods().await?.into_iter().map(|pod| pod.id).collect();
        let expected: BTreeSet<_> = self.pods.iter().map(|pod| pod.pod.id.clone()).collect();
        for stray in known.difference(&expected) {
            // A start that was cut off has left it; kubelet removes it.
            if let Err(error) = self.node.remove_pod(stray).await {
                found.push(format!("pod {stray} cannot be removed: {error:#}"));
            }
        }
        let machines: BTreeSet<_> = MachineProcess::all()?.into_iter().collect();
        let running: BTreeSet<_> =
            self.pods.iter().filter(|pod| pod.runs).map(|pod| pod.pod.id.clone()).collect();
        if machines != running {
            found.push(format!("machines of {machines:?}; expected of {running:?}"));
        }
        let directories = pod_directories(Path::new(NODE_RUN_DIR))?;
        if directories.iter().any(|id| !expected.contains(id)) {
            found.push(format!("directories of {directories:?}; pods are {expected:?}"));
        }
        Ok(found)
    }

    /// Waits until there is no difference.
    async fn agrees(&self) -> Result<()> {
        // containerd takes its time to dial a new controller.
        wait_until("what the model expects", async || {
            let found = self.differences().await?;
            ensure!(found.is_empty(), "{}", found.join("\n"));
            Ok(true)
        })
        .await
    }

    async fn remove_all(&mut self) -> Result<()> {
        for pod in std::mem::take(&mut self.pods) {
            clean_up(self.node, &pod.pod.id).await?;
        }
        Ok(())
    }
}

impl ModelPod {
    fn end(&mut self) {
        self.runs = false;
        for container in &mut self.containers {
            container.runs = false;
        }
    }
}

/// Lets a fault happen during an operation; returns the result of the operation and whether the controller was killed.
async fn during<T>(fault: Fault, operation: impl Future<Output = T>) -> Result<(T, bool)> {
    match fault {
        Fault::None => Ok((operation.await, false)),
        Fault::At(point) => {
            let pending_kill = KilledController::kill_at(point)?;
            let result = operation.await;
            let dead = pending_kill.withdraw().await?;
            let hit = dead.is_some();
            if let Some(dead) = dead {
                dead.restart().await?;
            }
            Ok((result, hit))
        }
        Fault::After(milliseconds) => {
            let kill = async {
                tokio::time::sleep(Duration::from_millis(milliseconds)).await;
                // While the operation goes on.
                KilledController::kill()?.restart().await
            };
            let (result, killed) = tokio::join!(operation, kill);
            killed?;
            Ok((result, true))
        }
    }
}

/// The files that the node's controller has open, and its memory in bytes.
fn size_of_controller() -> Result<(Vec<String>, f64)> {
    let pid = process::controller_pid()?;
    let mut open = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One may be closed meanwhile.
        if let Ok(target) = fs::read_link(entry?.path()) {
            open.push(target.display().to_string());
        }
    }
    open.sort();
    Ok((open, process::proportional_memory(pid)?))
}

/// Runs a test with a model and the number of operations that were asked for.
fn with_model(test: impl AsyncFnOnce(&mut Model<'_>, u32) -> Result<()>) -> Result<()> {
    let operations = number("PERICARP_SOAK_OPERATIONS")?.map_or(Ok(OPERATIONS), u32::try_from)?;
    let seed = number("PERICARP_SOAK_SEED")?.unwrap_or(SEED);
    println!("PERICARP_SOAK_SEED={seed} PERICARP_SOAK_OPERATIONS={operations}");
    on_pericarp_alone_for(operations * LIMIT_EACH, async |node| {
        let mut model = Model { node, random: Random::new(seed), pods: Vec::new(), names: 0 };
        test(&mut model, operations).await
    })
}

#[test]
fn nothing_is_lost_or_left_behind_by_random_operations_and_faults() -> Result<()> {
    with_model(async |model, operations| {
        run(model, operations, true).await?;
        model.remove_all().await?;
        model.agrees().await.context("after all pods were removed")
    })
}

#[test]
fn nothing_is_left_in_a_controller_by_random_operations() -> Result<()> {
    with_model(async |model, operations| {
        // From the first pod on, while it is not killed.
        KilledController::kill()?.restart().await?;
        let warm = model.node.pod("warm").run().await?;
        wait_until_ready(&warm).await?;
        warm.idle_container("idle").await?;
        clean_up(model.node, &warm.id).await?;
        let before = size_of_controller()?;
        run(model, operations, false).await?;
        model.remove_all().await?;
        model.agrees().await.context("after all pods were removed")?;
        let mut after = size_of_controller()?;
        let closed = wait_until("as few open descriptors as before", async || {
            after = size_of_controller()?;
            Ok(after.0.len() <= before.0.len())
        })
        .await;
        println!(
            "the controller's descriptors and memory: {} and {} bytes, in the end {} and {} bytes",
            before.0.len(),
            before.1,
            after.0.len(),
            after.1
        );
        closed.with_context(|| format!("open in the end: {:?}; before: {:?}", after.0, before.0))?;
        ensure!(after.1 <= before.1 + GROWTH_MAX, "the controller has grown by {} bytes", after.1 - before.1);
        Ok(())
    })
}

/// Prints what the guests of all pods have printed.
fn print_consoles(model: &Model<'_>) -> Result<()> {
    for ModelPod { pod, .. } in &model.pods {
        let console = fs::read(directory(&pod.id).join("console.log"))?;
        println!("the console of pod {}:\n{}", pod.id, String::from_utf8_lossy(&console));
    }
    Ok(())
}

async fn run(model: &mut Model<'_>, operations: u32, with_faults: bool) -> Result<()> {
    let begun = Instant::now();
    let mut done = 0;
    while done < operations {
        let (operation, fault) = model.choose(with_faults);
        let line = format!("{done}: {operation:?} {fault:?}");
        let applied = timeout(OPERATION_LIMIT, model.apply(operation, fault)).await;
        if applied.is_err() {
            print_consoles(model)?;
        }
        if applied.with_context(|| format!("{line} hangs"))?.with_context(|| line.clone())? {
            model.agrees().await.with_context(|| format!("after {line}"))?;
            println!("{:7.2} s {line}", begun.elapsed().as_secs_f64());
            done += 1;
        }
    }
    Ok(())
}
