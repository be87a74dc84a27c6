//! Numbers that one thread counts and another one reads.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A number to which a device adds and which the control service reads. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
