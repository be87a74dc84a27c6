//! How many lines of the controller's log a guest can cause.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines at once…
const BURST: u32 = 30;
/// …and then one in this time.
const EACH: Duration = Duration::from_secs(2);

/// The lines that a pod's guest may still cause.
pub struct LogLimit {
    state: Mutex<State>,
}

struct State {
    left: u32,
    /// Up to when lines have been given back.
    counted: Instant,
    suppressed: u64,
}

impl LogLimit {
    pub fn new() -> LogLimit {
        LogLimit { state: Mutex::new(State { left: BURST, counted: Instant::now(), suppressed: 0 }) }
    }

    /// Whether a line may be written: then, how many before it were not.
    pub fn permit(&self) -> Option<u64> {
        self.permit_at(Instant::now())
    }

    fn permit_at(&self, now: Instant) -> Option<u64> {
        // Nothing panics while it holds this; the numbers would still be sound.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = now.saturating_duration_since(state.counted);
        let back = u32::try_from(elapsed.as_nanos() / EACH.as_nanos()).unwrap_or(u32::MAX).min(BURST);
        if back > 0 {
            state.left = state.left.saturating_add(back).min(BURST);
            state.counted = now;
        }
        if state.left == 0 {
            state.suppressed += 1;
            return None;
        }
        state.left -= 1;
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_causes_so_many_lines_and_then_one_now_and_then() {
        let limit = LogLimit::new();
        let start = Instant::now();
        let permitted = (0..10_000).filter(|_| limit.permit_at(start).is_some()).count();
        assert_eq!(permitted, BURST as usize);
        assert_eq!(limit.permit_at(start + EACH), Some(10_000 - u64::from(BURST)));
        assert_eq!(limit.permit_at(start + EACH), None);
        // A quiet guest has all of them back, and no more.
        let later = start + 1000 * EACH;
        assert_eq!((0..100).filter(|_| limit.permit_at(later).is_some()).count(), BURST as usize);
    }
}
