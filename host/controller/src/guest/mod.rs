//! The controller's conversations with a guest: the agent's own service, and what the agent asks ([`service`]) after
//! its first word ([`ready`]).
//!
//! The guest is not trusted: each call to it has a time limit, and what it sends has size limits.

pub mod event_stream;
pub mod frames;
pub mod ready;
pub mod service;
pub mod translate;

use std::{io, path::Path, time::Duration};

use pericarp_protos::{
    agent::{AgentClient, CheckRequest, ConfigureRequest, ResizeRequest},
    guest,
    ttrpc::{
        self,
        asynchronous::{Client, transport::Socket},
        context,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};

/// Limit of a call to the agent.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Limit for the guest to take on another size: it starts processors and binds a device, on a node that may have no CPU
/// for it.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(20);
/// `OK 4294967295\n`
const ANSWER_MAX: usize = 14;

/// Characters of a guest's error that are read on.
const ERROR_MAX: usize = 256;

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl Agent {
    /// Connects through the machine's vsock socket.
    pub async fn connect(socket: &Path) -> io::Result<Agent> {
        Self::connect_within(socket, CALL_TIMEOUT).await
    }

    /// Connects through the machine's vsock socket, within a time limit.
    pub async fn connect_within(socket: &Path, limit: Duration) -> io::Result<Agent> {
        let client = tokio::time::timeout(limit, dial_agent(socket)).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not accept the connection")
        })??;
        Ok(Agent { client: AgentClient::new(client) })
    }

    /// Whether a guest answers in time, on a connection like those that containerd makes. One frame is read
    /// of what it says, and no more: it is asked again and again, and could say much.
    pub async fn check(socket: &Path, limit: Duration) -> io::Result<()> {
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not answer");
        let check = async {
            let mut connection = dial(socket, guest::AGENT_PORT).await?;
            let asked = CheckRequest::default();
            frames::write_request(&mut connection, "Check", &asked).await?;
            // An agent that is older than this controller does not know the call, but it has answered.
            frames::read_response(&mut connection).await.map(drop)
        };
        tokio::time::timeout(limit, check).await.map_err(timed_out)?
    }

    /// Makes the guest into the pod, within a time limit.
    pub async fn configure(&self, request: &ConfigureRequest, limit: Duration) -> ttrpc::Result<()> {
        self.client.configure(context::with_duration(limit), request).await.map(drop).map_err(brief)
    }

    /// Uses so many processors; binds the device through which memory comes, if one is named.
    pub async fn resize(&self, vcpus: u8, memory_device: Option<u32>) -> ttrpc::Result<u32> {
        let request = ResizeRequest { vcpus: u32::from(vcpus), memory_device, ..ResizeRequest::default() };
        let answer = self.client.resize(context::with_duration(RESIZE_TIMEOUT), &request).await;
        Ok(answer.map_err(brief)?.vcpus)
    }
}

/// The beginning of what a guest says is wrong. ttrpc lets it say 4 MiB.
fn brief(mut error: ttrpc::Error) -> ttrpc::Error {
    if let ttrpc::Error::RpcStatus(status) = &mut error {
        if let Some((end, _)) = status.message.char_indices().nth(ERROR_MAX) {
            status.message.truncate(end);
            status.message.push('…');
        }
        status.details.clear();
    }
    error
}

/// Connects to the port on which the agent serves containerd and the controller.
pub async fn dial_agent(socket: &Path) -> io::Result<Client> {
    Ok(Client::new(Socket::from(dial(socket, guest::AGENT_PORT).await?)))
}

/// Connects to a port of the guest: `CONNECT <port>\n`, then `OK …\n`, then the stream.
pub async fn dial(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    // One byte at a time: what follows the line belongs to the stream.
    while answer.last() != Some(&b'\n') {
        if answer.len() == ANSWER_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the machine's vsock socket gives no answer that can be read",
            ));
        }
        answer.push(stream.read_u8().await?);
    }
    if answer.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn answered_with(answer: &'static [u8]) -> io::Result<UnixStream> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        });
        let result = dial(&path, 1024).await;
        machine.await.unwrap();
        result
    }

    #[tokio::test]
    async fn what_follows_the_answer_belongs_to_the_stream() {
        let mut stream = answered_with(b"OK 1073741824\nhello").await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "hello");
    }

    #[tokio::test]
    async fn an_endless_answer_is_given_up() {
        let error = answered_with(&[b'x'; 100]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    /// Asks a guest whether it lives; it returns this status, or not at all.
    async fn checked(answer: Option<ttrpc::Code>) -> io::Result<()> {
        use pericarp_protos::ttrpc::proto::{Codec as _, GenMessage, MessageHeader};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; 13]).await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            let question = GenMessage::read_from(&mut stream).await.unwrap();
            if let Some(code) = answer {
                let mut response = ttrpc::Response::new();
                response.status = Some(ttrpc::get_status(code, "an answer")).into();
                let payload = response.encode().unwrap();
                let length = u32::try_from(payload.len()).unwrap();
                let header = MessageHeader::new_response(question.header.stream_id, length);
                GenMessage { header, payload }.write_to(&mut stream).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = Agent::check(&path, Duration::from_millis(300)) => answer,
            () = guest => unreachable!("a guest that is pending"),
        }
    }

    #[tokio::test]
    async fn what_a_guest_says_is_wrong_is_read_as_far_as_it_is_of_use() {
        let status =
            |message: &str| ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, message));
        let text = |error| match error {
            ttrpc::Error::RpcStatus(status) => status.message,
            other => other.to_string(),
        };
        assert_eq!(text(brief(status("no such device"))), "no such device");
        let long = text(brief(status(&"ü".repeat(4 << 20))));
        assert_eq!(long.chars().count(), ERROR_MAX + 1);
        assert!(long.ends_with('…'));
    }

    #[tokio::test]
    async fn a_guest_that_says_something_else_and_does_not_end_is_not_listened_to() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_exact(&mut [0; 13]).await.unwrap();
            stream.write_all(b"OK 1\n").await.unwrap();
            // Messages for a stream that nobody has, each 4 MiB long.
            let mut sent = 0;
            let header = [0, 0x40, 0, 0, 0, 0, 0, 9, 3, 0];
            let chunk = vec![0; 64 << 10];
            while stream.write_all(&header).await.is_ok() {
                for _ in 0..64 {
                    if stream.write_all(&chunk).await.is_err() {
                        return sent;
                    }
                    sent += chunk.len();
                }
            }
            sent
        });
        let error = Agent::check(&path, Duration::from_secs(60)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        // What the socket holds.
        assert!(guest.await.unwrap() < 4 << 20);
    }

    #[tokio::test]
    async fn a_guest_lives_if_it_gives_any_answer() {
        checked(Some(ttrpc::Code::OK)).await.unwrap();
        // As one says that was made before there was this question.
        checked(Some(ttrpc::Code::UNIMPLEMENTED)).await.unwrap();
        checked(None).await.unwrap_err();
    }
}
