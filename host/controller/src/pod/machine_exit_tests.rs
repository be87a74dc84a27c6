use super::*;
use crate::{
    host::{machine::Machine, process::Process},
    pod::{
        life::{Life, Running},
        record,
        tests::undriven,
    },
};

/// The controller's log, the pod's status and the counter tell of a machine that its own filter has ended.
#[tokio::test]
async fn a_machine_that_its_filter_has_ended_is_told_with_thread_and_call() {
    let directory = tempfile::tempdir().unwrap();
    let (pod, mut task) = undriven(directory.path());
    std::fs::create_dir(pod.directory()).unwrap();
    let line =
        format!("error: thread vcpu made system call 257 (openat), {}\n", pericarp_vmm::FILTER_VIOLATION);
    std::fs::write(pod.files.log(), line).unwrap();
    let status = pericarp_vmm::FILTER_EXIT_STATUS;
    let mut process = std::process::Command::new("sh")
        .args(["-c", &format!("read line; exit {status}")])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (pid, pidfd) = Process::of(process.id()).unwrap().open().unwrap().unwrap();
    task.is_machine_watched = true;
    pod.watch_machine(Machine::adopt(pid, pidfd).unwrap());
    let running = Running::taken_over(process.id(), pod.spec().resources);
    task.spawn(Life::running_with(running));
    let before = crate::telemetry::counters::MACHINES_ENDED_BY_FILTER.get();
    drop(process.stdin.take());
    assert_eq!(pod.wait().await.exit, Exit::Code(status));
    let reason = pod.status().reason.unwrap();
    assert!(
        reason.starts_with("the machine was ended by its own filter of system calls: thread vcpu"),
        "{reason}"
    );
    assert!(reason.contains("system call 257 (openat)"), "{reason}");
    assert_eq!(record::end_on_record(pod.directory()).unwrap().exit, Exit::Code(status));
    assert!(crate::telemetry::counters::MACHINES_ENDED_BY_FILTER.get() > before);
    // Its exit status was taken by whoever watched it.
    let _ = process.wait();
}
