//! The guest's first word, `Boot.Ready`: the only one for which it dials the host.
//!
//! Nobody but the agent is in the guest before its first container, which there cannot be before this. So whoever says
//! it is the agent, and afterwards nobody is listened to any more.

use std::{io, os::unix::net::UnixListener, time::Duration};

use pericarp_protos::{
    host::ReadyRequest,
    protobuf::Message as _,
    ttrpc::proto::{Request, Response},
};
use tokio::net::UnixStream;

use super::frames;

/// For a connection's one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// What the agent says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Ready {
    /// From its first instruction.
    pub since_init: Duration,
    /// The guest's kernel, cut to the length of any honest release.
    pub kernel: String,
}

/// Waits for the word, and hears no other: the listener is closed with the first that is valid.
pub async fn receive(listener: UnixListener) -> io::Result<Ready> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    loop {
        let (connection, _) = listener.accept().await?;
        match tokio::time::timeout(REQUEST_TIMEOUT, hear(connection)).await {
            Ok(Ok(ready)) => return Ok(ready),
            Ok(Err(error)) => tracing::debug!(%error, "a guest's first word is not understood"),
            Err(_) => tracing::debug!("a guest has connected and says nothing"),
        }
    }
}

async fn hear(mut connection: UnixStream) -> io::Result<Ready> {
    let (header, request) = frames::read_request(&mut connection).await?;
    let ready = parse(&request)?;
    frames::write_response(&mut connection, &header, Ok(Response::default())).await?;
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
    use pericarp_protos::{
        host::BootClient,
        ttrpc::{asynchronous::Client, context},
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn the_first_valid_word_is_heard_and_then_nobody_is_listened_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let receiving = tokio::spawn(receive(UnixListener::bind(&path).unwrap()));
        // Neither nonsense nor silence ends it.
        let mut nonsense = UnixStream::connect(&path).await.unwrap();
        nonsense.write_all(&[0xff; 64]).await.unwrap();
        // It may be reset instead, because not all that it said was read.
        assert!(nonsense.read_u8().await.is_err());
        drop(UnixStream::connect(&path).await.unwrap());
        let agent = BootClient::new(Client::connect(&format!("unix://{}", path.display())).await.unwrap());
        let request =
            ReadyRequest { since_init_ns: 5, kernel_release: "6".repeat(1000), ..ReadyRequest::default() };
        agent.ready(context::with_timeout(0), &request).await.unwrap();
        let ready = receiving.await.unwrap().unwrap();
        assert_eq!(ready, Ready { since_init: Duration::from_nanos(5), kernel: "6".repeat(128) });
        assert_eq!(UnixStream::connect(&path).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
