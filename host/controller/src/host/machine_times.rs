//! What a machine's threads have done: how long they worked, and how long they were kept from it.

use std::{
    collections::HashMap,
    ffi::OsString,
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
        for thread in fs::read_dir(&self.tasks).into_iter().flatten().flatten() {
            if let Some(of_thread) = worked_and_waited(&thread.path()) {
                times.threads.insert(thread.file_name(), of_thread);
            }
            times.is_runnable |= is_runnable(&thread.path());
        }
        times.throttled = self.cgroup.as_deref().map(throttled).unwrap_or_default();
        times
    }
}

/// What a machine has done since it was started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// How long each of its threads had a CPU, and how long it waited for one, as far as the kernel has counted that: a
    /// wait is counted when it is over.
    threads: HashMap<OsString, (Duration, Duration)>,
    /// How long its cgroup was throttled.
    throttled: Duration,
    /// Whether one of its threads has a CPU or wants one now.
    is_runnable: bool,
}

impl Times {
    /// What it has done since an earlier moment. Everything, if that is [`Times::default`].
    pub fn since(&self, before: &Self) -> Work {
        let mut work = Work { is_runnable: self.is_runnable, ..Work::default() };
        for (thread, (worked, waited)) in &self.threads {
            let (worked_before, waited_before) = before.threads.get(thread).copied().unwrap_or_default();
            // The most of one thread, as they work and wait at the same time.
            work.worked = work.worked.max(worked.saturating_sub(worked_before));
            work.starved = work.starved.max(waited.saturating_sub(waited_before));
        }
        work.starved = work.starved.max(self.throttled.saturating_sub(before.throttled));
        work
    }
}

/// What a machine has done in some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// How long it had a CPU.
    pub worked: Duration,
    /// How long it was kept from one, as far as that is over.
    pub starved: Duration,
    /// Whether it has a CPU or wants one at the end of the time.
    pub is_runnable: bool,
}

impl Work {
    /// In how much of the time it could have worked. What it has waited for a CPU that others had does not count, nor
    /// what its cgroup was throttled for.
    pub fn could_work(self, elapsed: Duration) -> Duration {
        // One that sleeps waits for something that may never come. One that does not is perhaps waiting for a CPU right
        // now.
        if self.is_runnable { self.worked } else { elapsed.saturating_sub(self.starved) }
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

    fn times(threads: &[(&str, u64, u64)], throttled: u64) -> Times {
        let seconds = Duration::from_secs;
        let threads = threads.iter();
        let threads =
            threads.map(|(name, worked, waited)| ((*name).into(), (seconds(*worked), seconds(*waited))));
        Times { threads: threads.collect(), throttled: seconds(throttled), is_runnable: true }
    }

    /// A thread that works now is not hidden by one that has worked for longer before.
    #[test]
    fn what_a_machine_has_done_is_what_the_busiest_of_its_threads_has_done_since() {
        let before = times(&[("1", 100, 50), ("2", 10, 0)], 70);
        let after = times(&[("1", 101, 50), ("2", 15, 3), ("3", 2, 0)], 72);
        let work = after.since(&before);
        assert_eq!((work.worked, work.starved), (Duration::from_secs(5), Duration::from_secs(3)));
        assert_eq!(times(&[], 72).since(&before).starved, Duration::from_secs(2));
        assert_eq!(after.since(&Times::default()).worked, Duration::from_secs(101));
    }

    #[test]
    fn a_process_that_works_has_worked_and_is_runnable_and_one_that_sleeps_is_not() {
        let of_all_time = |times: &MachineTimes| times.read().since(&Times::default());
        let own = of_all_time(&MachineTimes::of(std::process::id(), None));
        assert!(own.is_runnable && own.worked > Duration::ZERO, "{own:?}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of_child = MachineTimes::of(child.id(), None);
        while of_all_time(&of_child).is_runnable {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(of_all_time(&of_child).worked < Duration::from_secs(5));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(of_child.read(), Times::default());
    }
}
