//! What happens when a process of a container ends.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{TaskService, events};
use crate::{
    container::{Container, Process, ProcessState},
    launch::Exit,
    stdio::Stdio,
};

impl TaskService {
    /// Spawns a task that waits for the exit of a process and publishes it.
    pub(super) fn watch_exit(
        &self,
        container: &Arc<Container>,
        process: &Arc<Process>,
        exit: oneshot::Receiver<Exit>,
    ) {
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let (event_log, oom) = (Arc::clone(&self.events), self.oom.clone());
        tokio::spawn(async move {
            let Ok(exit) = exit.await else { return };
            process.set_state(ProcessState::Stopped { pid: process.pid(), exit });
            if process.exec_id.is_empty() {
                // An OOM event must come before the exit that it explains.
                if oom.is_some_and(|oom| oom.take_unreported_kills(container.id.as_str())) {
                    events::publish_oom(&event_log, container.id.as_str());
                }
                finish_container(&container).await;
            }
            events::publish_exit(&event_log, &container, &process, exit);
            process.finish(exit);
        });
    }
}

/// Ends the other processes of a container whose first process has ended, and waits until its output has been read. The
/// exit may be published only afterwards.
async fn finish_container(container: &Container) {
    // Only the end of a PID namespace's first process ends all others.
    if !container.has_private_pid_namespace()
        && let Err(error) = container.cgroup.kill()
    {
        tracing::warn!(%error, "processes of an ended container may be left");
    }
    // containerd stops reading a container's output when it learns of the exit. It does not stop for an exec.
    let drained = container.init.stdio().as_ref().map(Stdio::drained);
    if let Some(drained) = drained {
        drained.await;
    }
    container.wait_for_execs().await;
}
