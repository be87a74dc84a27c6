//! Pausing a container's processes.
//!
//! A process that is made in a container that is being paused would be stopped before anybody knows of it, and whoever makes
//! it would wait; so the two exclude each other.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::{
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::timeout,
};

use crate::cgroup::{Cgroup, CgroupError};

/// How long a pause waits for processes that are just being made.
const MAKING_LIMIT: Duration = Duration::from_secs(10);

/// Whether a container is paused, and who is changing that.
#[derive(Default)]
pub struct Pausing {
    paused: AtomicBool,
    changing: RwLock<()>,
}

/// Why a container is not paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// It is paused already, or is not paused; or processes are being made in it for too long.
    #[error("{0}")]
    State(&'static str),
    /// The kernel does not do it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl Pausing {
    /// Whether its processes are stopped.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// While the answer lives, the container is not paused. None: it is.
    pub async fn hold_off(&self) -> Option<RwLockReadGuard<'_, ()>> {
        let guard = self.changing.read().await;
        (!self.is_paused()).then_some(guard)
    }

    /// Stops every process of the container. All of them go on if one does not stop in time.
    pub async fn pause(&self, cgroup: &Cgroup) -> Result<(), PauseError> {
        let _changing = self.change().await?;
        if self.is_paused() {
            return Err(PauseError::State("cannot pause a paused container"));
        }
        cgroup.freeze().await?;
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Lets the processes go on.
    pub async fn resume(&self, cgroup: &Cgroup) -> Result<(), PauseError> {
        let _changing = self.change().await?;
        if !self.is_paused() {
            return Err(PauseError::State("it is not paused"));
        }
        cgroup.thaw().await?;
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    async fn change(&self) -> Result<RwLockWriteGuard<'_, ()>, PauseError> {
        let waited = timeout(MAKING_LIMIT, self.changing.write()).await;
        waited.map_err(|_| PauseError::State("processes are still being made in it; try again"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_container_is_not_paused_while_a_process_is_made_in_it() {
        let cgroup = Cgroup::existing(Some(std::path::Path::new("/pericarp-test-none"))).unwrap();
        let pausing = Pausing::default();
        let making = pausing.hold_off().await.unwrap();
        let error = pausing.pause(&cgroup).await.unwrap_err();
        assert!(error.to_string().contains("still being made"), "{error}");
        drop(making);
        let error = pausing.pause(&cgroup).await.unwrap_err();
        assert!(matches!(error, PauseError::Cgroup(_)), "there is no such cgroup: {error}");
        assert!(pausing.hold_off().await.is_some(), "a pause that failed is none");
    }
}
