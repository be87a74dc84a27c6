//! How a device's workers keep to the device's rate limit.
//!
//! A worker asks its [`Throttle`] before each operation. If it is not the time for one, the worker leaves the queue as
//! it is and waits until then ([`NextTurn`]), with a time limit of its epoll wait: nothing sleeps, nothing is half
//! done, and the order to stop is obeyed at once. What the guest notifies meanwhile is read and changes nothing.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::Counter;
use crate::{config::RateLimit, lock::unpoisoned, rate_limiter::RateLimiter};

/// When a worker is to serve a queue again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextTurn {
    /// There may be more to do.
    Now,
    /// There is more to do, and it is to wait until then.
    NotBefore(Instant),
    /// When something has happened: the guest has notified the queue, for example.
    OnEvent,
}

impl NextTurn {
    /// How long to wait for events until it is this turn; `None`: without a limit.
    pub fn timeout(self) -> Option<Duration> {
        match self {
            Self::Now => Some(Duration::ZERO),
            Self::NotBefore(at) => Some(at.saturating_duration_since(Instant::now())),
            Self::OnEvent => None,
        }
    }

    /// Whether the queue has to wait, even if the guest has notified it.
    pub fn has_to_wait(self) -> bool {
        matches!(self, Self::NotBefore(at) if Instant::now() < at)
    }

    /// The earlier one of two turns, if one wait is for both.
    pub fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Now, _) | (_, Self::Now) => Self::Now,
            (Self::NotBefore(one), Self::NotBefore(other)) => Self::NotBefore(one.min(other)),
            (turn @ Self::NotBefore(_), Self::OnEvent) | (Self::OnEvent, turn) => turn,
        }
    }
}

/// A device's rate limit, if it has one. Clones share it. Each of several workers may start an operation with the last
/// token; all of them wait then until what they have overdrawn is paid back.
#[derive(Clone, Debug, Default)]
pub struct Throttle {
    limiter: Option<Arc<Mutex<RateLimiter>>>,
    /// How often a queue has had to wait.
    throttled: Counter,
}

impl Throttle {
    /// A limit whose buckets are full.
    pub fn new(limit: &RateLimit) -> Self {
        let limiter = RateLimiter::new(limit, Instant::now());
        Self { limiter: limiter.map(|limiter| Arc::new(Mutex::new(limiter))), throttled: Counter::default() }
    }

    /// When the next operation may start: `None` if it may start now. The caller has one that it would start, and
    /// leaves it to wait otherwise.
    pub fn not_before(&self) -> Option<Instant> {
        let limiter = self.limiter.as_ref()?;
        let not_before = unpoisoned(limiter.lock()).not_before(Instant::now());
        if not_before.is_some() {
            self.throttled.add(1);
        }
        not_before
    }

    /// Charges one operation and the bytes that it has moved.
    pub fn charge(&self, bytes: u64) {
        if let Some(limiter) = &self.limiter {
            unpoisoned(limiter.lock()).charge(bytes);
        }
    }

    /// How often a queue has had to wait.
    pub fn throttled(&self) -> Counter {
        self.throttled.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_turn_is_waited_for() {
        let (sooner, later) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        let at = NextTurn::NotBefore;
        assert_eq!(at(later).or(at(sooner)), at(sooner));
        assert_eq!(at(later).or(NextTurn::OnEvent), at(later));
        assert_eq!(NextTurn::OnEvent.or(at(later)), at(later));
        assert_eq!(NextTurn::OnEvent.or(NextTurn::OnEvent), NextTurn::OnEvent);
        assert_eq!(at(later).or(NextTurn::Now), NextTurn::Now);
    }

    #[test]
    fn only_a_turn_at_a_later_time_has_to_wait() {
        assert!(NextTurn::NotBefore(Instant::now() + Duration::from_secs(1000)).has_to_wait());
        for turn in [NextTurn::NotBefore(Instant::now()), NextTurn::Now, NextTurn::OnEvent] {
            assert!(!turn.has_to_wait());
        }
        assert_eq!(NextTurn::OnEvent.timeout(), None);
        assert_eq!(NextTurn::NotBefore(Instant::now()).timeout(), Some(Duration::ZERO));
    }
}
