//! A packet's header (virtio 1.2, section 5.10.6): 44 bytes before the payload, little-endian.

/// Size of a header in a queue.
pub const HEADER_SIZE: usize = 44;
/// Most payload that one packet carries, in either direction. Linux sends no more than this.
pub const PAYLOAD_MAX: usize = 64 * 1024;

/// The addresses of the two ends; there are no others.
pub const HOST_CID: u64 = 2;
/// The guest's address. Every machine has the same: nothing but its own device can reach it.
pub const GUEST_CID: u64 = 3;

const TYPE_STREAM: u16 = 1;

/// `virtio_vsock_hdr.op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    ReadWrite = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn from_number(number: u16) -> Option<Operation> {
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
}

/// Flags of [`Operation::Shutdown`]: the sender will receive, or send, no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The two ends of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A header without what is the same in all of them.
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

impl Header {
    /// Reads a header from the guest. `None` if it is not from the guest's own address to the host,
    /// or no operation on a stream: the device offers nothing else.
    pub fn from_guest(bytes: &[u8; HEADER_SIZE]) -> Option<Header> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if u64_at(0) != GUEST_CID || u64_at(8) != HOST_CID || u16_at(28) != TYPE_STREAM {
            return None;
        }
        Some(Header {
            ports: Ports { guest: u32_at(16), host: u32_at(20) },
            length: u32_at(24),
            operation: Operation::from_number(u16_at(30))?,
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        })
    }

    /// The header as the guest reads it.
    pub fn to_guest(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let fields: [(usize, &[u8]); 10] = [
            (0, &HOST_CID.to_le_bytes()),
            (8, &GUEST_CID.to_le_bytes()),
            (16, &self.ports.host.to_le_bytes()),
            (20, &self.ports.guest.to_le_bytes()),
            (24, &self.length.to_le_bytes()),
            (28, &TYPE_STREAM.to_le_bytes()),
            (30, &(self.operation as u16).to_le_bytes()),
            (32, &self.flags.to_le_bytes()),
            (36, &self.buf_alloc.to_le_bytes()),
            (40, &self.fwd_cnt.to_le_bytes()),
        ];
        for (at, value) in fields {
            bytes[at..at + value.len()].copy_from_slice(value);
        }
        bytes
    }
}

/// The same packet on the other side: source and destination changed over.
#[cfg(test)]
pub fn reversed(bytes: [u8; HEADER_SIZE]) -> [u8; HEADER_SIZE] {
    let mut reversed = bytes;
    reversed[0..8].copy_from_slice(&bytes[8..16]);
    reversed[8..16].copy_from_slice(&bytes[0..8]);
    reversed[16..20].copy_from_slice(&bytes[20..24]);
    reversed[20..24].copy_from_slice(&bytes[16..20]);
    reversed
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        ports: Ports { host: 0x0102_0304, guest: 0x0506_0708 },
        operation: Operation::CreditRequest,
        length: 9,
        flags: 10,
        buf_alloc: 0xffff_fffe,
        fwd_cnt: 0x8000_0001,
    };

    #[test]
    fn a_header_survives_the_way_there_and_back() {
        assert_eq!(Header::from_guest(&reversed(HEADER.to_guest())), Some(HEADER));
    }

    #[test]
    fn other_addresses_types_and_operations_are_not_taken() {
        let good = reversed(HEADER.to_guest());
        for (at, value) in [(0, 2), (8, 3), (15, 1), (28, 2), (30, 0), (30, 8), (31, 1)] {
            let mut bytes = good;
            bytes[at] = value;
            assert_eq!(Header::from_guest(&bytes), None, "byte {at} = {value}");
        }
    }
}
