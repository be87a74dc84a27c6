//! Finds the processes of a launch: to see whether they still do something, and to kill them when it has failed
//! halfway.
//!
//! The processes that a helper creates are children of the agent (`CLONE_PARENT`), so they do not end with the helper.
//! A container's process whose helper has died would wait for its start for ever, with the container's streams open.
//! All processes of a launch have its name on their command lines, which nobody can guess and no other launch has. (A
//! process that sees another of the same launch can copy it, and is killed as well.)
//!
//! Everything here blocks: containers have as many processes as they may, and what reads a process's command line waits
//! for that process's own changes of its memory.

use std::{
    fs::{self, File},
    io::Read as _,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{HELPER_ARGUMENT, HOLD_ARGUMENT, PAUSE_ARGUMENT};

/// How many processes are described at most.
const DESCRIBED_MAX: usize = 4;

/// How much of a command line is read, in bytes: more than a launch's has. A container's may have megabytes.
const COMMAND_LINE_MAX: u64 = 256;

/// How often the processes of a launch are looked for at most: one that is killed may just have made another.
const ROUNDS_MAX: usize = 8;

/// What the processes of a launch have done up to now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// The CPU time that they have had.
    pub cpu: Duration,
    /// Whether one of them has a CPU or waits for one.
    is_runnable: bool,
}

impl Progress {
    /// That of the launch with that name.
    pub fn of_launch(name: &str) -> Self {
        processes(name).fold(Self::default(), |sum, (_, process)| Self {
            cpu: sum.cpu + cpu_time(&process),
            is_runnable: sum.is_runnable || is_runnable(&process),
        })
    }

    /// Whether the launch has gone on since it had come as far as `earlier`. To wait for a CPU is to go on: the guest
    /// may be busy, and so may the host that it is on.
    pub fn goes_on_since(self, earlier: Self) -> bool {
        self.cpu != earlier.cpu || self.is_runnable
    }
}

/// Kills every process of the launch with that name, and returns a description of what they were doing.
pub fn kill_launch(name: &str) -> String {
    let mut descriptions = Vec::new();
    for round in 0..ROUNDS_MAX {
        let mut found = false;
        for (pid, process) in processes(name) {
            let Some(pidfd) = open(pid, &process, name) else { continue };
            found = true;
            if round == 0 && descriptions.len() < DESCRIBED_MAX {
                descriptions.push(describe(&process));
            }
            // This fails if the process has ended in the meantime.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
        if !found {
            break;
        }
    }
    if descriptions.is_empty() { "none of its processes is left".to_owned() } else { descriptions.join("; ") }
}

/// Opens a process of the launch with that name, unless another process has its number by now.
fn open(pid: Pid, process: &Path, name: &str) -> Option<OwnedFd> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
    has_name(&command_line(process), name).then_some(pidfd)
}

/// The processes of the launch with that name: their ids and directories.
fn processes(name: &str) -> impl Iterator<Item = (Pid, PathBuf)> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(move |entry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        has_name(&command_line(&entry.path()), name).then(|| (pid, entry.path()))
    })
}

/// The CPU time that a process has had: the first number in its `schedstat`, in nanoseconds.
fn cpu_time(process: &Path) -> Duration {
    let nanoseconds = read_text(process, "schedstat").split(' ').next().and_then(|time| time.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}

/// Whether a process is in state R.
fn is_runnable(process: &Path) -> bool {
    status_value(&read_text(process, "status"), "State:").starts_with('R')
}

/// A file of a process in /proc; empty if the process has ended.
fn read_text(process: &Path, file: &str) -> String {
    fs::read_to_string(process.join(file)).unwrap_or_default().trim().to_owned()
}

/// The value after a key in a process's `status`; empty without the key.
fn status_value<'a>(status: &'a str, key: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim()
}

/// The beginning of a process's command line; empty if the process has ended.
fn command_line(process: &Path) -> Vec<u8> {
    let mut line = Vec::new();
    if let Ok(file) = File::open(process.join("cmdline")) {
        // What has been read before an error names no process.
        let _ = file.take(COMMAND_LINE_MAX).read_to_end(&mut line);
    }
    line
}

/// Whether a command line is that of a process of the launch of this name.
fn has_name(command: &[u8], name: &str) -> bool {
    const KINDS: [&str; 3] = [HELPER_ARGUMENT, PAUSE_ARGUMENT, HOLD_ARGUMENT];
    let mut arguments = command.split(|byte| *byte == 0).skip(1);
    let kind = arguments.next().unwrap_or_default();
    KINDS.iter().any(|known| known.as_bytes() == kind)
        && arguments.any(|argument| argument == name.as_bytes())
}

