//! Processes on the host, named so that none is ever mistaken for another.

use std::{
    fs,
    io::{self, Read as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, geteuid, kill_process, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::machine;

/// Longest command line that is looked at, in bytes.
const COMMAND_LINE_MAX: u64 = 8192;

/// A process by its number and its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// When it started, in clock ticks since boot (`proc_pid_stat(5)`, field 22): together with the pid it names a
    /// process for good.
    pub start_time: u64,
}

impl Process {
    /// Returns the process that has this pid now.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The command in field 2 may hold anything; fields are counted from its closing bracket.
        let start_time = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok())
            .ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat cannot be read"))
            })?;
        Ok(Self { pid, start_time })
    }

    /// Whether it is still there, alive or as an exit status that nobody has taken.
    pub fn exists(self) -> io::Result<bool> {
        match Self::of(self.pid) {
            Ok(found) => Ok(found == self),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // It ended while it was looked at.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Opens a descriptor of it; `None` if it has gone.
    pub fn open(self) -> io::Result<Option<(Pid, OwnedFd)>> {
        let Some(pid) = self.number() else { return Ok(None) };
        let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Err(Errno::SRCH) => return Ok(None),
            pidfd => pidfd?,
        };
        // Checked with the pidfd in hand: from here the process cannot be mistaken for another.
        Ok(self.exists()?.then_some((pid, pidfd)))
    }

    /// Kills it and waits until it is gone; one that has gone already is left alone. Blocks.
    pub fn kill(self) -> io::Result<()> {
        self.kill_opened_by(Self::open)
    }

    fn kill_opened_by(self, open: impl FnOnce(Self) -> io::Result<Option<(Pid, OwnedFd)>>) -> io::Result<()> {
        match open(self) {
            Ok(Some((_, pidfd))) => machine::kill(&pidfd),
            Ok(None) => Ok(()),
            // By its number, then. In the moment between this look and the signal, the kernel would have to give the
            // number of a process that has just ended to another.
            Err(error) => {
                if let Some(pid) = self.number().filter(|_| self.exists().unwrap_or(false)) {
                    kill_process(pid, Signal::KILL)?;
                    // Whether it is gone is seen when this is tried again.
                    return Err(error);
                }
                Ok(())
            }
        }
    }

    fn number(self) -> Option<Pid> {
        i32::try_from(self.pid).ok().and_then(Pid::from_raw)
    }
}

/// The processes of this user that run a machine, each with its configuration file, by their command lines.
pub fn machines() -> io::Result<Vec<(PathBuf, Process)>> {
    let mut machines = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // One that ends meanwhile is passed over.
        let Ok(process) = Process::of(pid) else { continue };
        let ours = entry.metadata().is_ok_and(|metadata| metadata.uid() == geteuid().as_raw());
        if ours
            && let Some(config) = config_of_machine(&entry.path())
            && Process::of(pid).is_ok_and(|again| again == process)
        {
            machines.push((config, process));
        }
    }
    Ok(machines)
}

/// The configuration file in a machine's command line: `pericarp vmm --config FILE …`.
fn config_of_machine(process: &Path) -> Option<PathBuf> {
    let mut line = Vec::new();
    fs::File::open(process.join("cmdline")).ok()?.take(COMMAND_LINE_MAX).read_to_end(&mut line).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    if words.nth(1) != Some(b"vmm") || words.next() != Some(b"--config") {
        return None;
    }
    Some(PathBuf::from(std::str::from_utf8(words.next()?).ok()?))
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt as _,
        process::{Child, Command},
    };

    use super::*;

    fn sleeping() -> (Child, Process) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        (child, process)
    }

    fn no_descriptor(_: Process) -> io::Result<Option<(Pid, OwnedFd)>> {
        Err(Errno::MFILE.into())
    }

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let own = std::process::id();
        assert_eq!(Process::of(own).unwrap(), Process::of(own).unwrap());
        assert_ne!(Process::of(own).unwrap().start_time, Process::of(1).unwrap().start_time);
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_not_the_machine() {
        let own = Process::of(std::process::id()).unwrap();
        assert!(own.open().unwrap().is_some());
        assert!(Process { start_time: 1, ..own }.open().unwrap().is_none());
    }

    #[test]
    fn a_machine_is_ended_with_and_without_a_descriptor_and_no_other_process_is() {
        let (mut child, process) = sleeping();
        let another = Process { start_time: 1, ..process };
        another.kill().unwrap();
        another.kill_opened_by(no_descriptor).unwrap();
        assert_eq!(child.try_wait().unwrap(), None);
        // It is not known to be gone, so this is tried again.
        process.kill_opened_by(no_descriptor).unwrap_err();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        process.kill_opened_by(no_descriptor).unwrap();
        let (mut child, process) = sleeping();
        process.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn a_machine_is_found_by_its_command_line() {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join(machine::file::CONFIG);
        let found = || machines().unwrap().into_iter().find(|(of, _)| *of == config);
        assert_eq!(found(), None);
        // A process with that command line that waits for its input.
        fs::write(directory.path().join("vmm"), "echo started\nread line\n").unwrap();
        let mut child = Command::new("sh")
            .current_dir(directory.path())
            .args(["vmm", "--config"])
            .arg(&config)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The kernel ends `vfork` a moment before the new program's command line can be read.
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        assert_eq!(found().map(|(_, process)| process.pid), Some(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
