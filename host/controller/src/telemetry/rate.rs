//! How often something may happen that a guest can cause.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// So many at once, and then one in each interval.
pub struct Rate {
    burst: u32,
    interval: Duration,
    state: Mutex<State>,
}

struct State {
    left: u32,
    /// Up to when they have been given back.
    counted: Instant,
}

impl Rate {
    pub fn new(burst: u32, interval: Duration) -> Rate {
        Rate { burst, interval, state: Mutex::new(State { left: burst, counted: Instant::now() }) }
    }

    /// Whether it may happen now.
    pub fn permits(&self) -> bool {
        self.permits_at(Instant::now()).is_ok()
    }

    /// Waits until it may happen.
    pub async fn wait(&self) {
        while let Err(next) = self.permits_at(Instant::now()) {
            sleep_until(next).await;
        }
    }

    /// The error is when it may.
    fn permits_at(&self, now: Instant) -> Result<(), Instant> {
        // Nothing panics while it holds this; the numbers would still be sound.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let intervals = now.saturating_duration_since(state.counted).as_nanos() / self.interval.as_nanos();
        let back = u32::try_from(intervals).unwrap_or(u32::MAX);
        if back >= self.burst - state.left {
            state.left = self.burst;
            state.counted = now;
        } else {
            state.left += back;
            state.counted += self.interval * back;
        }
        match state.left.checked_sub(1) {
            Some(left) => {
                state.left = left;
                Ok(())
            }
            None => Err(state.counted + self.interval),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EACH: Duration = Duration::from_secs(2);

    #[test]
    fn so_many_are_permitted_at_once_and_then_one_now_and_then() {
        let rate = Rate::new(30, EACH);
        let start = Instant::now() + EACH;
        assert_eq!((0..10_000).filter(|_| rate.permits_at(start).is_ok()).count(), 30);
        assert_eq!(rate.permits_at(start), Err(start + EACH));
        // Asking does not put it off.
        assert_eq!(rate.permits_at(start + EACH / 2), Err(start + EACH));
        assert_eq!(rate.permits_at(start + EACH * 3 / 2), Ok(()));
        assert_eq!(rate.permits_at(start + EACH * 3 / 2), Err(start + 2 * EACH));
        // After a quiet time there are all of them, and no more.
        let later = start + 1000 * EACH;
        assert_eq!((0..100).filter(|_| rate.permits_at(later).is_ok()).count(), 30);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_ends_when_it_may_happen() {
        let rate = Rate::new(3, EACH);
        let start = Instant::now();
        for _ in 0..5 {
            rate.wait().await;
        }
        assert_eq!(start.elapsed(), 2 * EACH);
    }
}
