//! Finding out that a guest is stuck, for which nothing tells but that it does not answer.

use std::{
    future::pending,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::{Pod, life::Phase};
use crate::guest::Agent;

/// Unanswered questions, one after the other, after which a guest is taken for stuck. More than one, because the host
/// may have been what was stuck.
const UNANSWERED_MAX: u32 = 3;

impl Pod {
    /// Resolves when the guest has given no answer for as long as is allowed, and tells how long that was. containerd's
    /// calls to it, most of which have no limit, end with its machine.
    pub(super) async fn guest_stuck(&self) -> Duration {
        let Some(limit) = self.environment.config.guest_timeout() else { return pending().await };
        let each = limit / UNANSWERED_MAX;
        tokio::time::sleep(each.mul_f64(offset(self.id()))).await;
        let mut silence = Silence::default();
        loop {
            let next = Instant::now() + each;
            let answered = self.guest_answers(each).await;
            // A guest that refuses has as long as one that is silent.
            sleep_until(next).await;
            if silence.count(answered) {
                return limit;
            }
        }
    }

    async fn guest_answers(&self, limit: Duration) -> bool {
        // Before and after, other limits hold.
        if !matches!(self.phase(), Phase::Running { .. }) {
            return true;
        }
        let answer = Agent::check(&self.files.vsock(), limit).await;
        if let Err(error) = &answer {
            tracing::debug!(pod = self.id(), %error, "the guest does not answer");
        }
        answer.is_ok()
    }
}

/// When in an interval a pod is asked, from 0 to 1. All pods of a node that has just been started would else be asked
/// in the same moment, and then again and again.
fn offset(pod: &str) -> f64 {
    const PARTS: u16 = 4096;
    let mut hash = DefaultHasher::new();
    pod.hash(&mut hash);
    // Smaller than the number of parts, so nothing is lost.
    let part = u16::try_from(hash.finish() % u64::from(PARTS)).unwrap_or(0);
    f64::from(part) / f64::from(PARTS)
}

/// Questions without an answer.
#[derive(Default)]
struct Silence {
    unanswered: u32,
}

impl Silence {
    /// Counts an answer, or that there was none. Returns whether that was one too many.
    fn count(&mut self, answered: bool) -> bool {
        self.unanswered = if answered { 0 } else { self.unanswered + 1 };
        self.unanswered >= UNANSWERED_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        host::size::PodResources,
        pod::{
            life::{Life, Running},
            spec::PodSpec,
            tests::environment,
        },
    };

    fn is_stuck(answers: &[bool]) -> bool {
        let mut silence = Silence::default();
        answers.iter().any(|answered| silence.count(*answered))
    }

    #[test]
    fn pods_are_asked_at_all_times_and_each_at_its_own() {
        let mut tenths = [0; 10];
        for number in 0..1000 {
            let id = format!("{number:064x}");
            assert!((offset(&id) - offset(&id)).abs() < f64::EPSILON);
            let tenth = (0..10).rev().find(|tenth| offset(&id) * 10.0 >= f64::from(*tenth));
            tenths[usize::try_from(tenth.unwrap()).unwrap()] += 1;
        }
        assert!(tenths.iter().all(|pods| (50..200).contains(pods)), "{tenths:?}");
    }

    /// How long it takes until a guest that nobody can reach is found to be stuck.
    async fn found_after(id: &str) -> Duration {
        let directory = tempfile::tempdir().unwrap();
        let spec = PodSpec::unknown(id.parse().unwrap(), "k8s.io");
        let pod = Pod::create(spec, environment(directory.path())).unwrap();
        let running = Life::running_with(Running::taken_over(1, PodResources::default()));
        pod.status.send_modify(|status| status.phase = running.phase());
        let start = Instant::now();
        let limit = pod.guest_stuck().await;
        assert_eq!(limit, pod.environment.config.guest_timeout().unwrap());
        start.elapsed().checked_sub(limit).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn two_stuck_guests_are_not_found_in_the_same_moment() {
        let (one, other) = (found_after("one").await, found_after("other").await);
        assert!(one.abs_diff(other) > Duration::from_millis(100), "{one:?} {other:?}");
    }

    #[test]
    fn a_guest_that_answers_now_and_then_is_not_stuck() {
        assert!(!is_stuck(&[false, false, true, false, false, true]));
        assert!(is_stuck(&[true, false, true, false, false, false]));
        assert!(is_stuck(&[false; 3]));
    }
}
