//! What a device's worker waits on: epoll(7) with a type in place of its 64 bits of user data.
//!
//! Each worker has one [`WaitContext`] over the eventfds of its queues, the event that tells it to stop, and whatever
//! its device moves data to and from. The type of its tokens lists all of them, so that a `match` over an event is
//! complete. (crosvm's `WaitContext` and `EventToken` have the same form.)

use std::{io, marker::PhantomData, os::fd::AsRawFd, time::Duration};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Says which of a worker's descriptors an event is about.
pub trait EventToken: Copy {
    /// The user data that the kernel returns with each event of the descriptor.
    fn to_raw(self) -> u64;

    /// The token whose [`to_raw`](Self::to_raw) is `raw`. Panics if there is none: the kernel returns only what a
    /// worker has registered.
    fn from_raw(raw: u64) -> Self;
}

/// Declares an enum without data whose variants are [`EventToken`]s.
macro_rules! event_tokens {
    ($visibility:vis enum $name:ident { $($(#[$attribute:meta])* $token:ident,)+ }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name {
            $($(#[$attribute])* $token,)+
        }

        impl $crate::virtio::wait_context::EventToken for $name {
            fn to_raw(self) -> u64 {
                self as u64
            }

            fn from_raw(raw: u64) -> Self {
                match raw {
                    $(raw if raw == Self::$token as u64 => Self::$token,)+
                    _ => unreachable!("epoll returns the token {raw}, which was not registered"),
                }
            }
        }
    };
}
pub(crate) use event_tokens;

/// An event of one descriptor.
#[derive(Clone, Copy)]
pub struct Event<T> {
    /// Which descriptor it is about.
    pub token: T,
    raw: EpollEvent,
}

impl<T> Event<T> {
    /// What has happened.
    pub fn readiness(&self) -> EventSet {
        self.raw.event_set()
    }
}

/// A set of descriptors, each registered with a token.
///
/// The set does not own its descriptors: closing one takes it out.
pub struct WaitContext<T> {
    epoll: Epoll,
    tokens: PhantomData<T>,
}

impl<T: EventToken> WaitContext<T> {
    /// Makes an empty set. Fails if the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, tokens: PhantomData })
    }

    /// Adds a descriptor, and reports for as long as there is something to read (level-triggered).
    pub fn add(&self, source: &impl AsRawFd, token: T) -> io::Result<()> {
        self.add_for(source, EventSet::IN, token)
    }

    /// Adds a descriptor for the given events.
    pub fn add_for(&self, source: &impl AsRawFd, events: EventSet, token: T) -> io::Result<()> {
        self.control(ControlOperation::Add, source, events, token)
    }

    /// Replaces the events for which a descriptor was added. With [`EventSet::EDGE_TRIGGERED`], those that are there
    /// already are reported once more.
    pub fn modify(&self, source: &impl AsRawFd, events: EventSet, token: T) -> io::Result<()> {
        self.control(ControlOperation::Modify, source, events, token)
    }

    fn control(
        &self,
        operation: ControlOperation,
        source: &impl AsRawFd,
        events: EventSet,
        token: T,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, source.as_raw_fd(), EpollEvent::new(events, token.to_raw()))
    }

    /// Waits until there are events, or until `timeout` has passed (`None`: without a limit), and returns at most `N`
    /// of them. Returns none when a signal has interrupted the wait.
    pub fn wait<const N: usize>(
        &self,
        timeout: Option<Duration>,
    ) -> io::Result<impl Iterator<Item = Event<T>> + use<T, N>> {
        let mut events = [EpollEvent::default(); N];
        let count = match self.epoll.wait(milliseconds(timeout), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        Ok(events.into_iter().take(count).map(|raw| Event { token: T::from_raw(raw.data()), raw }))
    }
}

/// A timeout as `epoll_wait(2)` takes it: rounded up, so that the time has passed when the wait ends. One that is
/// longer than the kernel can count (24 days) ends early, which a caller cannot tell from a signal.
fn milliseconds(timeout: Option<Duration>) -> i32 {
    const FOREVER: i32 = -1;
    let Some(timeout) = timeout else { return FOREVER };
    i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    event_tokens! {
        enum Token {
            First,
            Second,
        }
    }

    fn events() -> (WaitContext<Token>, EventFd, EventFd) {
        let (first, second) =
            (EventFd::new(libc::EFD_NONBLOCK).unwrap(), EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let context = WaitContext::new().unwrap();
        context.add(&first, Token::First).unwrap();
        context.add(&second, Token::Second).unwrap();
        (context, first, second)
    }

    fn wait(context: &WaitContext<Token>) -> Vec<Token> {
        context.wait::<2>(Some(Duration::ZERO)).unwrap().map(|event| event.token).collect()
    }

    #[test]
    fn an_event_has_the_token_of_its_descriptor_until_it_is_read() {
        let (context, first, second) = events();
        assert_eq!(wait(&context), []);
        second.write(1).unwrap();
        assert_eq!(wait(&context), [Token::Second]);
        first.write(1).unwrap();
        assert_eq!(wait(&context).len(), 2);
        second.read().unwrap();
        assert_eq!(wait(&context), [Token::First]);
    }

    #[test]
    fn no_more_events_are_returned_than_are_asked_for() {
        let (context, first, second) = events();
        first.write(1).unwrap();
        second.write(1).unwrap();
        assert_eq!(context.wait::<1>(None).unwrap().count(), 1);
    }

    #[test]
    fn a_timeout_is_not_shortened() {
        assert_eq!(milliseconds(None), -1);
        assert_eq!(milliseconds(Some(Duration::ZERO)), 0);
        assert_eq!(milliseconds(Some(Duration::from_nanos(1))), 1);
        assert_eq!(milliseconds(Some(Duration::from_millis(2))), 2);
        assert_eq!(milliseconds(Some(Duration::MAX)), i32::MAX);
    }

    #[test]
    #[should_panic(expected = "which was not registered")]
    fn a_token_that_was_not_registered_is_a_defect() {
        Token::from_raw(2);
    }
}