/// What processes with these pids are doing: at most a few of them.
pub fn describe_processes(pids: &[u32]) -> String {
    let mut described: Vec<_> = pids
        .iter()
        .take(DESCRIBED_MAX)
        .map(|pid| format!("{pid}: {}", describe(Path::new(&format!("/proc/{pid}")))))
        .collect();
    if pids.len() > DESCRIBED_MAX {
        described.push(format!("and {} more", pids.len() - DESCRIBED_MAX));
    }
    described.join("; ")
}

/// The name and state of a process, where it waits in the kernel, and its system call with the arguments.
fn describe(process: &Path) -> String {
    let status = read_text(process, "status");
    let (name, state) = (status_value(&status, "Name:"), status_value(&status, "State:"));
    let (place, call) = (read_text(process, "wchan"), read_text(process, "syscall"));
    format!("{name} is in state {state}, {place} ({call})")
}

#[cfg(test)]
pub mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process of a launch, which ends when this is dropped.
    pub struct LaunchProcess {
        child: Child,
        /// The name of its launch.
        pub name: String,
        _directory: tempfile::TempDir,
    }

    impl LaunchProcess {
        /// A shell that has a helper's command line, because its script is called as a helper's first argument is.
        pub fn start(script: &str) -> Self {
            Self::start_with(script, &[])
        }

        /// A shell as above, with more arguments behind the name.
        pub fn start_with(script: &str, more: &[String]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join(HELPER_ARGUMENT), script).unwrap();
            let name = format!("launch-{}", directory.path().display());
            let mut command = Command::new("sh");
            command.args([HELPER_ARGUMENT, &name]).args(more).current_dir(&directory).stdin(Stdio::piped());
            Self { child: command.spawn().unwrap(), name, _directory: directory }
        }
    }

    impl Drop for LaunchProcess {
        fn drop(&mut self) {
            // It may have been killed already.
            let _ = self.child.kill();
            self.child.wait().unwrap();
        }
    }

    #[test]
    fn only_the_processes_of_the_one_making_are_its_own() {
        let helper = b"/pericarp-agent\0container\0" as &[u8];
        assert!(has_name(b"/proc/self/exe\0pause\0launch-12\0", "launch-12"));
        assert!(has_name(&[helper, b"7\0-\0launch-12\0"].concat(), "launch-12"));
        assert!(!has_name(&[helper, b"7\0-\0launch-123\0"].concat(), "launch-12"));
        assert!(!has_name(b"sleep\0launch-12\0", "launch-12"));
        assert!(!has_name(b"", "launch-12"), "a kernel thread has no command line");
        assert_eq!(kill_launch("launch-of-nobody"), "none of its processes is left");
    }

    #[test]
    fn a_process_is_found_by_its_launch_and_killed_whatever_others_have_on_their_command_lines() {
        let launch = LaunchProcess::start("read line");
        // A name beyond the bytes that are looked at belongs to nobody.
        let far = LaunchProcess::start_with("read line", &["x".repeat(1 << 16), launch.name.clone()]);
        assert_eq!(processes(&launch.name).count(), 1);
        assert_ne!(kill_launch(&launch.name), "none of its processes is left");
        drop(launch);
        assert_eq!(processes(&far.name).count(), 1);
    }

    #[test]
    fn a_launch_that_waits_for_a_cpu_goes_on() {
        let after = |seconds, is_runnable| Progress { cpu: Duration::from_secs(seconds), is_runnable };
        assert!(after(4, false).goes_on_since(after(3, false)));
        assert!(after(3, true).goes_on_since(after(3, true)));
        assert!(!after(3, false).goes_on_since(after(3, true)));
    }

    #[test]
    fn what_a_process_does_is_its_launchs_progress() {
        let busy = LaunchProcess::start("while :; do :; done");
        while Progress::of_launch(&busy.name).cpu.is_zero() {
            std::thread::yield_now();
        }
        let before = Progress::of_launch(&busy.name);
        assert!(Progress::of_launch(&busy.name).goes_on_since(before));

        let idle = LaunchProcess::start("read line");
        // Once it waits for its input, it does nothing any more.
        let mut before = Progress::default();
        while before.cpu.is_zero() || Progress::of_launch(&idle.name).goes_on_since(before) {
            before = Progress::of_launch(&idle.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_process_is_described_by_what_it_waits_for() {
        let text = describe(Path::new("/proc/thread-self"));
        assert!(text.contains(" is in state R (running)"), "{text}");
    }
}
