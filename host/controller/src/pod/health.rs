//! Finding out that a guest is stuck, for which nothing tells but that it does not answer.
//!
//! One whose machine had no CPU cannot answer: what counts is the time in which it could have.

use std::{
    future::pending,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::{Pod, life::Phase};
use crate::{
    guest::Agent,
    host::machine_times::{MachineTimes, Times},
};

/// Unanswered questions, one after the other, after which a guest is taken for stuck. More than one, because the host
/// may have been what was stuck.
const UNANSWERED_MAX: u32 = 3;

impl Pod {
    /// Resolves when the guest has given no answer for as long as is allowed, and tells how long that is. containerd's
    /// calls to it, most of which have no limit, end with its machine.
    pub(super) async fn guest_stuck(&self) -> Duration {
        let Some(limit) = self.environment.config.guest_timeout() else { return pending().await };
        let each = limit / UNANSWERED_MAX;
        tokio::time::sleep(each.mul_f64(offset(self.id()))).await;
        let mut silence = Silence::default();
        loop {
            let (begun, before) = (Instant::now(), self.machine_times().await);
            // What the end of the question wakes in the machine sleeps again when its times are read.
            let answered = self.guest_answers(each.mul_f64(0.9)).await;
            // A guest that refuses has as long as one that is silent.
            sleep_until(begun + each).await;
            if answered {
                silence = Silence::default();
                continue;
            }
            let could_work = self.machine_times().await.since(&before).could_work(begun.elapsed());
            if silence.count(could_work.min(each), each) {
                return limit;
            }
        }
    }

    /// What its machine has done so far.
    async fn machine_times(&self) -> Times {
        let Phase::Running { pid } = self.phase() else { return Times::default() };
        let times = MachineTimes::of(pid, self.status.borrow().owned.cgroup());
        // Not counted among its work: that may hang in a volume, which must not keep a stuck guest.
        tokio::task::spawn_blocking(move || times.read()).await.unwrap_or_default()
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

/// Questions without an answer, one after the other.
#[derive(Default)]
struct Silence {
    /// The time in which they could have been answered.
    could_work: Duration,
}

impl Silence {
    /// Counts a question that was not answered, and the time in which it could have been. Returns whether that was too
    /// much: as much as in so many questions of the length `each`. Even a machine that sleeps waits for a CPU for some
    /// moments, which must not cost one more question.
    fn count(&mut self, could_work: Duration, each: Duration) -> bool {
        self.could_work += could_work;
        self.could_work + each / 2 >= each * UNANSWERED_MAX
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

    /// The clock of the test goes on without the machine, as it does on a host that has no CPU for it.
    #[tokio::test(start_paused = true)]
    async fn a_machine_that_wants_to_work_and_gets_no_cpu_is_not_stuck() {
        let directory = tempfile::tempdir().unwrap();
        let mut busy = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let spec = PodSpec::unknown("abc".parse().unwrap(), "k8s.io");
        let pod = Pod::create(spec, environment(directory.path())).unwrap();
        let running = Life::running_with(Running::taken_over(busy.id(), PodResources::default()));
        pod.status.send_modify(|status| status.phase = running.phase());
        let limit = pod.environment.config.guest_timeout().unwrap();
        let found = tokio::time::timeout(5 * limit, pod.guest_stuck()).await;
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(found.is_err(), "{found:?}");
    }

    #[test]
    fn a_guest_is_stuck_after_a_silence_in_which_it_could_have_answered() {
        let each = Duration::from_secs(20);
        let unanswered = |could_work: Duration| {
            let mut silence = Silence::default();
            (1..100_u32).find(|_| silence.count(could_work, each))
        };
        assert_eq!(unanswered(each), Some(UNANSWERED_MAX));
        assert_eq!(unanswered(each.mul_f64(0.99)), Some(UNANSWERED_MAX));
        assert_eq!(unanswered(each / 10), Some(25));
        assert_eq!(unanswered(Duration::ZERO), None);
    }
}
