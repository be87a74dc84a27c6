//! How many of a device's queue pairs are in use (virtio 1.2, section 5.1.6.5.5).
//!
//! The kernel gives a frame to any queue of the tap that is attached. So the queues of pairs that the driver does not
//! use must be detached.

use std::{
    io,
    sync::{Arc, Weak},
};

use thiserror::Error;

use super::tap::Tap;

/// The number of pairs in use cannot be changed.
#[derive(Debug, Error)]
pub enum SteeringError {
    #[error("the driver asks for {asked} queue pairs; it can have 1 to {most}")]
    Number { asked: u16, most: usize },
    #[error("queue pair {pair} has stopped: its tap is gone, or the guest has broken one of its queues")]
    Stopped { pair: usize },
    #[error("the kernel refuses to attach or detach the tap's queue of queue pair {pair}")]
    Tap {
        pair: usize,
        #[source]
        source: io::Error,
    },
}

/// Attaches and detaches the tap's queues.
pub struct Steering {
    /// The tap's queues of all pairs except the first, which is always in use. They belong to the pairs' workers: when
    /// one stops, its queue is closed.
    other_taps: Vec<Weak<Tap>>,
    /// Number of pairs in use.
    in_use: usize,
}

impl Steering {
    /// For a device of which one pair is in use. `other_taps` are the tap's queues of the other pairs, detached.
    pub fn new(other_taps: Vec<Weak<Tap>>) -> Self {
        Self { other_taps, in_use: 1 }
    }

    /// Puts this many pairs into use. Afterwards the guest receives nothing more through any other pair. After an error
    /// as many are in use as before, as far as the kernel allows.
    pub fn set(&mut self, pairs: u16) -> Result<(), SteeringError> {
        let most = self.other_taps.len() + 1;
        let requested = usize::from(pairs);
        if !(1..=most).contains(&requested) {
            return Err(SteeringError::Number { asked: pairs, most });
        }
        let before = self.in_use;
        self.change_to(requested).inspect_err(|_| {
            // If this fails too, `in_use` is the number that was reached.
            let _ = self.change_to(before);
        })
    }

    fn change_to(&mut self, pairs: usize) -> Result<(), SteeringError> {
        while self.in_use < pairs {
            let pair = self.in_use;
            let tap = self.tap(pair).ok_or(SteeringError::Stopped { pair })?;
            tap.attach_queue().map_err(|source| SteeringError::Tap { pair, source })?;
            self.in_use += 1;
        }
        while self.in_use > pairs {
            let pair = self.in_use - 1;
            // The queue of a pair that has stopped is closed, and so not attached.
            if let Some(tap) = self.tap(pair) {
                tap.detach_queue().map_err(|source| SteeringError::Tap { pair, source })?;
            }
            self.in_use -= 1;
        }
        Ok(())
    }

    /// The tap's queue of a pair, if the pair has not stopped. `pair` is not 0.
    fn tap(&self, pair: usize) -> Option<Arc<Tap>> {
        self.other_taps.get(pair.checked_sub(1)?)?.upgrade()
    }
}
