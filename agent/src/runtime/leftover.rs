//! What is left of a container process whose making has failed half-way.
//!
//! The helper's processes are the agent's own children (`CLONE_PARENT`), so the end of one does not end the
//! others: a container's process whose helper has died would wait for its start for ever, with the container's
//! streams open. All of them still have the helper's command line, the last argument of which is a name that no
//! other has. (A container's process that puts the same on its own command line is killed instead; that is its
//! own affair.)

use std::{fs, path::Path};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::HELPER_ARGUMENT;

/// Processes that an answer describes.
const DESCRIBED: usize = 4;

/// Kills every process of the making called `name`; answers with what they were doing.
pub fn end(name: &str) -> String {
    let mut found = Vec::new();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let number = pid.file_name().to_str().and_then(|pid| pid.parse().ok());
        let Some(number) = number.filter(|_| is_of(&command_line(&pid.path()), name)) else { continue };
        if found.len() < DESCRIBED {
            found.push(describe(&pid.path()));
        }
        // One that has ended in the meantime is what was wanted.
        let _ = kill(Pid::from_raw(number), Signal::SIGKILL);
    }
    if found.is_empty() { "none of its processes is left".to_owned() } else { found.join("; ") }
}

fn command_line(process: &Path) -> Vec<u8> {
    // One that has ended has none.
    fs::read(process.join("cmdline")).unwrap_or_default()
}

fn is_of(command: &[u8], name: &str) -> bool {
    let mut arguments = command.split(|byte| *byte == 0).skip(1);
    arguments.next() == Some(HELPER_ARGUMENT.as_bytes())
        && arguments.any(|argument| argument == name.as_bytes())
}

/// Its name and state, where in the kernel it waits, and the system call with its arguments.
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
        assert!(is_of(&[helper, b"7\0-\0launch-12\0"].concat(), "launch-12"));
        assert!(!is_of(&[helper, b"7\0-\0launch-123\0"].concat(), "launch-12"));
        assert!(!is_of(b"sleep\0launch-12\0", "launch-12"));
        assert!(!is_of(b"", "launch-12"), "a kernel thread has no command line");
        assert_eq!(end("launch-of-nobody"), "none of its processes is left");
    }

    #[test]
    fn a_process_is_described_by_what_it_waits_for() {
        let text = describe(Path::new("/proc/thread-self"));
        assert!(text.contains(" is in state R (running)"), "{text}");
    }
}
