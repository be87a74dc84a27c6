//! What a packet says, without the addresses that are always the same.

/// `virtio_vsock_hdr.op` (virtio 1.2, section 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Request,
    Response,
    Reset,
    Shutdown,
    ReadWrite,
    CreditUpdate,
    CreditRequest,
}

impl Operation {
    pub fn from_number(number: u16) -> Option<Operation> {
        Some(match number {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown,
            5 => Operation::ReadWrite,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            _ => return None,
        })
    }

    pub fn number(self) -> u16 {
        match self {
            Operation::Request => 1,
            Operation::Response => 2,
            Operation::Reset => 3,
            Operation::Shutdown => 4,
            Operation::ReadWrite => 5,
            Operation::CreditUpdate => 6,
            Operation::CreditRequest => 7,
        }
    }
}

/// Flags of [`Operation::Shutdown`]: the sender will receive, or send, no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;

/// The two ends of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A packet's header, in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub ports: Ports,
    pub operation: Operation,
    /// Bytes of payload.
    pub length: u32,
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, modulo 2³².
    pub fwd_cnt: u32,
}
