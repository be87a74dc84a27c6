//! Limits how much a device does in a time: token buckets, one for operations and one for bytes.
//!
//! A bucket holds at most what its rate gives in [`SIZE`], and is full at first; a burst comes on top of that, once. An
//! operation may start while there is a token in each bucket, whatever it will cost, and its cost is charged when it is
//! known. So a bucket can be overdrawn by a part of one operation, and then nothing starts until that is paid back at
//! the bucket's rate. An operation that costs more than a bucket holds is therefore neither refused nor stuck: whoever
//! comes after it waits longer. Over any time, less than the bucket's size, the burst, what the rate gives in that time
//! and the cost of one operation is charged in total. (Firecracker's limiter asks for the cost beforehand, and lets an
//! operation that costs more than the bucket holds overdraw it too. How much a received frame or a file's data will be
//! is only known afterwards.)
//!
//! Nothing here reads a clock.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

use crate::config::RateLimit;

/// What a bucket holds is what its rate gives in this time, or [`LEAST`]. It makes up for wake-ups that are late, and
/// for pauses of the guest. In any second, a device does no more than a tenth above its rate, or so many tokens.
const SIZE: Duration = Duration::from_millis(100);
/// Least tokens that a bucket holds. If it held one, what comes while the worker is late would always be lost.
const LEAST: i128 = 2;
/// Buckets count in parts of a token: so many per token that a rate of n tokens in a second is n parts in a nanosecond,
/// and nothing is ever rounded.
const PARTS: i128 = 1_000_000_000;
/// Longest time after which a bucket is asked again, because an `Instant` cannot be arbitrarily far away.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A bucket of tokens, which fills at a rate.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Tokens in a second, which is parts in a nanosecond.
    rate: NonZeroU64,
    /// Parts that the bucket holds.
    size: i128,
    /// Parts that there are. More than `size` while there is something left of the burst, and negative when the bucket
    /// is overdrawn.
    level: i128,
    /// When the level was brought up to date.
    updated: Instant,
}

impl TokenBucket {
    /// A full bucket, which fills with `rate` tokens in a second, and holds `burst` more tokens once.
    pub fn new(rate: NonZeroU64, burst: u64, now: Instant) -> Self {
        // No product exceeds 64 + 30 bits.
        let size = parts_in(rate, SIZE).max(LEAST * PARTS);
        Self { rate, size, level: size + i128::from(burst) * PARTS, updated: now }
    }

    /// When there is a token: `None` if there is one now. It may be asked again earlier, and should be asked again
    /// then, because others may use the tokens that there are until then.
    pub fn not_before(&mut self, now: Instant) -> Option<Instant> {
        self.update(now);
        let missing = PARTS - self.level;
        if missing <= 0 {
            return None;
        }
        let nanoseconds = missing.unsigned_abs().div_ceil(u128::from(self.rate.get()));
        let wait = u64::try_from(nanoseconds).map_or(LONGEST_WAIT, Duration::from_nanos);
        Some(self.updated + wait.min(LONGEST_WAIT))
    }

    /// Whether the bucket holds all that its rate can give it.
    pub fn is_full(&mut self, now: Instant) -> bool {
        self.update(now);
        self.level >= self.size
    }

    /// Removes tokens, even if there are not as many.
    pub fn charge(&mut self, tokens: u64) {
        // A guest cannot bring it to saturate: that takes 2³³ operations of 2⁶⁴ bytes each.
        self.level = self.level.saturating_sub(i128::from(tokens) * PARTS);
    }

    /// Adds what has come since the last update. Another thread may have made one with a later time.
    fn update(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.updated);
        self.updated = self.updated.max(now);
        if self.level < self.size {
            self.level = self.level.saturating_add(parts_in(self.rate, elapsed)).min(self.size);
        }
    }
}

/// The parts that a rate gives in a time.
fn parts_in(rate: NonZeroU64, time: Duration) -> i128 {
    // Both have less than 64 bits, unless a machine runs for more than five centuries.
    i128::try_from(time.as_nanos().saturating_mul(rate.get().into())).unwrap_or(i128::MAX)
}

/// A bucket for operations and one for bytes. Without one of the two, there may be any number of these.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    operations: Option<TokenBucket>,
    bytes: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter with full buckets. `None` if there is no limit.
    pub fn new(limit: &RateLimit, now: Instant) -> Option<Self> {
        let bucket = |rate: Option<NonZeroU64>, burst: Option<u64>| {
            rate.map(|rate| TokenBucket::new(rate, burst.unwrap_or(0), now))
        };
        let operations = bucket(limit.operations_per_second, limit.operations_burst);
        let bytes = bucket(limit.bytes_per_second, limit.bytes_burst);
        (operations.is_some() || bytes.is_some()).then_some(Self { operations, bytes })
    }

    /// When the next operation may start: `None` if it may start now.
    pub fn not_before(&mut self, now: Instant) -> Option<Instant> {
        self.buckets().filter_map(|bucket| bucket.not_before(now)).max()
    }

    /// Whether nothing has been charged for so long that no limit is near.
    pub fn is_full(&mut self, now: Instant) -> bool {
        self.buckets().all(|bucket| bucket.is_full(now))
    }

    /// Charges one operation and the bytes that it has moved.
    pub fn charge(&mut self, bytes: u64) {
        for (bucket, tokens) in [(&mut self.operations, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.charge(tokens);
            }
        }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut TokenBucket> {
        self.operations.iter_mut().chain(&mut self.bytes)
    }
}

#[cfg(test)]
#[path = "rate_limiter_tests.rs"]
mod tests;
