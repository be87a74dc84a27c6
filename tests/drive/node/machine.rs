//! Machines as the node sees them: processes, and their counters in KVM.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::process::processes;

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

    /// The mounts that it sees, as `proc_pid_mountinfo(5)` has them: the share's, and no other.
    pub fn mounts(self) -> Result<String> {
        let path = format!("/proc/{}/mountinfo", self.pid);
        fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }

    /// The path by which the node sees what is at a path in its mount namespace.
    pub fn path(self, inside: &str) -> String {
        format!("/proc/{}/root{inside}", self.pid)
    }

    /// The CPU time that each of its threads has used so far.
    pub fn cpu_time(self) -> Result<CpuTime> {
        // The kernel counts in units of this length, whatever its own clock is (proc_pid_stat(5)).
        const TICK: Duration = Duration::from_millis(10);
        let mut times = BTreeMap::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            // "tid (name) state ppid …": the name may hold anything but ends with the last parenthesis.
            let stat = fs::read_to_string(task?.path().join("stat"))?;
            let (name, rest) = stat.rsplit_once(')').context("a thread's name")?;
            let name = name.split_once('(').context("a thread's name")?.1;
            let field = |number: usize| -> Result<u32> {
                Ok(rest.split_whitespace().nth(number).context("a field of a thread")?.parse()?)
            };
            // utime and stime are fields 14 and 15; `rest` begins with field 3.
            *times.entry(name.to_owned()).or_default() += TICK * (field(11)? + field(12)?);
        }
        Ok(CpuTime(times))
    }

    /// How often its guest has exited to the host so far. All counters are zero where debugfs is not mounted.
    pub fn vm_exits(self) -> Result<VmExitCounters> {
        let mut exits = VmExitCounters::default();
        let Ok(machines) = fs::read_dir("/sys/kernel/debug/kvm") else { return Ok(exits) };
        for machine in machines {
            let machine = machine?;
            // A directory is called "pid-descriptor".
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

    /// Kills it, as the kernel does when memory is short.
    pub fn kill(self) -> Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends it a signal.
    pub fn signal(self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.pid).context("a process id")?;
        kill_process(pid, signal).context("signal the machine")
    }
}

/// How often a guest has exited to the host, as KVM counts it.
#[derive(Clone, Copy, Debug, Default)]
pub struct VmExitCounters {
    all: u32,
    /// Exits that KVM passed on to the machine's process.
    to_the_machine: u32,
}

impl VmExitCounters {
    /// The exits since `before`, by name.
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
    /// The CPU time that each thread has used since `before`.
    pub fn since(&self, before: &Self) -> Vec<(String, Duration)> {
        let used = |(name, after): (&String, &Duration)| {
            let before = before.0.get(name).copied().unwrap_or_default();
            (name.clone(), after.saturating_sub(before))
        };
        self.0.iter().map(used).collect()
    }
}
