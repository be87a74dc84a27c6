//! The pods of this node.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::pod::{Pod, ports::SourceError};

/// How long after a start, or after it was taken over, a pod may be without anybody who waits for it.
const CLAIM_TIME: Duration = Duration::from_secs(5);
/// How often it is asked whether somebody knows a pod before it is left to itself, and so to the next controller.
const QUESTIONS_MAX: u32 = 12;

/// All pods of this node, by their ids. A pod that has been removed is not there for anybody.
#[derive(Clone, Default)]
pub struct Pods(Arc<Mutex<HashMap<String, Arc<Pod>>>>);

impl Pods {
    /// The pods that were taken over.
    pub fn of_adopted(adopted: Vec<Arc<Pod>>) -> Self {
        let pods = Self::default();
        for pod in adopted {
            pods.lock().insert(pod.id().to_owned(), Arc::clone(&pod));
            pods.forget_when_removed(&pod);
            remove_unless_claimed(&pod);
        }
        pods
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Pod>>> {
        // Each change is one call on the map: it is sound even if a thread has panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, id: &str) -> Option<Arc<Pod>> {
        self.lock().get(id).filter(|pod| !pod.is_removed()).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.lock().values().filter(|pod| !pod.is_removed()).cloned().collect()
    }

    /// Makes a pod and adds it; returns whether there was none with this id.
    pub fn insert_new<E>(&self, id: &str, make: impl FnOnce() -> Result<Arc<Pod>, E>) -> Result<bool, E> {
        let pod = match self.lock().entry(id.to_owned()) {
            Entry::Occupied(known) if !known.get().is_removed() => return Ok(false),
            Entry::Occupied(mut removed) => {
                let pod = make()?;
                removed.insert(Arc::clone(&pod));
                pod
            }
            Entry::Vacant(free) => Arc::clone(free.insert(make()?)),
        };
        self.forget_when_removed(&pod);
        Ok(true)
    }

    fn forget_when_removed(&self, pod: &Arc<Pod>) {
        let (pods, pod) = (self.clone(), Arc::clone(pod));
        tokio::spawn(async move {
            pod.removed().await;
            // Another may have its id by now.
            if let Entry::Occupied(entry) = pods.lock().entry(pod.id().to_owned())
                && Arc::ptr_eq(entry.get(), &pod)
            {
                entry.remove();
            }
        });
    }
}

/// Removes the pod if nobody waits for it and nobody knows it.
///
/// containerd takes a sandbox whose `Start` it had no answer to out of its store, and a start that fails after the
/// controller's part likewise, without another word to the controller. A pod that it knows it waits for, at once.
pub fn remove_unless_claimed(pod: &Arc<Pod>) {
    let pod = Arc::clone(pod);
    tokio::spawn(async move {
        // What has not started has its own limit.
        pod.started().await;
        for _ in 0..QUESTIONS_MAX {
            let claimed = tokio::time::timeout(CLAIM_TIME, pod.claimed()).await.is_ok();
            if claimed || pod.is_removed() {
                return;
            }
            let known = pod.environment().containers.check_pod(pod.spec()).await;
            // Otherwise it is perhaps about to be taken out of the store, or whoever has the record is about to be
            // started.
            if let Err(SourceError::NotFound { .. }) = known {
                let name = pod.title();
                tracing::warn!(pod = pod.id(), name, "nobody knows this pod; it is removed");
                return pod.abandon().await;
            }
        }
    });
}
