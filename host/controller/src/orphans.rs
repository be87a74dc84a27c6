//! Ending pods that containerd has forgotten, and those of which something could not be undone.
//!
//! containerd takes a sandbox whose `Start` it had no answer to out of its store, and a start that fails after the
//! controller's part likewise, without another word to the controller. A pod that it knows it waits for, at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{errors::chain, pod::Pod, source::SourceError};

/// How long after a start, or after it was taken over, a pod may be without anybody who waits for it.
const CLAIM_TIME: Duration = Duration::from_secs(5);
/// How often containerd is asked before a pod is left to itself, and so to the next controller.
const QUESTIONS_MAX: u32 = 12;

/// How long after a failure a pod is tried to be removed again: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_SLOWEST: Duration = Duration::from_secs(60);

/// All pods of this node.
#[derive(Clone, Default)]
pub struct Pods(Arc<Mutex<HashMap<String, Arc<Pod>>>>);

impl Pods {
    pub fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        // Each change is one call on the map: it is sound even if a thread has panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the pod if containerd does not claim it and does not know it.
    pub fn remove_unless_claimed(&self, pod: &Arc<Pod>) {
        let (pods, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            for _ in 0..QUESTIONS_MAX {
                let claimed = tokio::time::timeout(CLAIM_TIME, pod.claimed()).await.is_ok();
                if claimed || !pods.lock().contains_key(&pod.id) {
                    return;
                }
                let known = pod.node().source.sandbox(&pod.namespace, &pod.id).await;
                // Otherwise it is perhaps about to be taken out of the store, or containerd is about to be started.
                if let Err(SourceError::NotFound { .. }) = known {
                    return pods.remove_orphan(&pod).await;
                }
            }
        });
    }

    async fn remove_orphan(&self, pod: &Arc<Pod>) {
        tracing::warn!(pod = pod.id, name = pod.name(), "containerd does not know this pod; it is removed");
        self.remove_at_last(pod).await;
    }

    /// Removes a pod of which something could not be undone when it was to be. Until that succeeds it stays known, so that
    /// containerd may try, too.
    pub fn remove_when_undone(&self, pod: &Arc<Pod>) {
        let (pods, pod) = (self.clone(), pod.clone());
        tokio::spawn(async move {
            tokio::time::sleep(RETRY_FIRST).await;
            pods.remove_at_last(&pod).await;
        });
    }

    async fn remove_at_last(&self, pod: &Arc<Pod>) {
        let mut pause = RETRY_FIRST;
        // If it is not there, containerd was quicker.
        while self.lock().contains_key(&pod.id) {
            match pod.shutdown().await {
                Ok(()) => {
                    self.lock().remove(&pod.id);
                    tracing::info!(pod = pod.id, name = pod.name(), "pod removed");
                }
                Err(error) => {
                    tracing::error!(pod = pod.id, error = chain(&error), ?pause, "cannot remove a pod yet");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_SLOWEST);
                }
            }
        }
    }
}
