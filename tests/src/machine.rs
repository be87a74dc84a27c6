//! Machines as the node sees them: processes.

use std::{collections::BTreeMap, fs, os::fd::OwnedFd, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal},
};

use crate::HANG_LIMIT;

/// The process of a pod's machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineProcess {
    /// Its process id on the node.
    pub pid: i32,
}

impl MachineProcess {
    /// Finds the machine of a pod: the `pericarp vmm` whose configuration lies in the pod's directory.
    pub fn of_pod(id: &str) -> Result<Option<Self>> {
        let mut found = Vec::new();
        for (pid, arguments) in processes()? {
            if arguments.iter().any(|argument| argument == "vmm")
                && arguments.iter().any(|argument| argument.contains(id))
            {
                found.push(Self { pid });
            }
        }
        match found[..] {
            [] => Ok(None),
            [machine] => Ok(Some(machine)),
            _ => bail!("pod {id} has {} machines: {found:?}", found.len()),
        }
    }

    /// The pods that have a machine of the node's controller, by their ids.
    pub fn all() -> Result<Vec<String>> {
        let directory = |argument: &String| {
            let id = argument.strip_prefix("/run/pericarp/")?.split('/').next()?;
            Some(id.to_owned())
        };
        let machines = processes()?
            .into_iter()
            .filter(|(_, arguments)| arguments.get(1).is_some_and(|word| word == "vmm"));
        Ok(machines.filter_map(|(_, arguments)| arguments.iter().find_map(directory)).collect())
    }

    /// What each of its threads has used of a CPU so far.
    pub fn cpu_time(self) -> Result<CpuTime> {
        // The kernel counts in these, whatever its own clock is (proc_pid_stat(5)).
        const TICK: Duration = Duration::from_millis(10);
        let mut times = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            // "tid (name) state ppid …": the name may hold anything but ends with the last parenthesis.
            let stat = fs::read_to_string(task?.path().join("stat"))?;
            let (name, rest) = stat.rsplit_once(')').context("a thread's name")?;
            let name = name.split_once('(').context("a thread's name")?.1;
            let field = |number: usize| -> Result<u32> {
                Ok(rest.split_whitespace().nth(number).context("a field of a thread's")?.parse()?)
            };
            // utime and stime, fields 14 and 15 of which `rest` begins with the third.
            *times.entry(name.to_owned()).or_default() += TICK * (field(11)? + field(12)?);
        }
        Ok(CpuTime(times))
    }

    /// How often its guest has left its processor so far. Zero where debugfs is not mounted.
    pub fn exits(self) -> Result<Exits> {
        let mut exits = Exits::default();
        let Ok(machines) = fs::read_dir("/sys/kernel/debug/kvm") else { return Ok(exits) };
        for machine in machines {
            let machine = machine?;
            // "pid-descriptor"
            if machine.file_name().to_str().is_some_and(|name| name.starts_with(&format!("{}-", self.pid))) {
                let counter = |name: &str| -> Result<u32> {
                    Ok(fs::read_to_string(machine.path().join(name))?.trim().parse()?)
                };
                exits.all += counter("exits")?;
                exits.to_the_machine += counter("mmio_exits")? + counter("io_exits")?;
            }
        }
        Ok(exits)
    }

    /// Kills it, as the kernel would when memory is short.
    pub fn kill(self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends it a signal.
    pub fn signal(self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("a process id")?;
        kill_process(pid, signal).context("signal the machine")
    }
}

/// How often a guest has left its processor, as KVM counts it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exits {
    all: u32,
    /// Those that KVM could not deal with by itself.
    to_the_machine: u32,
}

impl Exits {
    /// How often since then, by name.
    pub fn since(self, before: Self) -> [(&'static str, u32); 2] {
        [
            ("all", self.all.wrapping_sub(before.all)),
            ("that the machine deals with", self.to_the_machine.wrapping_sub(before.to_the_machine)),
        ]
    }
}

/// CPU time by the names of threads.
#[derive(Clone, Debug, Default)]
pub struct CpuTime(BTreeMap<String, Duration>);

impl CpuTime {
    /// What each thread has used since then.
    pub fn since(&self, before: &Self) -> Vec<(String, Duration)> {
        let used = |(name, after): (&String, &Duration)| {
            let before = before.0.get(name).copied().unwrap_or_default();
            (name.clone(), after.saturating_sub(before))
        };
        self.0.iter().map(used).collect()
    }
}

/// The process id of the node's controller.
pub fn controller_pid() -> Result<i32> {
    process_of(&["pericarp", "serve"])?.context("no `pericarp serve` is running")
}

/// A process, known for good: its number may be another's once it has ended.
pub struct Process(OwnedFd);

impl Process {
    /// The one that has this number now.
    pub fn of(pid: i32) -> Result<Self> {
        let pid = Pid::from_raw(pid).context("a process id")?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty()).context("find the process")?))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.0, signal).context("signal the process")
    }

    /// Waits for its end.
    pub async fn ended(self) -> Result<()> {
        let limit = Timespec::try_from(HANG_LIMIT)?;
        let wait = move || poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit));
        ensure!(tokio::task::spawn_blocking(wait).await?? > 0, "the process does not end");
        Ok(())
    }
}

/// The process with this command line.
pub fn process_of(command: &[&str]) -> Result<Option<i32>> {
    let is_it =
        |arguments: &[String]| arguments.iter().map(String::as_str).eq(command.iter().copied().chain([""]));
    Ok(processes()?.into_iter().find(|(_, arguments)| is_it(arguments)).map(|(pid, _)| pid))
}

/// Memory of a process in bytes, shared pages divided among those who share them (PSS).
pub fn proportional_memory(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let rollup = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .with_context(|| format!("no Pss in {path}"))?;
    let kilobytes: f64 =
        line.trim().trim_end_matches(" kB").parse().with_context(|| format!("Pss {line:?}"))?;
    Ok(kilobytes * 1024.0)
}

fn processes() -> Result<Vec<(i32, Vec<String>)>> {
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end at any moment.
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let arguments =
            line.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        processes.push((pid, arguments));
    }
    Ok(processes)
}
