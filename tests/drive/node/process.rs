//! Processes of the node.

use std::{fs, os::fd::OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::HANG_LIMIT;

/// The process id of the node's controller.
pub fn controller_pid() -> Result<i32> {
    find_process(&["pericarp", "serve"])?.context("no `pericarp serve` is running")
}

/// A process, held by a pidfd. Its id may belong to another process once it has ended.
pub struct Process(OwnedFd);

impl Process {
    /// Opens the process that has this id now.
    pub fn open(pid: i32) -> Result<Self> {
        let pid = Pid::from_raw(pid).context("a process id")?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty()).context("find the process")?))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.0, signal).context("signal the process")
    }

    /// Waits until the process has exited.
    pub async fn wait_for_exit(self) -> Result<()> {
        let limit = Timespec::try_from(HANG_LIMIT)?;
        let wait = move || poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&limit));
        ensure!(tokio::task::spawn_blocking(wait).await?? > 0, "the process has not exited");
        Ok(())
    }
}

/// The id of a process with this command line.
pub fn find_process(command: &[&str]) -> Result<Option<i32>> {
    let matches =
        |arguments: &[String]| arguments.iter().map(String::as_str).eq(command.iter().copied().chain([""]));
    Ok(processes()?.into_iter().find(|(_, arguments)| matches(arguments)).map(|(pid, _)| pid))
}

/// Memory of a process in bytes, with shared pages divided among the processes that share them (PSS).
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

/// The id and the arguments of every process.
pub(super) fn processes() -> Result<Vec<(i32, Vec<String>)>> {
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
