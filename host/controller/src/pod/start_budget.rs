//! How long a guest may take to start.
//!
//! What counts is the time in which its machine could have worked: not what it has waited for a CPU that others had,
//! nor what its cgroup was throttled for. Of a machine that wants to work, what counts is what it has worked. A pod of
//! the lowest weight on a busy node is slow, and ending it for that would throw away what it has done and have it begin
//! again.

use std::time::Duration;

use crate::host::machine_times::Work;

/// The time that a start may take.
#[derive(Clone, Copy, Debug)]
pub struct StartBudget {
    /// The time in which the machine could have worked.
    pub working: Duration,
    /// Altogether: whoever asked has given up by then.
    pub wall: Duration,
}

/// Why a start takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exceeded {
    Working,
    Wall,
}

impl StartBudget {
    /// What is left after so much time: the least time until the budget can be exceeded, or what of it is exceeded.
    pub fn left(&self, elapsed: Duration, machine: Work) -> Result<Duration, Exceeded> {
        let wall = self.wall.checked_sub(elapsed).filter(|left| !left.is_zero()).ok_or(Exceeded::Wall)?;
        let worked = machine.could_work(elapsed);
        let working =
            self.working.checked_sub(worked).filter(|left| !left.is_zero()).ok_or(Exceeded::Working)?;
        Ok(working.min(wall))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    const BUDGET: StartBudget = StartBudget { working: seconds(10), wall: seconds(110) };

    fn sleeping(starved: u64) -> Work {
        Work { starved: seconds(starved), ..Work::default() }
    }

    fn runnable(worked: u64) -> Work {
        Work { worked: seconds(worked), is_runnable: true, ..Work::default() }
    }

    #[test]
    fn a_guest_that_could_work_has_the_working_time() {
        assert_eq!(BUDGET.left(seconds(0), sleeping(0)), Ok(seconds(10)));
        assert_eq!(BUDGET.left(seconds(9), sleeping(0)), Ok(seconds(1)));
        assert_eq!(BUDGET.left(seconds(10), sleeping(0)), Err(Exceeded::Working));
        assert_eq!(BUDGET.left(seconds(11), runnable(10)), Err(Exceeded::Working));
    }

    #[test]
    fn a_guest_that_is_starved_has_more_time_and_not_for_ever() {
        assert_eq!(BUDGET.left(seconds(10), sleeping(9)), Ok(seconds(9)));
        assert_eq!(BUDGET.left(seconds(105), sleeping(104)), Ok(seconds(5)));
        assert_eq!(BUDGET.left(seconds(110), sleeping(109)), Err(Exceeded::Wall));
        assert_eq!(BUDGET.left(seconds(60), sleeping(50)), Err(Exceeded::Working));
        // A wait that is not over is not counted by the kernel.
        assert_eq!(BUDGET.left(seconds(50), runnable(1)), Ok(seconds(9)));
        assert_eq!(BUDGET.left(seconds(110), runnable(1)), Err(Exceeded::Wall));
        // The kernel's numbers are not read in the same moment.
        assert_eq!(BUDGET.left(seconds(1), sleeping(2)), Ok(seconds(10)));
    }
}
