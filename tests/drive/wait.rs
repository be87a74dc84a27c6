//! How long tests wait for something, and how they wait for it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// An operation that takes longer than this has hung. The limit is far above what anything takes on a busy, emulated
/// node, because only a test that fails waits for so long.
pub const HANG_LIMIT: Duration = Duration::from_secs(600);

/// How long [`wait_until`] sleeps between two checks: briefly at first and then ever longer, because each check takes
/// CPU time of the node from the operation that the test waits for.
const INTERVAL_MIN: Duration = Duration::from_millis(20);
const INTERVAL_MAX: Duration = Duration::from_millis(500);

/// Waits until `condition` returns true. An error that it returns means "not yet" and appears in the error of this
/// function, which fails after [`HANG_LIMIT`]. `what` completes the sentence "timed out waiting for".
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    loop {
        let last = match condition().await {
            Ok(true) => return Ok(()),
            Ok(false) => String::new(),
            Err(error) => format!(": {error:#}"),
        };
        if start.elapsed() > HANG_LIMIT {
            bail!("timed out waiting for {what}{last}");
        }
        tokio::time::sleep((start.elapsed() / 8).clamp(INTERVAL_MIN, INTERVAL_MAX)).await;
    }
}
