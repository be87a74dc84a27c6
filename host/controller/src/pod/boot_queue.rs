//! Whose turn it is to boot.
//!
//! A guest's boot is work for one CPU. More of them at a time than the node has CPUs would all be slow instead of one
//! after the other being quick, and a busy node would end each of them for its slowness.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Boots of all pods: so many at a time, in the order in which they were asked for.
#[derive(Clone)]
pub struct BootQueue {
    places: Arc<Semaphore>,
}

/// The right to boot, until it is dropped.
pub struct BootPlace {
    _permit: Option<OwnedSemaphorePermit>,
}

impl BootQueue {
    /// A queue of which that many are served at a time, at least one.
    pub fn new(at_a_time: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(at_a_time.max(1))) }
    }

    /// Waits for a place. Whoever stops waiting leaves the queue.
    pub async fn enter(&self) -> BootPlace {
        // The semaphore is never closed, so that there is a permit.
        BootPlace { _permit: Arc::clone(&self.places).acquire_owned().await.ok() }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn so_many_boot_at_a_time_and_the_others_in_their_order() {
        let queue = BootQueue::new(2);
        let mut entering: Vec<_> = (0..5).map(|_| Box::pin(queue.enter())).collect();
        let mut context = Context::from_waker(Waker::noop());
        let mut places: Vec<Option<BootPlace>> = Vec::new();
        for entering in &mut entering {
            places.push(match entering.as_mut().poll(&mut context) {
                Poll::Ready(place) => Some(place),
                Poll::Pending => None,
            });
        }
        let have = |places: &[Option<BootPlace>]| places.iter().map(Option::is_some).collect::<Vec<_>>();
        assert_eq!(have(&places), [true, true, false, false, false]);
        // The third goes away before it is its turn.
        let mut waiting = entering.split_off(2);
        drop(waiting.remove(0));
        places[0] = None;
        let turn: Vec<_> = waiting.iter_mut().map(|entering| entering.as_mut().poll(&mut context)).collect();
        assert_eq!(turn.iter().map(Poll::is_ready).collect::<Vec<_>>(), [true, false]);
    }
}
