//! What has happened since the controller was started, as numbers. `crictl inspectp` shows them with every pod.

use std::sync::atomic::{AtomicU64, Ordering};

/// How often something has happened.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts it once more. Returns how often that was.
    pub fn add_one(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// How often it has happened.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Machines that one of their own filters of system calls has ended, of all pods of this controller.
pub static MACHINES_ENDED_BY_FILTER: Counter = Counter(AtomicU64::new(0));
