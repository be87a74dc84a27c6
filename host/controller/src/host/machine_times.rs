//! What a machine's threads have done: how long they worked, and how long they were kept from it.

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
    /// Where those of the machine with this process id and this cgroup are read.
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

impl Times {
    /// In how much of `elapsed` the machine could have worked, which is the time from its start to this, or from
    /// `before` to this. What it has waited for a CPU that others had does not count, nor what its cgroup was throttled
    /// for.
    pub fn could_work(self, elapsed: Duration, before: Self) -> Duration {
        // One that sleeps waits for something that may never come. One that does not is perhaps waiting for a CPU right
        // now.
        if self.is_runnable {
            self.worked.saturating_sub(before.worked)
        } else {
            elapsed.saturating_sub(self.starved.saturating_sub(before.starved))
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_has_worked_and_is_runnable_and_one_that_sleeps_is_not() {
        let own = MachineTimes::of(std::process::id(), None).read();
        assert!(own.is_runnable && own.worked > Duration::ZERO, "{own:?}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of_child = MachineTimes::of(child.id(), None);
        while of_child.read().is_runnable {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(of_child.read().worked < Duration::from_secs(5));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of_child.read(), Times::default());
    }
}
