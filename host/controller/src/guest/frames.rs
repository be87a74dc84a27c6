//! What a guest may say of its own accord: ttrpc requests, each no longer than it has to be. (ttrpc's own server makes
//! room for 4 MiB before it has seen one byte of them.)

use std::io;

use pericarp_protos::{
    protobuf::Message,
    ttrpc::{
        self,
        proto::{
            Codec as _, GenMessage, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE,
            MessageHeader, Request, Response,
        },
    },
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

/// Most bytes of a message. A request's own part is one id or a kernel's release; an answer's is a status with a short
/// text.
const MESSAGE_MAX: usize = 4 << 10;

/// Reads a request. An error, which the end of the connection is as well, leaves nothing to be read after it.
pub async fn read_request(
    connection: &mut (impl AsyncRead + Unpin + Send),
) -> io::Result<(MessageHeader, Request)> {
    let (header, payload) = read_message(connection, MESSAGE_TYPE_REQUEST).await?;
    let request = Request::decode(&payload).map_err(invalid)?;
    Ok((header, request))
}

/// Reads the next message, which has to be of one type.
async fn read_message(
    connection: &mut (impl AsyncRead + Unpin + Send),
    type_: u8,
) -> io::Result<(MessageHeader, Vec<u8>)> {
    let header = MessageHeader::read_from(&mut *connection).await?;
    let length = header.length as usize;
    if header.type_ != type_ || length > MESSAGE_MAX {
        return Err(invalid(format!("a message of type {} with {length} bytes", header.type_)));
    }
    let mut payload = vec![0; length];
    connection.read_exact(&mut payload).await?;
    Ok((header, payload))
}

/// The only stream of a connection that is made for one call; a client's are odd.
pub const STREAM: u32 = 1;

/// Calls a method of the agent's own service, the only call on its connection.
pub async fn write_request(
    connection: &mut (impl AsyncWrite + Unpin + Send),
    method: &str,
    message: &impl Message,
) -> io::Result<()> {
    let request = Request {
        service: "pericarp.agent.v1.Agent".into(),
        method: method.into(),
        payload: message.write_to_bytes().map_err(invalid)?,
        ..Request::default()
    };
    let payload = request.encode().map_err(invalid)?;
    let length = u32::try_from(payload.len()).map_err(invalid)?;
    let message = GenMessage { header: MessageHeader::new_request(STREAM, length), payload };
    message.write_to(connection).await.map_err(io::Error::other)
}

/// Reads the answer to [`write_request`]: the next message is that, or there is none.
pub async fn read_response(connection: &mut (impl AsyncRead + Unpin + Send)) -> io::Result<Response> {
    let (header, payload) = read_message(connection, MESSAGE_TYPE_RESPONSE).await?;
    if header.stream_id != STREAM {
        return Err(invalid(format!("an answer on stream {}", header.stream_id)));
    }
    Response::decode(&payload).map_err(invalid)
}

/// Answers a request.
pub async fn write_response(
    connection: &mut (impl AsyncWrite + Unpin + Send),
    to: &MessageHeader,
    response: ttrpc::Result<Response>,
) -> io::Result<()> {
    let response = response.unwrap_or_else(|error| {
        refusal(match error {
            ttrpc::Error::RpcStatus(status) => status,
            // None of the handlers returns another.
            other => ttrpc::get_status(ttrpc::Code::INTERNAL, other),
        })
    });
    let mut payload = response.encode().map_err(invalid)?;
    if payload.len() > MESSAGE_LENGTH_MAX {
        let text = format!("the answer has {} bytes, and ttrpc takes {MESSAGE_LENGTH_MAX}", payload.len());
        payload =
            refusal(ttrpc::get_status(ttrpc::Code::RESOURCE_EXHAUSTED, text)).encode().map_err(invalid)?;
    }
    let length = u32::try_from(payload.len()).map_err(invalid)?;
    let header = MessageHeader::new_response(to.stream_id, length);
    GenMessage { header, payload }.write_to(connection).await.map_err(io::Error::other)
}

fn refusal(status: ttrpc::Status) -> Response {
    Response { status: Some(status).into(), ..Response::default() }
}

pub fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(header: MessageHeader, payload: &[u8]) -> Vec<u8> {
        let mut frame = [header.length.to_be_bytes(), header.stream_id.to_be_bytes()].concat();
        frame.extend([header.type_, header.flags]);
        frame.extend(payload);
        frame
    }

    #[tokio::test]
    async fn a_request_is_read_with_the_number_that_its_answer_needs() {
        let request = Request { method: "Ready".into(), ..Request::default() };
        let payload = request.encode().unwrap();
        let frame = frame(MessageHeader::new_request(7, payload.len().try_into().unwrap()), &payload);
        let (header, read) = read_request(&mut frame.as_slice()).await.unwrap();
        assert_eq!((header.stream_id, read.method.as_str()), (7, "Ready"));
    }

    #[tokio::test]
    async fn what_cannot_be_a_request_is_refused_by_its_header() {
        let most = u32::try_from(MESSAGE_MAX).unwrap();
        // No byte of the payload is there: whoever waited for it would find the end instead.
        for header in [
            MessageHeader::new_request(1, most + 1),
            MessageHeader::new_request(1, u32::MAX),
            MessageHeader::new_response(1, 10),
            MessageHeader::new_data(1, 10),
        ] {
            let error = read_request(&mut frame(header, b"").as_slice()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{header:?}");
        }
        let junk = frame(MessageHeader::new_request(1, 2), &[0xff, 0xff]);
        assert_eq!(read_request(&mut junk.as_slice()).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
