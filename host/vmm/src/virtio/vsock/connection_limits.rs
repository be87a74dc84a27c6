//! How many connections there may be at a time, by who makes them: forwarded ones cannot use up what the others need.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Most connections at a time, those included whose host program has not yet said which port it wants.
pub const CONNECTIONS_MAX: usize = 1024;
/// Most of them that are forwarded to the pod's localhost. What these leave is for host programs alone: containerd's
/// calls and streams, and the controller's health checks, without which the controller would end the machine.
pub const FORWARDED_MAX: usize = 640;

/// Who makes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Initiator {
    /// A host program that has connected to the device's unix socket.
    HostProgram,
    /// The guest, which connects to the host once.
    Guest,
    /// A client of the pod's localhost on the host.
    PortForward,
}

/// Counts the connections that exist.
#[derive(Default)]
pub struct ConnectionLimits {
    all: Arc<AtomicUsize>,
    forwarded: Arc<AtomicUsize>,
}

/// Leave for one connection to exist. Dropping it makes room for another.
pub struct ConnectionPermit {
    counts: Vec<Arc<AtomicUsize>>,
}

impl ConnectionLimits {
    /// Counts one more connection; `None` if as many exist as may.
    pub fn try_acquire(&self, initiator: Initiator) -> Option<ConnectionPermit> {
        let own_limit = match initiator {
            Initiator::HostProgram | Initiator::Guest => None,
            Initiator::PortForward => Some((&self.forwarded, FORWARDED_MAX)),
        };
        let limits: Vec<_> = [(&self.all, CONNECTIONS_MAX)].into_iter().chain(own_limit).collect();
        // Between this check and the increments nobody else counts: only the mux's thread acquires permits.
        if limits.iter().any(|(count, limit)| count.load(Ordering::Relaxed) >= *limit) {
            return None;
        }
        let counts = limits.into_iter().map(|(count, _)| {
            count.fetch_add(1, Ordering::Relaxed);
            count.clone()
        });
        Some(ConnectionPermit { counts: counts.collect() })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        for count in &self.counts {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
