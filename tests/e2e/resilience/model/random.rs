//! Random numbers that a seed repeats, and the numbers that a run is given.

use std::env;

use anyhow::{Context as _, Result};

/// `SplitMix64`: the same sequence for the same seed, everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `limit` - 1.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit.max(1)).unwrap_or(1)).unwrap_or(0)
    }
}

/// The number in an environment variable, if it is set.
pub fn number(variable: &str) -> Result<Option<u64>> {
    env::var(variable)
        .ok()
        .map(|value| value.parse().with_context(|| format!("{variable}={value}")))
        .transpose()
}
