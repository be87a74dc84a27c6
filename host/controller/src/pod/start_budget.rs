//! How long a guest may take to start.
//!
//! What counts is the time in which its machine could have worked: not what it has waited for a CPU that others had,
//! nor what its cgroup was throttled for. Of a machine that wants to work, what counts is what it has worked. A pod of
//! the lowest weight on a busy node is slow, and ending it for that would throw away what it has done and have it begin
//! again.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use pericarp_cgroup_stats::Counters;

/// Where a machine's times are read.
#[derive(Clone, Debug)]
pub struct MachineTimes {
    tasks: PathBuf,
    cgroup: Option<PathBuf>,
}

impl MachineTimes {
    pub fn of(pid: u32, cgroup: Option<PathBuf>) -> Self {
        Self { tasks: PathBuf::from(format!("/proc/{pid}/task")), cgroup }
    }

    /// Reads them. Blocks for reading a few files of the kernel's.
    pub fn read(&self) -> Times {
        let mut times = Times::default();
        // The most of one thread, as they wait at the same time. While a guest boots, one of its processors works.
        for thread in fs::read_dir(&self.tasks).into_iter().flatten().flatten() {
            if let Some((worked, waited)) = worked_and_waited(&thread.path()) {
                times.worked = times.worked.max(worked);
                times.starved = times.starved.max(waited);
            }
            times.is_runnable |= is_runnable(&thread.path());
        }
        let throttled = self.cgroup.as_deref().map(throttled).unwrap_or_default();
        times.starved = times.starved.max(throttled);
        times
    }
}

/// What a machine has done since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// How long it had a CPU.
    pub worked: Duration,
    /// How long it was kept from one, as far as the kernel has counted that: a thread's wait is counted when it is
    /// over.
    pub starved: Duration,
    /// Whether it has a CPU or wants one now.
    pub is_runnable: bool,
}

/// How long a thread had a CPU, and how long it was ready to run and had none
/// (`Documentation/scheduler/sched-stats.rst`, `/proc/<pid>/schedstat`).
fn worked_and_waited(thread: &Path) -> Option<(Duration, Duration)> {
    let text = fs::read_to_string(thread.join("schedstat")).ok()?;
    let mut numbers = text.split_whitespace().map(|number| number.parse().ok().map(Duration::from_nanos));
    Some((numbers.next()??, numbers.next()??))
}

/// Whether a thread is in the state R (`proc_pid_stat(5)`, field 3).
fn is_runnable(thread: &Path) -> bool {
    let text = fs::read_to_string(thread.join("stat")).unwrap_or_default();
    text.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('R'))
}

/// How long a cgroup, or one above it, was throttled; the longest of them.
fn throttled(cgroup: &Path) -> Duration {
    let of = |directory: &Path| {
        Duration::from_micros(Counters::read(&directory.join("cpu.stat")).get("throttled_usec"))
    };
    cgroup
        .ancestors()
        .take_while(|directory| directory.starts_with("/sys/fs/cgroup"))
        .map(of)
        .max()
        .unwrap_or_default()
}

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
    pub fn left(&self, elapsed: Duration, machine: Times) -> Result<Duration, Exceeded> {
        let wall = self.wall.checked_sub(elapsed).filter(|left| !left.is_zero()).ok_or(Exceeded::Wall)?;
        // One that sleeps waits for something that may never come. One that does not is perhaps waiting for a CPU right
        // now.
        let worked =
            if machine.is_runnable { machine.worked } else { elapsed.saturating_sub(machine.starved) };
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

    fn sleeping(starved: u64) -> Times {
        Times { starved: seconds(starved), ..Times::default() }
    }

    fn runnable(worked: u64) -> Times {
        Times { worked: seconds(worked), is_runnable: true, ..Times::default() }
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

    #[test]
    fn a_process_that_works_has_worked_and_is_runnable_and_one_that_sleeps_is_not() {
        let own = MachineTimes::of(std::process::id(), None).read();
        assert!(own.is_runnable && own.worked > Duration::ZERO, "{own:?}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of_child = MachineTimes::of(child.id(), None);
        while of_child.read().is_runnable {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(of_child.read().worked < seconds(5));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of_child.read(), Times::default());
    }
}
