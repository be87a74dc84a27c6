//! Pausing a container.
//!
//! A process that is created in a container while it is being paused would be frozen before the agent knows of it, and
//! its creation would hang. So a container is not paused while a process is being created in it, nor the other way
//! round.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::timeout,
};

use crate::resources::{Cgroup, CgroupError};

/// How long a pause waits for processes that are being created.
const CREATION_LIMIT: Duration = Duration::from_secs(10);

/// Whether a container's processes are frozen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum PauseState {
    #[default]
    Running,
    Paused,
}

/// Pauses and resumes one container.
#[derive(Default)]
pub struct PauseControl {
    state: Mutex<PauseState>,
    /// Locked for reading while a process is created, and for writing while the state changes.
    transition: RwLock<()>,
}

/// Why a container is not paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It is paused already, or is not paused, or the creation of a process in it takes too long.
    #[error("{0}")]
    State(&'static str),
    /// The cgroup cannot be frozen or thawed.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl PauseControl {
    /// Whether the container's processes are frozen.
    pub fn is_paused(&self) -> bool {
        self.state() == PauseState::Paused
    }

    /// Prevents the container from being paused until the guard is dropped. Returns `None` if it is paused.
    pub async fn prevent_pause(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let guard = self.transition.read().await;
        (!self.is_paused()).then_some(guard)
    }

    /// Freezes every process of the container. If one does not freeze in time, all are thawed again.
    pub async fn pause(&self, cgroup: &Cgroup) -> Result<(), PauseError> {
        let _transition = self.begin_transition().await?;
        match self.state() {
            PauseState::Paused => return Err(PauseError::State("cannot pause a paused container")),
            PauseState::Running => cgroup.freeze().await?,
        }
        self.set_state(PauseState::Paused);
        Ok(())
    }

    /// Thaws every process of the container.
    pub async fn resume(&self, cgroup: &Cgroup) -> Result<(), PauseError> {
        let _transition = self.begin_transition().await?;
        match self.state() {
            PauseState::Running => return Err(PauseError::State("it is not paused")),
            PauseState::Paused => cgroup.thaw().await?,
        }
        self.set_state(PauseState::Running);
        Ok(())
    }

    async fn begin_transition(&self) -> Result<RwLockWriteGuard<'_, ()>, PauseError> {
        let guard = timeout(CREATION_LIMIT, self.transition.write()).await;
        guard.map_err(|_| PauseError::State("processes are still being made in it; try again"))
    }

    fn state(&self) -> PauseState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_state(&self, state: PauseState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_container_is_not_paused_while_a_process_is_made_in_it() {
        let cgroup = Cgroup::existing(Some(std::path::Path::new("/pericarp-test-none"))).unwrap();
        let control = PauseControl::default();
        let creation = control.prevent_pause().await.unwrap();
        let error = control.pause(&cgroup).await.unwrap_err();
        assert!(error.to_string().contains("still being made"), "{error}");
        drop(creation);
        let error = control.pause(&cgroup).await.unwrap_err();
        assert!(matches!(error, PauseError::Cgroup(_)), "there is no such cgroup: {error}");
        assert!(control.prevent_pause().await.is_some(), "a pause that failed leaves it running");
    }
}
