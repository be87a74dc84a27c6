//! The loopback interface.

use std::io;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// Size of `nlmsghdr` and of `ifinfomsg`, in bytes.
const HEADER: usize = 16;
const MESSAGE_LENGTH: u32 = 32;
const RTM_NEWLINK: u16 = 16;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const IFF_UP: u32 = 1;
/// The loopback interface is the first of every network namespace (kernel: `LOOPBACK_IFINDEX`).
const LOOPBACK_INDEX: u32 = 1;

/// Sets the loopback interface of this network namespace up, as `ip link set lo up` does, by rtnetlink(7).
pub fn bring_loopback_up() -> io::Result<()> {
    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &set_up_message(LOOPBACK_INDEX), SendFlags::empty())?;
    let mut answer = [0; 128];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    acknowledgement(&answer[..length])
}

/// `nlmsghdr` followed by `ifinfomsg`: family, type, index, flags, mask of flags to change.
fn set_up_message(index: u32) -> [u8; 2 * HEADER] {
    let mut message = [0; 2 * HEADER];
    message[0..4].copy_from_slice(&MESSAGE_LENGTH.to_ne_bytes());
    message[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
    message[HEADER + 8..HEADER + 12].copy_from_slice(&IFF_UP.to_ne_bytes());
    message[HEADER + 12..HEADER + 16].copy_from_slice(&IFF_UP.to_ne_bytes());
    message
}

/// Reads an `NLMSG_ERROR` message, whose error number is 0 for an acknowledgement.
fn acknowledgement(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
    let code = answer.get(HEADER..HEADER + 4).map(|code| [code[0], code[1], code[2], code[3]]);
    match (kind, code.map(i32::from_ne_bytes)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(-code)),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "an unexpected answer from rtnetlink")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, code: i32) -> Vec<u8> {
        let mut answer = vec![0; 36];
        answer[4..6].copy_from_slice(&kind.to_ne_bytes());
        answer[16..20].copy_from_slice(&code.to_ne_bytes());
        answer
    }

    #[test]
    fn an_answer_is_an_acknowledgement_or_the_kernels_error() {
        assert!(acknowledgement(&answer(NLMSG_ERROR, 0)).is_ok());
        let error = acknowledgement(&answer(NLMSG_ERROR, -19)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(19));
        assert!(acknowledgement(&answer(RTM_NEWLINK, 0)).is_err());
        assert!(acknowledgement(&[0; 7]).is_err());
    }
}
