//! Finding out that a guest is stuck, for which nothing tells but that it does not answer.

use std::{future::pending, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{Phase, Pod};
use crate::guest::Agent;

/// Unanswered questions, one after the other, after which a guest is taken for stuck. More than one, because the host may
/// have been what was stuck.
const UNANSWERED_MAX: u32 = 3;

impl Pod {
    /// Resolves when the guest has given no answer for as long as is allowed, and tells how long that was. containerd's
    /// calls to it, most of which have no limit, end with its machine.
    pub(super) async fn falls_silent(&self) -> Duration {
        let Some(limit) = self.node.config.guest_timeout() else { return pending().await };
        let each = limit / UNANSWERED_MAX;
        let mut silence = Silence::default();
        loop {
            let next = Instant::now() + each;
            let answered = self.answers(each).await;
            // A guest that refuses has as long as one that is silent.
            sleep_until(next).await;
            if silence.lasts(answered) {
                return limit;
            }
        }
    }

    async fn answers(&self, limit: Duration) -> bool {
        // Before and after, other limits hold.
        if !matches!(self.phase(), Phase::Running { .. }) {
            return true;
        }
        let answer = Agent::check(&self.vsock(), limit).await;
        if let Err(error) = &answer {
            tracing::debug!(pod = self.id, %error, "the guest does not answer");
        }
        answer.is_ok()
    }
}

/// Questions without an answer.
#[derive(Default)]
struct Silence {
    unanswered: u32,
}

impl Silence {
    /// Whether that was one too many.
    fn lasts(&mut self, answered: bool) -> bool {
        self.unanswered = if answered { 0 } else { self.unanswered + 1 };
        self.unanswered >= UNANSWERED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_stuck(answers: &[bool]) -> bool {
        let mut silence = Silence::default();
        answers.iter().any(|answered| silence.lasts(*answered))
    }

    #[test]
    fn a_guest_that_answers_now_and_then_is_not_stuck() {
        assert!(!is_stuck(&[false, false, true, false, false, true]));
        assert!(is_stuck(&[true, false, true, false, false, false]));
        assert!(is_stuck(&[false; 3]));
    }
}
