//! The frame that every end-to-end test runs in: it connects to the node, limits the test's time, records how long the
//! test took, and cleans up.

use std::{
    fs::File,
    io::{self, Write as _},
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{PoisonError, RwLock},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures::FutureExt;
use tokio::time::timeout;

use super::pool;
use crate::{Node, Runtime};

/// Where a test appends how long it took, on a node that collects results. `tests/node/deal` deals tests to nodes by
/// it.
const DURATIONS: &str = "/results/durations";

/// A test that takes longer than this has hung. Cleaning up has as long again.
const TEST_LIMIT: Duration = Duration::from_secs(900);

/// Every test holds this lock for reading; one that needs the node for itself holds it for writing.
static NODE_IN_USE: RwLock<()> = RwLock::new(());

/// Whether other tests may run on the node at the same time. The names are the phases of `tests/durations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isolation {
    /// Other tests may.
    Shared,
    /// None may, because the test takes away what all of them need.
    Alone,
}

/// Runs one test: gives it a node, bounds its time, and removes every pod it made, also when the test fails.
pub fn on_node(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    run(Isolation::Shared, TEST_LIMIT, test)
}

/// Like [`on_node`], for a test of something that only Pericarp has.
pub fn on_pericarp(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    unless_runc(|| run(Isolation::Shared, TEST_LIMIT, test))
}

/// Like [`on_pericarp`], for a test that takes away what all others need: no other runs at the same time.
pub fn on_pericarp_alone(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    on_pericarp_alone_for(TEST_LIMIT, test)
}

/// Like [`on_pericarp_alone`], with a time limit of the caller's choice.
pub fn on_pericarp_alone_for(limit: Duration, test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    unless_runc(|| run(Isolation::Alone, limit, test))
}

/// Like [`on_node`], for a test that takes away what all others need: no other runs at the same time.
pub fn on_node_alone(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    run(Isolation::Alone, TEST_LIMIT, test)
}

fn unless_runc(test: impl FnOnce() -> Result<()>) -> Result<()> {
    match Runtime::under_test() {
        Runtime::Pericarp => test(),
        Runtime::Runc => {
            // The test harness captures what `eprintln!` writes, but not this, which `scripts/test` repeats at its end.
            let _ = writeln!(io::stderr(), "\nskipped: not for runc");
            Ok(())
        }
    }
}

fn run(isolation: Isolation, limit: Duration, test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    let (_shared, _alone) = match isolation {
        Isolation::Shared => (Some(NODE_IN_USE.read().unwrap_or_else(PoisonError::into_inner)), None),
        Isolation::Alone => (None, Some(NODE_IN_USE.write().unwrap_or_else(PoisonError::into_inner))),
    };
    with_recorded_duration(isolation, async |name| {
        let node = Node::connect(Runtime::under_test(), name).await?;
        if isolation == Isolation::Alone {
            pool::remove_idle(&node).await?;
        }
        let bounded = async { timeout(limit, test(&node)).await.context("the test ran into its limit")? };
        let outcome = AssertUnwindSafe(bounded).catch_unwind().await;
        let succeeded = matches!(outcome, Ok(Ok(())));
        let cleanup = async {
            let returned = node.return_pooled_pods(succeeded).await;
            node.clean_up().await.and(returned)
        };
        let cleanup = timeout(TEST_LIMIT, cleanup).await.context("cleaning up ran into its limit");
        let cleanup = cleanup.and_then(|cleanup| cleanup.context("clean up"));
        if let (false, Err(error)) = (succeeded, &cleanup) {
            // What is reported is why the test failed.
            eprintln!("after the test's failure: {error:?}");
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic))?;
        cleanup
    })
}

/// Runs one test of a machine that the test itself starts, without containerd and without a controller.
pub fn without_containerd(test: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let _in_use = NODE_IN_USE.read().unwrap_or_else(PoisonError::into_inner);
    with_recorded_duration(Isolation::Shared, async |_| {
        timeout(TEST_LIMIT, test()).await.context("the test ran into its limit")?
    })
}

/// Runs a test, gives it its own name, and appends how long it took to [`DURATIONS`].
fn with_recorded_duration(isolation: Isolation, test: impl AsyncFnOnce(&str) -> Result<()>) -> Result<()> {
    let executor = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    executor.block_on(async {
        let start = Instant::now();
        let name = thread::current().name().unwrap_or("test").to_owned();
        let outcome = AssertUnwindSafe(test(&name)).catch_unwind().await;
        if let Ok(mut file) = File::options().append(true).create(true).open(DURATIONS) {
            let (seconds, isolation) =
                (start.elapsed().as_secs_f64(), format!("{isolation:?}").to_lowercase());
            writeln!(file, "{seconds:.1} {isolation} e2e {name}")?;
        }
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    })
}
