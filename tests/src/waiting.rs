//! How long tests wait for what has to come.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Whatever takes longer has hung: far more than anything takes on a node that is busy and emulated, because only a test
/// that fails waits for so long.
pub const HANG_LIMIT: Duration = Duration::from_secs(600);

/// How often it is looked: often at first, then ever more rarely, because looking takes the node's CPU from what is waited for.
const INTERVAL_MIN: Duration = Duration::from_millis(20);
const INTERVAL_MAX: Duration = Duration::from_millis(500);

/// Waits until `holds` answers yes; an error of it means not yet. `what` completes "waited in vain for".
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    loop {
        let seen = match holds().await {
            Ok(true) => return Ok(()),
            Ok(false) => String::new(),
            Err(error) => format!(": {error:#}"),
        };
        if start.elapsed() > HANG_LIMIT {
            bail!("waited in vain for {what}{seen}");
        }
        tokio::time::sleep((start.elapsed() / 8).clamp(INTERVAL_MIN, INTERVAL_MAX)).await;
    }
}
