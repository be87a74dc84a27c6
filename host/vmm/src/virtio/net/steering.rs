//! How many of a device's queue pairs are in use (virtio 1.2, section 5.1.6.5.5).
//!
//! The kernel gives a frame to any of the tap's queues that are attached, so that those of pairs which
//! the driver does not use must not be.

use std::{
    io,
    sync::{Arc, Weak},
};

use thiserror::Error;

use super::tap::Tap;

/// The number of pairs stays as it is.
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
    /// Those of all pairs but the first, which is always in use. They belong to the pairs' workers: the
    /// queue of one that has stopped is closed.
    further: Vec<Weak<Tap>>,
    in_use: usize,
}

impl Steering {
    /// One pair is in use. `further` are the tap's queues of the others, detached.
    pub fn new(further: Vec<Weak<Tap>>) -> Steering {
        Steering { further, in_use: 1 }
    }

    /// Puts this many pairs into use. Afterwards the guest receives nothing more by any other.
    pub fn set(&mut self, pairs: u16) -> Result<(), SteeringError> {
        let most = self.further.len() + 1;
        let wanted = usize::from(pairs);
        if !(1..=most).contains(&wanted) {
            return Err(SteeringError::Number { asked: pairs, most });
        }
        let before = self.in_use;
        self.change(wanted).inspect_err(|_| {
            // What could not be changed just now may stay as it is now.
            let _ = self.change(before);
        })
    }

    fn change(&mut self, wanted: usize) -> Result<(), SteeringError> {
        while self.in_use < wanted {
            let pair = self.in_use;
            let tap = self.tap(pair).ok_or(SteeringError::Stopped { pair })?;
            tap.attach_queue().map_err(|source| SteeringError::Tap { pair, source })?;
            self.in_use += 1;
        }
        while self.in_use > wanted {
            let pair = self.in_use - 1;
            // One that has stopped is not attached any more.
            if let Some(tap) = self.tap(pair) {
                tap.detach_queue().map_err(|source| SteeringError::Tap { pair, source })?;
            }
            self.in_use -= 1;
        }
        Ok(())
    }

    /// The first pair, 0, is not among them.
    fn tap(&self, pair: usize) -> Option<Arc<Tap>> {
        self.further.get(pair.checked_sub(1)?)?.upgrade()
    }
}
