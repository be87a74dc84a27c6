//! Kills the processes of a launch that has failed halfway.
//!
//! The processes that a helper creates are children of the agent (`CLONE_PARENT`), so they do not end with the helper.
//! A container's process whose helper has died would wait for its start for ever, with the container's streams open.
//! All processes of a launch have the helper's command line, whose last argument is a name that no other launch has. (A
//! process of a container that copies the command line is killed as well.)

use std::{fs, path::Path};

use rustix::process::{Pid, Signal, kill_process};

use super::HELPER_ARGUMENT;

/// How many processes are described at most.
const DESCRIBED_MAX: usize = 4;

/// Kills every process of the launch with that name, and returns a description of what they were doing.
pub fn kill_launch(name: &str) -> String {
    let mut descriptions = Vec::new();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = pid.file_name().to_str().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        let Some(number) = number.filter(|_| has_name(&command_line(&pid.path()), name)) else { continue };
        if descriptions.len() < DESCRIBED_MAX {
            descriptions.push(describe(&pid.path()));
        }
        // This fails if the process has ended in the meantime.
        let _ = kill_process(number, Signal::KILL);
    }
    if descriptions.is_empty() { "none of its processes is left".to_owned() } else { descriptions.join("; ") }
}

fn command_line(process: &Path) -> Vec<u8> {
    // A process that has ended has no command line.
    fs::read(process.join("cmdline")).unwrap_or_default()
}

/// Whether a command line is that of a helper whose launch has this name.
fn has_name(command: &[u8], name: &str) -> bool {
    let mut arguments = command.split(|byte| *byte == 0).skip(1);
    arguments.next() == Some(HELPER_ARGUMENT.as_bytes())
        && arguments.any(|argument| argument == name.as_bytes())
}

/// The name and state of a process, where it waits in the kernel, and its system call with the arguments.
fn describe(process: &Path) -> String {
    let read = |file: &str| fs::read_to_string(process.join(file)).unwrap_or_default().trim().to_owned();
    let status = read("status");
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim();
    format!("{} is in state {}, {} ({})", line("Name:"), line("State:"), read("wchan"), read("syscall"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_processes_of_the_one_making_are_its_own() {
        let helper = b"/pericarp-agent\0container\0" as &[u8];
        assert!(has_name(&[helper, b"7\0-\0launch-12\0"].concat(), "launch-12"));
        assert!(!has_name(&[helper, b"7\0-\0launch-123\0"].concat(), "launch-12"));
        assert!(!has_name(b"sleep\0launch-12\0", "launch-12"));
        assert!(!has_name(b"", "launch-12"), "a kernel thread has no command line");
        assert_eq!(kill_launch("launch-of-nobody"), "none of its processes is left");
    }

    #[test]
    fn a_process_is_described_by_what_it_waits_for() {
        let text = describe(Path::new("/proc/thread-self"));
        assert!(text.contains(" is in state R (running)"), "{text}");
    }
}
