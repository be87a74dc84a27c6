//! A guest's stream of events, read one at a time: what has not been asked for stays in the guest, however much
//! it has to tell. (ttrpc's own client reads on into an unbounded queue.)

use std::{io, path::Path, time::Duration};

use pericarp_protos::{
    agent::{Event, EventsRequest},
    guest,
    protobuf::Message as _,
    ttrpc::proto::{FLAG_REMOTE_CLOSED, MESSAGE_TYPE_DATA, MessageHeader},
};
use tokio::{io::BufReader, net::UnixStream};

use crate::guest::{dial, frames};

/// Limit for the connection and the request.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Most bytes of one event. The largest name three streams and a bundle, and containerd keeps and prints all of them.
const EVENT_MAX: usize = 8 << 10;

/// The events of one guest from some point on.
pub struct EventStream {
    connection: BufReader<UnixStream>,
}

impl EventStream {
    /// Asks for every event after `after_sequence`, through the machine's vsock socket.
    pub async fn open(socket: &Path, after_sequence: u64) -> io::Result<EventStream> {
        tokio::time::timeout(OPEN_TIMEOUT, Self::request(socket, after_sequence))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the guest's agent does not answer"))?
    }

    async fn request(socket: &Path, after_sequence: u64) -> io::Result<EventStream> {
        let asked = EventsRequest { after_sequence, ..EventsRequest::default() };
        let mut connection = dial(socket, guest::AGENT_PORT).await?;
        frames::write_request(&mut connection, "Events", &asked).await?;
        Ok(EventStream { connection: BufReader::new(connection) })
    }

    /// The next event; `None` at the end, which the agent makes when somebody else asks for its events.
    pub async fn next(&mut self) -> io::Result<Option<Event>> {
        let header = MessageHeader::read_from(&mut self.connection).await?;
        let length = header.length as usize;
        if header.type_ != MESSAGE_TYPE_DATA || header.flags & FLAG_REMOTE_CLOSED != 0 {
            return Ok(None);
        }
        if length > EVENT_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("an event of {length} bytes")));
        }
        let mut payload = vec![0; length];
        tokio::io::AsyncReadExt::read_exact(&mut self.connection, &mut payload).await?;
        Event::parse_from_bytes(&payload).map(Some).map_err(invalid)
    }
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixListener,
    };

    use pericarp_protos::ttrpc::proto::{Codec as _, GenMessage, Request};

    use super::*;
    use crate::guest::frames::STREAM;

    /// A machine whose agent answers a request for events with `answer`, and what it was asked.
    async fn receive_from(answer: Vec<u8>) -> (u64, Vec<io::Result<Option<u64>>>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            stream.write_all(b"OK 7\n").await.unwrap();
            let message = GenMessage::read_from(&mut stream).await.unwrap();
            let request = Request::decode(&message.payload).unwrap();
            assert_eq!(
                (request.service.as_str(), request.method.as_str()),
                ("pericarp.agent.v1.Agent", "Events")
            );
            stream.write_all(&answer).await.unwrap();
            EventsRequest::parse_from_bytes(&request.payload).unwrap().after_sequence
        });
        let mut events = EventStream::open(&path, 41).await.unwrap();
        let mut received = Vec::new();
        while !matches!(received.last(), Some(Ok(None) | Err(_))) {
            received.push(events.next().await.map(|event| event.map(|event| event.sequence)));
        }
        (machine.await.unwrap(), received)
    }

    fn frame(header: MessageHeader, payload: &[u8]) -> Vec<u8> {
        let mut frame = [header.length.to_be_bytes(), header.stream_id.to_be_bytes()].concat();
        frame.extend([header.type_, header.flags]);
        frame.extend(payload);
        frame
    }

    fn event(sequence: u64) -> Vec<u8> {
        let payload = Event { sequence, ..Event::default() }.write_to_bytes().unwrap();
        frame(MessageHeader::new_data(STREAM, payload.len().try_into().unwrap()), &payload)
    }

    #[tokio::test]
    async fn events_come_one_by_one_until_the_agent_ends_the_stream() {
        let mut end = MessageHeader::new_data(STREAM, 0);
        end.set_flags(FLAG_REMOTE_CLOSED);
        let (after, events) = receive_from([event(42), event(43), frame(end, b"")].concat()).await;
        assert_eq!(after, 41);
        let events: Vec<_> = events.into_iter().map(Result::unwrap).collect();
        assert_eq!(events, [Some(42), Some(43), None]);
    }

    #[tokio::test]
    async fn an_error_of_the_agents_is_the_end_and_a_broken_connection_an_error() {
        let (_, events) = receive_from(frame(MessageHeader::new_response(STREAM, 0), b"")).await;
        assert!(matches!(events[..], [Ok(None)]), "{events:?}");
        let (_, events) = receive_from(Vec::new()).await;
        assert!(matches!(events[..], [Err(_)]), "{events:?}");
    }

    #[tokio::test]
    async fn no_memory_is_taken_for_an_event_that_cannot_be_one() {
        let (_, events) = receive_from(frame(MessageHeader::new_data(STREAM, u32::MAX), b"")).await;
        assert!(
            matches!(&events[..], [Err(error)] if error.kind() == io::ErrorKind::InvalidData),
            "{events:?}"
        );
        let (_, events) = receive_from(frame(MessageHeader::new_data(STREAM, 2), &[0xff, 0xff])).await;
        assert!(
            matches!(&events[..], [Err(error)] if error.kind() == io::ErrorKind::InvalidData),
            "{events:?}"
        );
    }
}
