//! What the device's worker waits on.

use crate::virtio::wait_context::EventToken;

/// Identifies a stream, or the connection of a host program that has not said yet which port it wants. None is used
/// twice, so that an event which the kernel reported before its descriptor was closed finds nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(u64);

impl StreamId {
    pub const FIRST: Self = Self(0);

    /// The id after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The sockets on which the device accepts connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// The unix socket that stands for the guest.
    HostPrograms,
    /// The TCP socket to which connections to the pod's localhost are steered.
    PortForward,
}

/// A descriptor of the worker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The guest has notified the receive queue.
    ReceiveQueue,
    /// The guest has notified the transmit queue.
    TransmitQueue,
    Stop,
    Listener(Listener),
    Stream(StreamId),
}

/// The raw value of the first stream's token. Those below are the other tokens'.
const FIRST_STREAM: u64 = 16;

impl EventToken for Token {
    fn to_raw(self) -> u64 {
        match self {
            Self::ReceiveQueue => 0,
            Self::TransmitQueue => 1,
            Self::Stop => 2,
            Self::Listener(Listener::HostPrograms) => 3,
            Self::Listener(Listener::PortForward) => 4,
            Self::Stream(StreamId(id)) => FIRST_STREAM + id,
        }
    }

    fn from_raw(raw: u64) -> Self {
        match raw {
            0 => Self::ReceiveQueue,
            1 => Self::TransmitQueue,
            2 => Self::Stop,
            3 => Self::Listener(Listener::HostPrograms),
            4 => Self::Listener(Listener::PortForward),
            FIRST_STREAM.. => Self::Stream(StreamId(raw - FIRST_STREAM)),
            _ => unreachable!("epoll returns the token {raw}, which was not registered"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_the_one_that_it_was_registered_as() {
        for token in [
            Token::ReceiveQueue,
            Token::TransmitQueue,
            Token::Stop,
            Token::Listener(Listener::HostPrograms),
            Token::Listener(Listener::PortForward),
            Token::Stream(StreamId::FIRST),
            Token::Stream(StreamId::FIRST.next()),
        ] {
            assert_eq!(Token::from_raw(token.to_raw()), token);
        }
    }
}
