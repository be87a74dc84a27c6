//! The guest's first word, `Boot.Ready`: the only one for which it dials the host.
//!
//! Nobody but the agent is in the guest before its first container, which there cannot be before this. So whoever says
//! it is the agent, and afterwards nobody is listened to any more.

use std::{io, os::unix::net::UnixStream, time::Duration};

use pericarp_protos::{
    host::ReadyRequest,
    protobuf::Message as _,
    ttrpc::proto::{Request, Response},
};

use super::frames;

/// What the agent says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Ready {
    /// From its first instruction.
    pub since_init: Duration,
    /// The guest's kernel, cut to the length of any honest release.
    pub kernel: String,
}

/// Waits for the word on the guest's only connection to the host, which is closed afterwards.
pub async fn receive(connection: UnixStream) -> io::Result<Ready> {
    connection.set_nonblocking(true)?;
    let mut connection = tokio::net::UnixStream::from_std(connection)?;
    match hear(&mut connection).await {
        // Its machine has ended, or the agent has, and then the guest ends: whoever waits for that knows more of it.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
        {
            std::future::pending().await
        }
        ready => ready,
    }
}

async fn hear(connection: &mut tokio::net::UnixStream) -> io::Result<Ready> {
    let (header, request) = frames::read_request(connection).await?;
    let ready = parse(&request)?;
    // If nobody takes it, the machine has ended, and whoever waits for that knows more of it.
    let _ = frames::write_response(connection, &header, Ok(Response::default())).await;
    Ok(ready)
}

fn parse(request: &Request) -> io::Result<Ready> {
    if (request.service.as_str(), request.method.as_str()) != ("pericarp.host.v1.Boot", "Ready") {
        return Err(frames::invalid("not Boot.Ready"));
    }
    let ready = ReadyRequest::parse_from_bytes(&request.payload).map_err(frames::invalid)?;
    Ok(Ready {
        since_init: Duration::from_nanos(ready.since_init_ns),
        kernel: ready.kernel_release.chars().take(128).collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use pericarp_protos::{
        host::BootClient,
        ttrpc::{
            asynchronous::{Client, transport::Socket},
            context,
        },
    };

    use super::*;

    #[tokio::test]
    async fn the_word_is_heard_and_nothing_that_follows_it() {
        let (agent, host) = UnixStream::pair().unwrap();
        let receiving = tokio::spawn(receive(host));
        agent.set_nonblocking(true).unwrap();
        let agent = tokio::net::UnixStream::from_std(agent).unwrap();
        let agent = BootClient::new(Client::new(Socket::new(agent)));
        let request =
            ReadyRequest { since_init_ns: 5, kernel_release: "6".repeat(1000), ..ReadyRequest::default() };
        agent.ready(context::with_timeout(0), &request).await.unwrap();
        let ready = receiving.await.unwrap().unwrap();
        assert_eq!(ready, Ready { since_init: Duration::from_nanos(5), kernel: "6".repeat(128) });
        agent.ready(context::with_timeout(0), &request).await.unwrap_err();
    }

    #[tokio::test]
    async fn nonsense_is_an_error_and_an_end_is_left_to_who_waits_for_the_machine() {
        let (mut agent, host) = UnixStream::pair().unwrap();
        agent.write_all(&[0xff; 64]).unwrap();
        receive(host).await.unwrap_err();
        let (agent, host) = UnixStream::pair().unwrap();
        drop(agent);
        let receiving = tokio::time::timeout(Duration::from_millis(20), receive(host));
        receiving.await.unwrap_err();
    }
}
