//! These make namespaces, so they need root, as everything does that the jail is for.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{Read as _, Seek as _, Write as _},
    path::Path,
};

use super::*;

/// Runs a shell script in the jail; returns what it has written to its standard error, and its exit code.
fn run(script: &str, change: impl FnOnce(&mut JailedCommand)) -> (String, i32) {
    let mut output = tempfile::tempfile().unwrap();
    let mut command = JailedCommand::new("/bin/sh", "sh", output.try_clone().unwrap()).unwrap();
    command.argument("-c").unwrap().argument(format!("exec >&2; {script}")).unwrap();
    command.argument("sh").unwrap();
    change(&mut command);
    let child = command.spawn().unwrap();
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED).unwrap().unwrap();
    output.rewind().unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    (text, status.exit_status().unwrap_or(-1))
}

#[test]
fn the_program_is_the_first_process_of_namespaces_of_its_own() {
    let (text, status) = run(
        "echo $$; for kind in pid net ipc uts cgroup mnt; do readlink /proc/self/ns/$kind; done; exit 7",
        |_| {},
    );
    assert_eq!(status, 7, "{text}");
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("1"));
    for kind in ["pid", "net", "ipc", "uts", "cgroup"] {
        let own = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert_ne!(Path::new(lines.next().unwrap()), own, "{kind}");
    }
}

#[test]
fn the_program_can_signal_nobody_else() {
    let mut victim = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let (text, status) = run(&format!("kill -9 {} && echo killed", victim.id()), |_| {});
    assert!(!text.contains("killed") && status != 0, "{text}");
    assert!(victim.try_wait().unwrap().is_none());
    victim.kill().unwrap();
    victim.wait().unwrap();
}

#[test]
fn the_program_has_the_descriptors_that_it_is_handed_and_no_others() {
    let (reader, writer) = std::io::pipe().unwrap();
    // Without the flag that closes it, as a library might open it.
    let other = fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&other, rustix::io::FdFlags::empty()).unwrap();
    let (text, _) = run("echo $2 >&$2 2>/dev/null; ls /proc/self/fd; cat | wc -c", |command| {
        command.hand_down("--pipe", OwnedFd::from(writer)).unwrap();
    });
    let mut written = String::new();
    let mut reader = reader;
    reader.read_to_string(&mut written).unwrap();
    let number = written.trim();
    let listed: Vec<_> = text.lines().collect();
    assert!(listed.contains(&number), "{text}");
    assert!(!listed.contains(&other.as_raw_fd().to_string().as_str()), "{text}");
    assert_eq!(listed.last(), Some(&"0"), "its input is empty: {text}");
}

#[test]
fn the_program_gains_no_privileges_dumps_no_core_and_has_the_variables_that_it_is_given() {
    let (text, _) = run("grep NoNewPrivs /proc/self/status; grep core /proc/self/limits; env", |command| {
        command.variable("GIVEN", "a b").unwrap();
    });
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("PWD=")).collect();
    assert_eq!(lines[0], "NoNewPrivs:\t1");
    assert_eq!(lines[1].split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["1", "1"], "{text}");
    assert!(lines[2..].contains(&"GIVEN=a b"), "{text}");
    assert!(!text.contains("CARGO"), "{text}");
}

#[test]
fn the_program_is_in_its_cgroup_from_the_start() {
    let Some(cgroup) = Cgroup::make() else {
        let _ = writeln!(io::stderr(), "\nskipped: this machine has no cgroup v2 to write to");
        return;
    };
    let directory = fs::File::open(&cgroup.0).unwrap();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let (text, _) = run("cat /proc/self/cgroup", |command| {
        command.cgroup(directory.into());
    });
    // The root of its cgroup namespace.
    assert!(text.lines().any(|line| line == "0::/"), "{text}");
    assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), own);
}

/// A cgroup that is removed with this.
struct Cgroup(std::path::PathBuf);

impl Cgroup {
    fn make() -> Option<Self> {
        let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .into_iter()
            .find(|root| Path::new(root).join("cgroup.controllers").exists())?;
        let path = Path::new(root).join(format!("pericarp-jail-test-{}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_program_that_cannot_be_executed_is_an_error_and_leaves_no_process() {
    let children = || {
        fs::read_to_string(format!("/proc/self/task/{}/children", rustix::thread::gettid().as_raw_nonzero()))
            .unwrap()
    };
    let before = children();
    let command = JailedCommand::new("/no/such/program", "x", tempfile::tempfile().unwrap()).unwrap();
    assert_eq!(command.spawn().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    let command = JailedCommand::new("/etc", "x", tempfile::tempfile().unwrap()).unwrap();
    assert_eq!(command.spawn().unwrap_err().raw_os_error(), Some(libc::EACCES));
    assert_eq!(children(), before);
}

#[test]
fn signals_are_the_callers_own_again_and_the_programs_are_let_through() {
    let mask = || {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        status.lines().find(|line| line.starts_with("SigBlk")).unwrap().to_owned()
    };
    let before = mask();
    let (text, _) = run("grep SigBlk /proc/self/status", |_| {});
    assert_eq!(text.trim(), before);
    assert_eq!(mask(), before);
}
