//! The end of a pod's machine, by itself or because it is to end.
//!
//! A task of its own waits for it. What it notes is right at once, whatever the pod's task is busy with.

use std::{io, path::Path, sync::Arc, time::SystemTime};

use super::{Ended, Pod, record::End, task::Command};
use crate::{
    fault::FaultPoint,
    host::{
        cgroup,
        machine::{self, Exit, Machine},
    },
    telemetry::counters,
};

/// What is said of a machine that one of its filters has ended. Then it has a defect, or somebody has captured it.
pub(super) const ENDED_BY_FILTER: &str = "the machine was ended by its own filter of system calls";

/// Bytes of a log that an error quotes.
const QUOTE_MAX: u64 = 600;

impl Pod {
    /// Waits for the machine's end, and brings it about when the pod is to end or the guest is stuck.
    pub(super) fn watch_machine(self: &Arc<Self>, machine: Machine) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let exit = pod.end_of(&machine).await.unwrap_or(Exit::Unknown);
            pod.record_machine_exit(exit).await;
            // Nothing else of it is of use any more. If it has been removed meanwhile, nobody need know.
            let _ = pod.mailbox.send(Command::MachineEnded).await;
        });
    }

    async fn end_of(&self, machine: &Machine) -> io::Result<Exit> {
        tokio::select! {
            exit = machine.exited() => return exit,
            () = self.stop_requested() => {}
            silent = self.guest_stuck() => {
                let reason = format!("the guest has given no answer for {} s", silent.as_secs());
                tracing::warn!(pod = self.id(), reason, "a stuck machine is ended");
                self.status.send_modify(|status| status.reason = Some(reason));
            }
        }
        if let Err(error) = machine.signal_kill() {
            tracing::error!(pod = self.id(), %error, "cannot end a machine");
        }
        machine.exited().await
    }

    async fn record_machine_exit(self: &Arc<Self>, exit: Exit) {
        if self.is_stop_requested() {
            tracing::info!(pod = self.id(), ?exit, "machine stopped");
        } else {
            let words = self.last_words().await;
            let reason = if is_by_filter(exit, &words) {
                let ended_by_filter = counters::MACHINES_ENDED_BY_FILTER.add_one();
                tracing::error!(pod = self.id(), words, ended_by_filter, "{ENDED_BY_FILTER}");
                format!("{ENDED_BY_FILTER}: {words}")
            } else {
                tracing::warn!(pod = self.id(), ?exit, words, "machine ended unexpectedly");
                format!("the machine ended unexpectedly ({exit:?}): {words}")
            };
            self.status.send_modify(|status| {
                // A stuck guest's is known.
                status.reason.get_or_insert(reason);
            });
        }
        FaultPoint::MachineEnded.reached();
        let ended = Ended { exit, at: SystemTime::now() };
        let end = End::new(ended, self.status.borrow().reason.clone());
        // For a controller that is started before the pod has been removed.
        let pod = Arc::clone(self);
        let written = self.blocking.run(move || pod.record.change(|record| record.end = Some(end))).await;
        if let Err(error) = written {
            tracing::warn!(pod = self.id(), %error, "the end of a machine is not on record");
        }
        FaultPoint::EndRecorded.reached();
        self.ended.send_replace(Some(ended));
    }

    /// Why the machine ended, in its own last words if it had any.
    pub(super) async fn last_words(&self) -> String {
        let (log, console) = (self.files.log(), self.files.console());
        let cgroup = self.status.borrow().owned.cgroup();
        self.blocking.run(move || last_words(&log, &console, cgroup.as_deref())).await
    }
}

/// Whether a machine's filter has ended it. If nobody could tell how it ended, its last words do.
pub(super) fn is_by_filter(exit: Exit, words: &str) -> bool {
    exit.is_by_filter() || exit == Exit::Unknown && words.ends_with(pericarp_vmm::FILTER_VIOLATION)
}

/// What the files of a machine tell about its end. `cgroup` is the machine's, if it was in one. Blocks.
pub(super) fn last_words(log: &Path, console: &Path, cgroup: Option<&Path>) -> String {
    if let Some(words) = own_last_words(log) {
        return words;
    }
    if cgroup.is_some_and(cgroup::was_out_of_memory) {
        return "the host has killed it because the pod's cgroup was out of memory: give the pod more, or its \
                containers less"
            .to_owned();
    }
    format!("the last its guest printed: {:?}", machine::last_printed(console))
}

/// The error with which the machine has ended by itself. Blocks.
pub(super) fn own_last_words(log: &Path) -> Option<String> {
    let log = machine::tail(log, QUOTE_MAX);
    log.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(str::to_owned)
}

#[cfg(test)]
#[path = "machine_exit_tests.rs"]
mod tests;
