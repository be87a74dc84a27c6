//! Descriptors for a running machine: files that it cannot open itself, because it sees nothing of the host.
//!
//! They travel over a socket of their own (`<run>/<sandbox id>/descriptors.sock`, `SOCK_SEQPACKET`), because ttrpc has
//! no place for them. They wait in the machine under a number, the ticket, that a call on the control socket names. The
//! machine answers each set with one byte, so that a call that follows finds it.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, recv,
    recvmsg, send, sendmsg, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

/// Most descriptors of a set: a disk's segments.
pub const SET_MAX: usize = 500;

/// Descriptors in one message. The kernel takes 253 (`SCM_MAX_FD`).
const MESSAGE_MAX: usize = 200;

/// How long either side waits for the other.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A message: the ticket, and how many descriptors follow it in later messages, both little-endian.
const HEADER: usize = 12;

/// The machine's answer to a set.
const RECEIVED: [u8; 1] = [1];

/// Makes the socket at which a machine takes descriptors.
pub fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let listener = socket()?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen(&listener, BACKLOG)?;
    Ok(listener)
}

/// Gives a set of descriptors to the machine that listens at a path, under a ticket. Blocks for at most some seconds.
pub fn give(path: &Path, ticket: u64, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    if descriptors.is_empty() || descriptors.len() > SET_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a set has 1 to {SET_MAX} descriptors, not {}", descriptors.len()),
        ));
    }
    let stream = socket()?;
    set_limits(&stream)?;
    connect(&stream, &SocketAddrUnix::new(path)?)?;
    let mut left = descriptors.len();
    for group in descriptors.chunks(MESSAGE_MAX) {
        left -= group.len();
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&ticket.to_le_bytes());
        header[8..].copy_from_slice(&u32::try_from(left).map_err(io::Error::other)?.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(group));
        sendmsg(&stream, &[io::IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL)?;
    }
    let mut answer = [0; 1];
    match recv(&stream, &mut answer, RecvFlags::empty())? {
        (1, _) if answer == RECEIVED => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::ConnectionReset, "the machine does not take the descriptors")),
    }
}

/// Takes a set from a connection, and its ticket. `keep` has it when it is answered; what it returns undoes that, if
/// nobody is there any more to take the answer. Blocks for at most some seconds.
pub fn receive<Undo: FnOnce()>(
    connection: impl AsFd,
    keep: impl FnOnce(u64, Vec<OwnedFd>) -> Undo,
) -> io::Result<()> {
    set_limits(&connection)?;
    let mut descriptors = Vec::new();
    let mut ticket = None;
    loop {
        let (number, left, more) = receive_message(&connection)?;
        descriptors.extend(more);
        if *ticket.get_or_insert(number) != number || descriptors.len() + left > SET_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the messages are not those of one set"));
        }
        if left == 0 {
            let undo = keep(number, descriptors);
            if let Err(error) = send(&connection, &RECEIVED, SendFlags::NOSIGNAL) {
                undo();
                return Err(error.into());
            }
            return Ok(());
        }
    }
}

/// One message: its ticket, how many descriptors follow later, and those that have come with it, at least one.
fn receive_message(connection: impl AsFd) -> io::Result<(u64, usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut header = [0; HEADER];
    let received =
        recvmsg(connection, &mut [io::IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors: Vec<_> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::other(
            "some of the descriptors cannot be had; the limit of open files may be reached",
        ));
    }
    if received.bytes != HEADER || descriptors.is_empty() || received.flags.contains(ReturnFlags::TRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a message with descriptors"));
    }
    let (ticket, left) = header.split_at(8);
    let ticket = u64::from_le_bytes(ticket.try_into().map_err(io::Error::other)?);
    let left = u32::from_le_bytes(left.try_into().map_err(io::Error::other)?);
    Ok((ticket, usize::try_from(left).map_err(io::Error::other)?, descriptors))
}

