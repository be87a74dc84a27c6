//! Whatever runc and Pericarp can both do, they do alike. Each case runs once under either runtime on the same node,
//! and a comparison, line by line, shows whether its container saw and did the same.
//!
//! A case changes one thing of an ordinary container, which then prints a portrait of itself
//! (`tests/peer/src/portrait.rs`) and whatever else the case asks for. The cases of a table share a pod of each
//! runtime.

mod controls;
mod process;
mod resources;
mod statistics;
mod storage;
mod user_namespaces;

use std::{
    fmt::{self, Write as _},
    fs,
};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt, stream};
use pericarp_tests::{ContainerBuilder, Node, Pod, PodBuilder, Runtime, on_pericarp};

/// Containers of one pod that are made at the same time.
const AT_ONCE: usize = 4;

/// One difference from an ordinary container.
struct Case {
    /// The name of the case in messages, and of its container.
    name: &'static str,
    /// Makes the difference to an ordinary container.
    container: Change,
    /// A script that runs after the portrait.
    script: String,
    /// Whether the container cannot be made or started.
    refused: bool,
}

impl Case {
    /// Marks a case whose container runc refuses, so that it is an error if runc does not.
    fn refused(self) -> Self {
        Self { refused: true, ..self }
    }
}

type Change = Box<dyn Fn(ContainerBuilder, &CaseDirectory) -> ContainerBuilder>;

fn case(
    name: &'static str,
    script: impl Into<String>,
    container: impl Fn(ContainerBuilder, &CaseDirectory) -> ContainerBuilder + 'static,
) -> Case {
    Case { name, container: Box::new(container), script: script.into(), refused: false }
}

/// A directory on the node for the volumes of one case under one runtime. Nothing else writes there, so an error
/// there is a fault of the test, which then panics.
struct CaseDirectory(String);

impl CaseDirectory {
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.0)
    }

    /// Makes a file and returns its path.
    fn file(&self, name: &str, content: &str) -> String {
        let path = self.path(name);
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.directory(parent);
        }
        fs::write(&path, content).unwrap_or_else(|error| panic!("write {path}: {error}"));
        path
    }

    /// Makes an empty directory on the node's disk, which goes with the node, and returns its path.
    fn on_disk(&self) -> String {
        let path = format!("/var/tmp{}", self.0);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("make {path}: {error}"));
        path
    }

    /// Makes a directory and returns its path.
    fn directory(&self, name: &str) -> String {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("make {path}: {error}"));
        path
    }
}

/// The result of a case.
#[derive(PartialEq, Eq)]
enum Outcome {
    /// A call was refused.
    Refused(&'static str, tonic::Code, String),
    /// The container ran to its end.
    Ran { exit_code: i32, reason: String, stdout: String, stderr: String },
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(call, code, message) => {
                writeln!(formatter, "{call} is refused: {code:?}: {message}")
            }
            Self::Ran { exit_code, reason, stdout, stderr } => {
                write!(formatter, "exit code {exit_code} {reason}\n{stdout}{stderr}")
            }
        }
    }
}

impl Outcome {
    /// The lines that are compared. The message of a refusal differs between runtimes and is left out.
    fn lines(&self) -> Vec<String> {
        match self {
            Self::Refused(call, ..) => vec![format!("{call} is refused")],
            Self::Ran { .. } => self.to_string().lines().map(str::to_owned).collect(),
        }
    }
}

/// Runs every case under both runtimes and fails with all differences.
fn compare(pod: impl Fn(PodBuilder) -> PodBuilder, cases: &[Case]) -> Result<()> {
    on_pericarp(async |node| {
        let mut outcomes = Vec::new();
        for runtime in [Runtime::Runc, Runtime::Pericarp] {
            let node = node.with_runtime(runtime);
            let pod =
                pod(node.pod(&runtime.to_string())).with(|config| "parity".clone_into(&mut config.hostname));
            outcomes.push(run(&node, pod.run().await?, cases).await?);
        }
        let mut differences = String::new();
        for ((case, runc), pericarp) in cases.iter().zip(&outcomes[0]).zip(&outcomes[1]) {
            let mut difference = difference(case.name, runc, pericarp);
            if matches!(runc, Outcome::Refused(..)) != case.refused {
                let _ = writeln!(difference, "--- {}: not what was expected of runc\n{runc}", case.name);
            }
            print!("{difference}");
            differences += &difference;
        }
        if differences.is_empty() {
            Ok(())
        } else {
            bail!("Pericarp (+) does not do as runc (-) does:\n{differences}")
        }
    })
}

async fn run(node: &Node, pod: Pod, cases: &[Case]) -> Result<Vec<Outcome>> {
    stream::iter(cases)
        .map(async |case| {
            let place = CaseDirectory(node.directory_for(&format!("{}-{}", node.runtime, case.name))?);
            Box::pin(run_case(&pod, case, &place))
                .await
                .with_context(|| format!("{} under {}", case.name, node.runtime))
        })
        .buffered(AT_ONCE)
        .try_collect()
        .await
}

async fn run_case(pod: &Pod, case: &Case, place: &CaseDirectory) -> Result<Outcome> {
    let container = pod.container(case.name).script(&format!("exec 2>&1\npeer portrait\n{}", case.script));
    let container = match Box::pin((case.container)(container, place).try_create()).await {
        Ok(container) => container,
        Err(status) => {
            return Ok(Outcome::Refused("CreateContainer", status.code(), status.message().into()));
        }
    };
    if let Err(status) = container.try_start().await {
        return Ok(Outcome::Refused("StartContainer", status.code(), status.message().into()));
    }
    let status = container.wait_for_exit().await?;
    let log = container.log()?;
    let outcome = Outcome::Ran {
        exit_code: status.exit_code,
        reason: status.reason,
        stdout: log.stdout(),
        stderr: log.stderr(),
    };
    Ok(outcome)
}

/// The difference between two outcomes as lines with - and +; empty if there is none.
fn difference(name: &str, runc: &Outcome, pericarp: &Outcome) -> String {
    let (old, new) = (runc.lines(), pericarp.lines());
    if old == new {
        return String::new();
    }
    let mut text = format!("--- {name}\n");
    if let (Outcome::Refused(..), _) | (_, Outcome::Refused(..)) = (runc, pericarp) {
        // One line each tells enough: the whole portrait is missing from the other.
        for (sign, outcome) in [('-', runc), ('+', pericarp)] {
            let _ = writeln!(text, "{sign} {}", outcome.to_string().lines().next().unwrap_or_default());
        }
        return text;
    }
    for (sign, lines, others) in [('-', &old, &new), ('+', &new, &old)] {
        let only = lines.iter().filter(|line| !others.contains(line));
        text.extend(only.map(|line| format!("{sign} {line}\n")));
    }
    text
}
