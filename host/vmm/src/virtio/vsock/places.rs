//! How many connections there may be, and of what kind: whoever makes many takes no place from the others.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Connections at the same time, greetings included.
pub const CONNECTIONS_MAX: usize = 1024;
/// Of those, most that the guest makes; its agent makes four.
pub const FROM_GUEST_MAX: usize = 128;
/// Most that are carried to the pod's localhost. What is left beside these two is for host programs alone: containerd's
/// calls and streams, and the controller's health checks, without which the machine is ended.
pub const FORWARDED_MAX: usize = 640;

/// Who makes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    HostProgram,
    Guest,
    Forwarded,
}

/// The places that are taken.
#[derive(Default)]
pub struct Places {
    all: Arc<AtomicUsize>,
    guest: Arc<AtomicUsize>,
    forwarded: Arc<AtomicUsize>,
}

/// A place, free again when this is dropped.
pub struct Place(Vec<Arc<AtomicUsize>>);

impl Places {
    /// A place for a connection of that kind, if there is one left.
    pub fn take(&self, kind: Kind) -> Option<Place> {
        let of_kind = match kind {
            Kind::HostProgram => None,
            Kind::Guest => Some((&self.guest, FROM_GUEST_MAX)),
            Kind::Forwarded => Some((&self.forwarded, FORWARDED_MAX)),
        };
        let counts: Vec<_> = [(&self.all, CONNECTIONS_MAX)].into_iter().chain(of_kind).collect();
        // Only the mux's thread takes places.
        if counts.iter().any(|(count, most)| count.load(Ordering::Relaxed) >= *most) {
            return None;
        }
        let counts = counts.into_iter().map(|(count, _)| {
            count.fetch_add(1, Ordering::Relaxed);
            count.clone()
        });
        Some(Place(counts.collect()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for count in &self.0 {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