fn socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn set_limits(stream: impl AsFd) -> io::Result<()> {
    set_socket_timeout(&stream, Timeout::Recv, Some(TIME_LIMIT))?;
    set_socket_timeout(&stream, Timeout::Send, Some(TIME_LIMIT))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        fs::File,
        io::{Read as _, Seek as _, Write as _},
        thread,
    };

    use rustix::net::accept;

    use super::*;

    /// Gives files with these contents, and returns what arrives, or the machine's error.
    fn exchange(contents: &[String]) -> (io::Result<()>, io::Result<(u64, Vec<String>)>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen_at(&path).unwrap();
        let files: Vec<File> = contents.iter().map(|content| file(content)).collect();
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        thread::scope(|scope| {
            let machine = scope.spawn(|| {
                let mut taken = None;
                receive(accept(&listener).unwrap(), |ticket, set| {
                    taken = Some((ticket, set));
                    || ()
                })?;
                let (ticket, set) = taken.unwrap();
                Ok((ticket, set.into_iter().map(content).collect()))
            });
            let given = give(&path, 77, &descriptors);
            // Without a set, there is no connection.
            if given.is_err() {
                drop(connect_to(&path));
            }
            (given, machine.join().unwrap())
        })
    }

    fn connect_to(path: &Path) -> OwnedFd {
        let stream = socket().unwrap();
        connect(&stream, &SocketAddrUnix::new(path).unwrap()).unwrap();
        stream
    }

    fn file(content: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content.as_bytes()).unwrap();
        file.rewind().unwrap();
        file
    }

    fn content(descriptor: OwnedFd) -> String {
        let mut content = String::new();
        File::from(descriptor).read_to_string(&mut content).unwrap();
        content
    }

    #[test]
    fn a_set_arrives_whole_and_in_order_however_large() {
        for count in [1, MESSAGE_MAX, MESSAGE_MAX + 1, SET_MAX] {
            let contents: Vec<_> = (0..count).map(|number| number.to_string()).collect();
            let (given, taken) = exchange(&contents);
            given.unwrap();
            assert_eq!(taken.unwrap(), (77, contents), "{count}");
        }
    }

    #[test]
    fn a_set_too_large_or_empty_is_refused_before_anything_is_sent() {
        for count in [0, SET_MAX + 1] {
            let contents: Vec<_> = (0..count).map(|number| number.to_string()).collect();
            let (given, taken) = exchange(&contents);
            assert_eq!(given.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            taken.unwrap_err();
        }
    }

    #[test]
    fn neither_side_waits_for_ever_for_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen_at(&path).unwrap();
        let file = file("x");
        let start = std::time::Instant::now();
        // Nobody takes what is given, and nobody gives anything.
        give(&path, 1, &[file.as_fd()]).unwrap_err();
        let _silent = connect_to(&path);
        let _given = accept(&listener).unwrap();
        receive(accept(&listener).unwrap(), |_, _| -> fn() { panic!("nothing was given") }).unwrap_err();
        assert!(start.elapsed() >= 2 * TIME_LIMIT, "{:?}", start.elapsed());
    }

    #[test]
    fn what_is_given_by_somebody_who_has_gone_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen_at(&path).unwrap();
        let stream = connect_to(&path);
        let file = file("x");
        let set = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&set));
        sendmsg(&stream, &[io::IoSlice::new(&[0; HEADER])], &mut control, SendFlags::empty()).unwrap();
        drop(stream);
        let undone = std::cell::Cell::new(false);
        receive(accept(&listener).unwrap(), |_, _| || undone.set(true)).unwrap_err();
        assert!(undone.get());
    }

    #[test]
    fn a_message_of_another_form_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen_at(&path).unwrap();
        let header = |ticket: u64, left: u32| [&ticket.to_le_bytes()[..], &left.to_le_bytes()[..]].concat();
        let messages: [&[(Vec<u8>, bool)]; 6] = [
            &[(vec![], false)],
            &[(vec![0; HEADER - 1], true)],
            &[(vec![0; HEADER + 1], true)],
            &[(header(1, 0), false)],
            // Of two sets, and of one that is too large.
            &[(header(1, 1), true), (header(2, 0), true)],
            &[(header(1, u32::MAX), true)],
        ];
        for messages in messages {
            let stream = connect_to(&path);
            let file = file("x");
            for (bytes, with_descriptor) in messages {
                let set = [file.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if *with_descriptor {
                    control.push(SendAncillaryMessage::ScmRights(&set));
                }
                sendmsg(&stream, &[io::IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
            }
            let taken = receive(accept(&listener).unwrap(), |_, _| -> fn() {
                panic!("{messages:?} is taken for a set")
            });
            assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::InvalidData, "{messages:?}");
        }
    }
}
