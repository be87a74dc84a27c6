//! How many lines of the controller's log a guest can cause.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::telemetry::rate::Rate;

/// Lines at once…
const BURST: u32 = 30;
/// …and then one in this time.
const EACH: Duration = Duration::from_secs(2);

/// The lines that a pod's guest may still cause.
pub struct LogLimit {
    rate: Rate,
    suppressed: AtomicU64,
}

impl LogLimit {
    pub fn new() -> LogLimit {
        LogLimit { rate: Rate::new(BURST, EACH), suppressed: AtomicU64::new(0) }
    }

    /// Whether a line may be written: then, how many before it were not.
    pub fn permit(&self) -> Option<u64> {
        if self.rate.permits() {
            return Some(self.suppressed.swap(0, Ordering::Relaxed));
        }
        self.suppressed.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_guest_causes_so_many_lines_and_then_one_now_and_then() {
        let limit = LogLimit::new();
        assert_eq!((0..10_000).filter(|_| limit.permit().is_some()).count(), BURST as usize);
        tokio::time::advance(EACH).await;
        assert_eq!(limit.permit(), Some(10_000 - u64::from(BURST)));
        assert_eq!(limit.permit(), None);
    }
}
