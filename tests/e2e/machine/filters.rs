//! A machine whose threads do what somebody would try who has captured one of them.

use std::fs;

use anyhow::{Context, Result, ensure};
use pericarp_tests::{
    Pod,
    node::{controller::PendingAttack, machine::MachineProcess},
    on_pericarp, on_pericarp_alone, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};

use super::jail::{busy_machine, value};

/// Threads, and calls that none of them needs.
const ATTACKS: [(&str, &str); 10] = [
    ("vcpu", "openat"),
    ("vcpu", "clone"),
    ("vsock", "socket"),
    ("net", "execve"),
    ("fs", "mount"),
    ("fs", "ptrace"),
    ("fs", "mprotect"),
    ("vsock", "kill"),
    ("control", "openat"),
    ("control", "clone"),
];

/// How many machines were ended by their filters, as every pod shows it.
async fn ended_by_filter(pod: &Pod) -> Result<u64> {
    let info = pod.info().await?;
    info["pericarp"]["machinesEndedByFilter"].as_u64().with_context(|| format!("{info:#}"))
}

#[test]
fn a_captured_thread_that_makes_a_call_which_it_does_not_need_ends_its_machine_and_no_other() -> Result<()> {
    on_pericarp_alone(async |node| {
        let bystander = node.pod("bystander").run().await?;
        let idle = bystander.idle_container("idle").await?;
        for (thread, call) in ATTACKS {
            let context = || format!("{thread} {call}");
            let before = ended_by_filter(&bystander).await?;
            let attack = PendingAttack::of_next_machine(thread, call)?;
            let pod =
                node.pod(&format!("{thread}-{call}").replace('_', "-")).run().await.with_context(context)?;
            ensure!(attack.is_claimed(), "{thread} {call}: the machine was started without it");
            let container = pod.idle_container("idle").await;
            wait_until("the end of the machine", async || {
                if let Some(machine) = MachineProcess::of_pod(&pod.id)? {
                    // A vCPU leaves the guest for a signal. Each device has something to do.
                    let pid = Pid::from_raw(machine.pid).context("a process id")?;
                    let _ = kill_process(pid, Signal::STOP).and_then(|()| kill_process(pid, Signal::CONT));
                    // Asks the machine how it is.
                    let _ = pod.info().await;
                    if let Ok(container) = &container {
                        let _ = container.shell("cat /etc/passwd > /tmp/copy").await;
                    }
                }
                Ok(!pod.is_ready().await?)
            })
            .await
            .with_context(context)?;
            let info = pod.info().await?;
            let reason = info["pericarp"]["reason"].as_str().unwrap_or_default();
            ensure!(
                reason.contains("ended by its own filter")
                    && reason.contains(&format!("thread {thread} made system call "))
                    && reason.contains(&format!(" ({call}), ")),
                "{thread} {call}: {reason:?}"
            );
            assert_eq!(ended_by_filter(&bystander).await?, before + 1, "{thread} {call}");
            assert_eq!(idle.shell("echo alive").await?, "alive", "{thread} {call}");
            pod.stop().await?;
            pod.remove().await?;
        }
        Ok(())
    })
}

#[test]
fn every_thread_of_a_machine_has_a_filter() -> Result<()> {
    on_pericarp(async |node| {
        let machine = busy_machine(node).await?;
        for thread in fs::read_dir(machine.join("task"))? {
            let thread = thread?.path();
            let name = fs::read_to_string(thread.join("comm"))?;
            let status = fs::read_to_string(thread.join("status"))?;
            let number = |key: &str| anyhow::Ok(value(&status, key)?.parse::<u32>()?);
            // SECCOMP_MODE_FILTER. All except the first have the spawner's two filters and one of their own.
            assert_eq!(number("Seccomp:")?, 2, "{name}: {status}");
            let is_first = thread.file_name() == machine.file_name();
            let expected = match name.trim() {
                _ if is_first => 1,
                "spawner" => 2,
                // Its threads have those of the thread that has started the first of them.
                "listener_loop" | "reaper" | "client_handler" | "control" => 4,
                _ => 3,
            };
            assert_eq!(number("Seccomp_filters:")?, expected, "{name}: {status}");
        }
        Ok(())
    })
}
