//! Descriptors that the controller has given the running machine, until a call says what they are for.

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use pericarp_protos::descriptors;

use crate::lock::unpoisoned;

/// Sets that wait for their call. The controller makes one call at a time; what a controller that was killed has left
/// is closed when as many have followed.
const SETS_MAX: usize = 4;

/// How long no connection is taken after one could not be: descriptors may be short.
const PAUSE: Duration = Duration::from_millis(100);

/// Sets of descriptors by their tickets, the oldest first.
#[derive(Clone, Default)]
pub struct ReceivedDescriptors(Arc<Mutex<VecDeque<(u64, Vec<OwnedFd>)>>>);

impl ReceivedDescriptors {
    /// Starts to take descriptors from a listener, on a thread of its own.
    pub fn receive_from(listener: OwnedFd) -> io::Result<Self> {
        let received = Self::default();
        let receiver = received.clone();
        let receive = move || {
            loop {
                match rustix::net::accept_with(&listener, rustix::net::SocketFlags::CLOEXEC) {
                    Ok(connection) => receiver.receive(connection),
                    Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                    Err(error) => {
                        tracing::warn!(%error, "cannot take a connection with descriptors");
                        thread::sleep(PAUSE);
                    }
                }
            }
        };
        thread::Builder::new().name("descriptors".into()).spawn(receive)?;
        Ok(received)
    }

    fn receive(&self, connection: OwnedFd) {
        if let Err(error) = descriptors::take(connection, |ticket, set| self.insert(ticket, set)) {
            tracing::warn!(%error, "descriptors are not taken");
        }
    }

    fn insert(&self, ticket: u64, set: Vec<OwnedFd>) {
        let mut sets = unpoisoned(self.0.lock());
        sets.retain(|(other, _)| *other != ticket);
        if sets.len() == SETS_MAX {
            sets.pop_front();
        }
        sets.push_back((ticket, set));
    }

    /// Takes the set with a ticket; `None` if it has not arrived.
    pub fn take(&self, ticket: u64) -> Option<Vec<OwnedFd>> {
        let mut sets = unpoisoned(self.0.lock());
        let index = sets.iter().position(|(other, _)| *other == ticket)?;
        sets.remove(index).map(|(_, set)| set)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_set_is_taken_once_by_its_ticket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let received = ReceivedDescriptors::receive_from(descriptors::listen_at(&path).unwrap()).unwrap();
        let file = tempfile::tempfile().unwrap();
        for ticket in [7, 8] {
            descriptors::give(&path, ticket, &[file.as_fd(), file.as_fd()]).unwrap();
        }
        assert_eq!(received.take(8).map(|set| set.len()), Some(2));
        assert!(received.take(8).is_none());
        assert!(received.take(9).is_none());
        assert_eq!(received.take(7).map(|set| set.len()), Some(2));
    }

    #[test]
    fn sets_that_nobody_asks_for_do_not_pile_up() {
        let received = ReceivedDescriptors::default();
        let set = || vec![OwnedFd::from(tempfile::tempfile().unwrap())];
        for ticket in 0..10 {
            received.insert(ticket, set());
        }
        // One that is given again replaces the first.
        received.insert(9, [set(), set()].into_iter().flatten().collect());
        assert!(received.take(5).is_none());
        let left: Vec<_> = (6..10).map(|ticket| received.take(ticket).unwrap().len()).collect();
        assert_eq!(left, [1, 1, 1, 2]);
    }
}
