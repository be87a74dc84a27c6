//! Links that disappear from under a running pod.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::RouteNetlinkMessage,
};
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
        socket_with,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{NetworkError, inside::inside, survey};

/// `RTMGRP_LINK` (rtnetlink(7)): changes of links.
const LINKS: u32 = 1;
/// Larger than any message about a link.
const MESSAGE_MAX: usize = 32 << 10;

/// Hears of links that are removed from a network namespace, and keeps the namespace alive.
pub struct Watch {
    socket: AsyncFd<OwnedFd>,
    /// Those that are there, by index.
    links: HashMap<u32, String>,
}

impl Watch {
    /// Begins to listen in a network namespace.
    pub async fn new(netns: &Path) -> Result<Watch, NetworkError> {
        let netns = netns.to_owned();
        let listen = move || {
            inside(&netns, async |handle| {
                let socket = listen().map_err(|errno| NetworkError::Netlink {
                    request: "tell of links that are removed".into(),
                    source: errno.into(),
                })?;
                // After that, so that none is missed.
                let links = survey::links(&handle).await?;
                Ok((socket, links.into_iter().map(|link| (link.index, link.name)).collect()))
            })
        };
        let listening = tokio::task::spawn_blocking(listen).await;
        let (socket, links) =
            listening.unwrap_or_else(|error| Err(NetworkError::Thread(io::Error::other(error))))?;
        // SAFETY: an owned descriptor stands for the same open file until it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
            .map_err(|error| NetworkError::Thread(error.into()))?;
        Ok(Watch { socket, links })
    }

    /// The names of links that are removed at the same time, as soon as there are any.
    pub async fn removed(&mut self) -> io::Result<Vec<String>> {
        let mut buffer = vec![0; MESSAGE_MAX];
        loop {
            let received = self
                .socket
                .async_io(Interest::READABLE, |socket| {
                    Ok(recv(socket.as_fd(), &mut buffer[..], RecvFlags::empty())?)
                })
                .await;
            let length = match received {
                Ok((_, length)) => length.min(buffer.len()),
                // More has happened at once than the kernel keeps: what was lost stays unsaid.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => 0,
                Err(error) => return Err(error),
            };
            let removed: Vec<_> = removed_links(&buffer[..length])
                .into_iter()
                .filter_map(|link| self.links.remove(&link))
                .collect();
            if !removed.is_empty() {
                return Ok(removed);
            }
        }
    }
}

fn listen() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, LINKS))?;
    Ok(socket)
}

/// The indices in the messages that say that a link was removed.
fn removed_links(mut messages: &[u8]) -> Vec<u32> {
    let mut removed = Vec::new();
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(messages) {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = &message.payload {
            removed.push(link.header.index);
        }
        // Messages begin at multiples of four bytes; one without a length is no message.
        let length = (message.header.length as usize).next_multiple_of(4);
        match messages.get(length..) {
            Some(rest) if length > 0 => messages = rest,
            _ => break,
        }
    }
    removed
}
