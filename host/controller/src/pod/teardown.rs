//! Ending a pod.

use std::{io, sync::Arc};

use super::{Ended, Phase, Pod, PodError};
use crate::{machine::Exit, undo::Undo};

impl Pod {
    /// Ends the machine and unmounts everything; the directory with its logs stays. Stopping twice is no
    /// error.
    pub async fn stop(self: &Arc<Self>) -> Result<(), PodError> {
        let _lifecycle = self.lifecycle.lock().await;
        self.end_phase();
        self.undo_running().await.map_err(|source| PodError::Teardown { pod: self.name(), source })
    }

    /// Removes everything of the pod.
    pub async fn shutdown(self: &Arc<Self>) -> Result<(), PodError> {
        let _lifecycle = self.lifecycle.lock().await;
        self.end_phase();
        self.undo_all().await.map_err(|source| PodError::Teardown { pod: self.name(), source })
    }

    /// Whether nothing of it is left, as far as this controller knows.
    pub fn is_undone(&self) -> bool {
        let state = self.state();
        state.running.is_empty() && state.directory.is_empty()
    }

    fn end_phase(&self) {
        self.state().phase = Phase::Ended;
        // At once: what is undone afterwards waits for requests that the guest has made, and answers as it likes.
        self.stopping.notify_one();
    }

    async fn undo_running(&self) -> io::Result<()> {
        // Nobody prepares a container meanwhile, and afterwards the phase forbids it.
        let _share = self.share.lock().await;
        let undo = std::mem::take(&mut self.state().running);
        let (undo, result) = run(undo).await;
        self.state().running = undo;
        self.state().containers.clear();
        result?;
        self.settle_end().await;
        Ok(())
    }

    /// Waits until the machine's process, which has been killed, is gone altogether.
    async fn settle_end(&self) {
        if self.state().watched {
            self.wait().await;
        } else if self.end().is_none() {
            // There was no machine, so nobody else tells those who wait.
            let ended = Ended { exit: Exit::Code(0), at: std::time::SystemTime::now() };
            self.ended.send_replace(Some(ended));
        }
    }

    pub(super) async fn undo_all(&self) -> io::Result<()> {
        self.undo_running().await?;
        let undo = std::mem::take(&mut self.state().directory);
        let (undo, result) = run(undo).await;
        self.state().directory = undo;
        result
    }
}

/// Runs undo steps where blocking is allowed. What could not be undone comes back.
async fn run(mut undo: Undo) -> (Undo, io::Result<()>) {
    let task = tokio::task::spawn_blocking(move || {
        let result = undo.run();
        (undo, result)
    });
    // A step that panics takes the rest of its list with it.
    task.await.unwrap_or_else(|error| (Undo::default(), Err(io::Error::other(error))))
}
