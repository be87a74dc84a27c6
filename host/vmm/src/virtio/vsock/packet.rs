//! The header of a packet (`struct virtio_vsock_hdr`, virtio 1.2, section 5.10.6): 44 bytes before the payload,
//! little-endian.

/// Size of a header in bytes.
pub const HEADER_SIZE: usize = 44;
/// Most bytes of payload that one packet carries, in either direction. Linux sends no more than this.
pub const PAYLOAD_MAX: usize = 64 * 1024;

/// The host's address (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;
/// The guest's address. All machines have the same: nothing except a guest's own device can reach it.
pub const GUEST_CID: u64 = 3;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
const TYPE_STREAM: u16 = 1;

/// Offsets of the header's fields, by their names in the specification.
mod field {
    pub const SRC_CID: usize = 0;
    pub const DST_CID: usize = 8;
    pub const SRC_PORT: usize = 16;
    pub const DST_PORT: usize = 20;
    pub const LEN: usize = 24;
    pub const TYPE: usize = 28;
    pub const OP: usize = 30;
    pub const FLAGS: usize = 32;
    pub const BUF_ALLOC: usize = 36;
    pub const FWD_CNT: usize = 40;
}

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
    fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// Flag of [`Operation::Shutdown`]: the sender will receive no more (`VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`Operation::Shutdown`]: the sender will send no more (`VIRTIO_VSOCK_SHUTDOWN_F_SEND`).
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// The two ports of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// The fields of a header that are not the same in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub ports: Ports,
    pub operation: Operation,
    /// Bytes of payload.
    pub length: u32,
    pub flags: u32,
    /// Size in bytes of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header that the guest has written. `None` if it is not from the guest's own address to the host, or no
    /// operation on a stream: the device offers nothing else.
    pub fn from_guest(bytes: &[u8; HEADER_SIZE]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let is_stream = u16_at(field::TYPE) == TYPE_STREAM;
        if u64_at(field::SRC_CID) != GUEST_CID || u64_at(field::DST_CID) != HOST_CID || !is_stream {
            return None;
        }
        Some(Self {
            ports: Ports { guest: u32_at(field::SRC_PORT), host: u32_at(field::DST_PORT) },
            length: u32_at(field::LEN),
            operation: Operation::from_number(u16_at(field::OP))?,
            flags: u32_at(field::FLAGS),
            buf_alloc: u32_at(field::BUF_ALLOC),
            fwd_cnt: u32_at(field::FWD_CNT),
        })
    }

    /// Writes the header as the guest reads it.
    pub fn to_guest(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        let fields: [(usize, &[u8]); 10] = [
            (field::SRC_CID, &HOST_CID.to_le_bytes()),
            (field::DST_CID, &GUEST_CID.to_le_bytes()),
            (field::SRC_PORT, &self.ports.host.to_le_bytes()),
            (field::DST_PORT, &self.ports.guest.to_le_bytes()),
            (field::LEN, &self.length.to_le_bytes()),
            (field::TYPE, &TYPE_STREAM.to_le_bytes()),
            (field::OP, &(self.operation as u16).to_le_bytes()),
            (field::FLAGS, &self.flags.to_le_bytes()),
            (field::BUF_ALLOC, &self.buf_alloc.to_le_bytes()),
            (field::FWD_CNT, &self.fwd_cnt.to_le_bytes()),
        ];
        for (offset, value) in fields {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        }
        bytes
    }
}

/// This packet as the other side would send it: with source and destination exchanged.
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
