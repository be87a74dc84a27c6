//! Work that blocks, kept off the threads that serve everybody.

use std::{panic, sync::Arc};

use tokio::sync::Semaphore;

/// Pieces of blocking work that one pod has under way at most. A volume whose server does not answer strands one of
/// them, and so harms its own pod only.
const PLACES: usize = 4;

/// The blocking work of one pod.
#[derive(Clone)]
pub struct BlockingWork {
    places: Arc<Semaphore>,
}

impl BlockingWork {
    pub fn new() -> Self {
        Self { places: Arc::new(Semaphore::new(PLACES)) }
    }

    /// Does a piece of work on a thread where it may block, and waits for it. Once begun it is done whether or not this
    /// is polled on.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        // It is never closed, so that this does not fail; without a place it would only be done at once.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let done = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(place);
            result
        });
        match done.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => panic::resume_unwind(error.into_panic()),
            // The runtime ends, and with it whoever waits for this.
            Err(_) => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_pod_whose_work_hangs_has_so_much_of_it_and_harms_no_other_pod() {
        let (hung, other) = (BlockingWork::new(), BlockingWork::new());
        let (release, hold) = mpsc::channel::<()>();
        let hold = Arc::new(std::sync::Mutex::new(hold));
        let (begun, mut beginning) = tokio::sync::mpsc::unbounded_channel();
        let mut all = Vec::new();
        for _ in 0..3 * PLACES {
            let (hung, hold, begun) = (hung.clone(), Arc::clone(&hold), begun.clone());
            all.push(tokio::spawn(async move {
                hung.run(move || {
                    begun.send(()).unwrap();
                    hold.lock().unwrap().recv().unwrap();
                })
                .await;
            }));
        }
        for _ in 0..PLACES {
            beginning.recv().await.unwrap();
        }
        // Another pod's is done meanwhile, and no more of the hung one's has begun.
        assert_eq!(other.run(|| 7).await, 7);
        assert!(beginning.try_recv().is_err());
        for _ in 0..3 * PLACES {
            release.send(()).unwrap();
        }
        for work in all {
            work.await.unwrap();
        }
    }
}
