//! Descriptors that the controller has given the running machine, until a call says what they are for.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use pericarp_protos::descriptors;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{SocketFlags, accept_with},
};

use crate::{attack, lock::unpoisoned, thread_kind::ThreadKind, threads::ThreadSpawner};

/// Sets that wait for their call. The controller makes one call at a time; what a controller that was killed has left
/// is closed when as many have followed.
const SETS_MAX: usize = 4;

/// How long a set waits for its call, which follows it at once. A controller that was killed makes none, and what it
/// has
/// left must not stay open: a volume could not be detached from the host.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How long no connection is taken after one could not be: descriptors may be short.
const PAUSE: Duration = Duration::from_millis(100);

/// Descriptors that belong together.
struct Set {
    ticket: u64,
    descriptors: Vec<OwnedFd>,
    received: Instant,
}

/// Sets of descriptors, the oldest first.
#[derive(Clone, Default)]
pub struct ReceivedDescriptors(Arc<Mutex<VecDeque<Set>>>);

impl ReceivedDescriptors {
    /// Starts to take descriptors from a listener, on a thread of its own.
    pub fn receive_from(listener: OwnedFd, threads: &ThreadSpawner) -> io::Result<Self> {
        let received = Self::default();
        let shared = received.clone();
        let receive = move || {
            loop {
                attack::reached(ThreadKind::Descriptors);
                if let Err(error) = shared.receive_next(&listener) {
                    tracing::warn!(%error, "descriptors are not taken");
                    thread::sleep(PAUSE);
                }
            }
        };
        threads.spawn(ThreadKind::Descriptors, "descriptors", receive)?;
        Ok(received)
    }

    /// Takes a set from the next connection, and closes sets that have waited too long.
    fn receive_next(&self, listener: &OwnedFd) -> io::Result<()> {
        let wait = self.close_expired(Instant::now());
        let timeout = wait.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut connections = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut connections, timeout.as_ref()) {
            Ok(0) | Err(Errno::INTR) => return Ok(()),
            ready => ready?,
        };
        let connection = match accept_with(listener, SocketFlags::CLOEXEC) {
            Err(Errno::INTR | Errno::CONNABORTED) => return Ok(()),
            connection => connection?,
        };
        descriptors::receive(connection, |ticket, descriptors| {
            self.insert(Set { ticket, descriptors, received: Instant::now() });
            move || drop(self.remove(ticket))
        })
    }

    fn insert(&self, set: Set) {
        let mut sets = unpoisoned(self.0.lock());
        sets.retain(|other| other.ticket != set.ticket);
        if sets.len() == SETS_MAX {
            sets.pop_front();
        }
        sets.push_back(set);
    }

    /// Closes what has waited too long. Returns how long the oldest of the others may still wait.
    fn close_expired(&self, now: Instant) -> Option<Duration> {
        let mut sets = unpoisoned(self.0.lock());
        sets.retain(|set| now.duration_since(set.received) < WAIT_MAX);
        sets.front().map(|oldest| WAIT_MAX.saturating_sub(now.duration_since(oldest.received)))
    }

    /// Takes the set with a ticket; `None` if it has not arrived, or has waited too long.
    pub fn remove(&self, ticket: u64) -> Option<Vec<OwnedFd>> {
        let mut sets = unpoisoned(self.0.lock());
        let index = sets.iter().position(|set| set.ticket == ticket)?;
        sets.remove(index).map(|set| set.descriptors)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::virtio::testing::threads;

    #[test]
    fn a_set_is_taken_once_by_its_ticket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let received =
            ReceivedDescriptors::receive_from(descriptors::listen_at(&path).unwrap(), &threads()).unwrap();
        let file = tempfile::tempfile().unwrap();
        for ticket in [7, 8] {
            descriptors::give(&path, ticket, &[file.as_fd(), file.as_fd()]).unwrap();
        }
        assert_eq!(received.remove(8).map(|set| set.len()), Some(2));
        assert!(received.remove(8).is_none());
        assert!(received.remove(9).is_none());
        assert_eq!(received.remove(7).map(|set| set.len()), Some(2));
    }

    #[test]
    fn sets_that_nobody_asks_for_do_not_pile_up() {
        let received = ReceivedDescriptors::default();
        let set = |ticket, count| {
            let file = || OwnedFd::from(tempfile::tempfile().unwrap());
            let descriptors = std::iter::repeat_with(file).take(count).collect();
            Set { ticket, descriptors, received: Instant::now() }
        };
        for ticket in 0..10 {
            received.insert(set(ticket, 1));
        }
        // One that is given again replaces the first.
        received.insert(set(9, 2));
        assert!(received.remove(5).is_none());
        let left: Vec<_> = (6..10).map(|ticket| received.remove(ticket).unwrap().len()).collect();
        assert_eq!(left, [1, 1, 1, 2]);
    }

    #[test]
    fn a_set_that_nobody_asks_for_is_closed() {
        let received = ReceivedDescriptors::default();
        let now = Instant::now();
        let set = |ticket, age| {
            let descriptors = vec![OwnedFd::from(tempfile::tempfile().unwrap())];
            Set { ticket, descriptors, received: now.checked_sub(age).unwrap() }
        };
        received.insert(set(1, WAIT_MAX));
        received.insert(set(2, WAIT_MAX / 2));
        assert_eq!(received.close_expired(now), Some(WAIT_MAX / 2));
        assert!(received.remove(1).is_none());
        assert!(received.remove(2).is_some());
        assert_eq!(received.close_expired(now), None);
    }
}
