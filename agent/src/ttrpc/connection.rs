//! One ttrpc connection.

use std::{collections::HashMap, sync::Arc, time::Duration};

use pericarp_protos::{
    protobuf,
    ttrpc::{
        self, Code, Response, Status,
        r#async::TtrpcContext,
        proto::{
            Codec, FLAG_NO_DATA, FLAG_REMOTE_CLOSED, GenMessage, GenMessageError, MESSAGE_HEADER_LENGTH,
            MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader, Request,
        },
    },
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, WriteHalf},
    sync::{mpsc, watch},
};

use super::Services;

/// How many messages may wait for the socket, and how many for one stream's handler.
const QUEUE_LENGTH: usize = 16;

/// The peer has closed the connection, so nothing can be sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection is closed")]
pub struct Disconnected;

/// What a client sends on a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// One encoded message.
    Message(Vec<u8>),
    /// The client will not send any more messages.
    End,
}

/// The agent's side of one stream. Dropping it ends the stream for the client.
pub struct ServerStream {
    incoming: mpsc::Receiver<Incoming>,
    outgoing: mpsc::Sender<Vec<u8>>,
    disconnected: watch::Receiver<bool>,
    id: u32,
    open: bool,
}

impl ServerStream {
    /// Waits for the next message; returns `None` when the connection is closed. Cancel safe.
    pub async fn receive(&mut self) -> Option<Incoming> {
        self.incoming.recv().await
    }

    /// Sends one message to the client. Waits while the connection is congested.
    pub async fn send(&self, message: &impl protobuf::Message) -> Result<(), Disconnected> {
        let frame = frame(self.id, MESSAGE_TYPE_DATA, 0, message);
        self.outgoing.send(frame).await.map_err(|_| Disconnected)
    }

    /// Ends the stream. The client reads EOF after everything that was sent before.
    pub async fn close(&mut self) {
        if std::mem::take(&mut self.open) {
            // If this fails, the client is gone.
            let _ = self.outgoing.send(end_of_stream(self.id)).await;
        }
    }

    /// Ends the stream with an error.
    pub async fn fail(mut self, code: Code, message: &str) {
        self.open = false;
        let _ = self.outgoing.send(failure(self.id, ttrpc::get_status(code, message))).await;
    }

    /// Completes when the connection is closed.
    pub fn disconnected(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut disconnected = self.disconnected.clone();
        async move {
            // An error means that the connection's task has ended, and the connection with it.
            let _ = disconnected.wait_for(|closed| *closed).await;
        }
    }
}

impl Drop for ServerStream {
    fn drop(&mut self) {
        if self.open {
            // On a congested connection this may fail. The client then notices the end only when it closes the stream.
            let _ = self.outgoing.try_send(end_of_stream(self.id));
        }
    }
}

/// Serves one connection until its peer closes it.
pub async fn serve(socket: impl AsyncRead + AsyncWrite + Send + 'static, services: Arc<Services>) {
    let (reader, writer) = tokio::io::split(socket);
    let mut reader = BufReader::new(reader);
    let (outgoing, queue) = mpsc::channel(QUEUE_LENGTH);
    let (closed, disconnected) = watch::channel(false);
    tokio::spawn(write(writer, queue));
    let mut connection = Connection { services, outgoing, disconnected, streams: HashMap::new() };
    loop {
        match GenMessage::read_from(&mut reader).await {
            Ok(message) => connection.handle(message).await,
            Err(GenMessageError::ReturnError(header, error)) => {
                connection.refuse(header.stream_id, Code::INVALID_ARGUMENT, &error.to_string()).await;
            }
            Err(GenMessageError::InternalError(_)) => break,
        }
    }
    // An error means that no call and no stream is left.
    let _ = closed.send(true);
}

struct Connection {
    services: Arc<Services>,
    outgoing: mpsc::Sender<Vec<u8>>,
    disconnected: watch::Receiver<bool>,
    streams: HashMap<u32, mpsc::Sender<Incoming>>,
}

impl Connection {
    async fn handle(&mut self, message: GenMessage) {
        match message.header.type_ {
            MESSAGE_TYPE_REQUEST => self.request(message).await,
            MESSAGE_TYPE_DATA => self.data(message).await,
            // A newer protocol may have more types of messages. Go's server ignores them as well.
            _ => {}
        }
    }

    /// Passes a message on to its stream, in the order of arrival; a slow stream holds up its connection. A message for
    /// a stream that has ended is ignored, because the client may have sent it before it knew.
    async fn data(&mut self, message: GenMessage) {
        let id = message.header.stream_id;
        let Some(stream) = self.streams.get(&id) else { return };
        let flags = message.header.flags;
        let mut alive = true;
        if flags & FLAG_NO_DATA == 0 {
            alive = stream.send(Incoming::Message(message.payload)).await.is_ok();
        }
        let ended = flags & FLAG_REMOTE_CLOSED != 0;
        if alive && ended {
            alive = stream.send(Incoming::End).await.is_ok();
        }
        // The sender stays after the client's end of the stream: to drop it would say that the connection is closed.
        if !alive {
            self.streams.remove(&id);
        }
    }

    async fn request(&mut self, message: GenMessage) {
        let id = message.header.stream_id;
        let request = match Request::decode(&message.payload) {
            Ok(request) => request,
            Err(error) => {
                return self.refuse(id, Code::INVALID_ARGUMENT, &format!("not a request: {error}")).await;
            }
        };
        let key = (request.service.clone(), request.method.clone());
        if let Some(open) = self.services.streams.get(&key) {
            let (sender, incoming) = mpsc::channel(QUEUE_LENGTH);
            self.streams.retain(|_, stream| !stream.is_closed());
            self.streams.insert(id, sender);
            open(
                request.payload,
                ServerStream {
                    incoming,
                    outgoing: self.outgoing.clone(),
                    disconnected: self.disconnected.clone(),
                    id,
                    open: true,
                },
            );
        } else if self.services.unary.get(&key.0).is_some_and(|service| service.methods.contains_key(&key.1))
        {
            tokio::spawn(call(
                Arc::clone(&self.services),
                message.header,
                request,
                self.outgoing.clone(),
                self.disconnected.clone(),
            ));
        } else {
            self.refuse(id, Code::UNIMPLEMENTED, &format!("/{}/{} is not served here", key.0, key.1)).await;
        }
    }

    async fn refuse(&self, stream_id: u32, code: Code, message: &str) {
        let _ = self.outgoing.send(failure(stream_id, ttrpc::get_status(code, message))).await;
    }
}

/// Runs one unary call. The call goes on when its client goes away or its deadline passes, because half a container
/// would be of no use. Only `Wait`, which may wait for ever, is aborted then.
async fn call(
    services: Arc<Services>,
    header: MessageHeader,
    request: Request,
    outgoing: mpsc::Sender<Vec<u8>>,
    mut disconnected: watch::Receiver<bool>,
) {
    let abandonable = request.method == "Wait";
    let timeout = u64::try_from(request.timeout_nano).ok().filter(|nanoseconds| *nanoseconds > 0);
    let deadline = async {
        match timeout {
            Some(nanoseconds) => tokio::time::sleep(Duration::from_nanos(nanoseconds)).await,
            None => std::future::pending().await,
        }
    };
    let mut running = tokio::spawn(handle(services, header, request));
    let abandon = running.abort_handle();
    let answer = tokio::select! {
        // A join error means that the handler has panicked.
        answer = &mut running => answer.unwrap_or_else(|_| Err(super::status(Code::INTERNAL, "the agent failed"))),
        () = deadline => {
            if abandonable {
                abandon.abort();
            }
            Err(super::status(Code::DEADLINE_EXCEEDED, "the caller's deadline has passed"))
        }
        _ = disconnected.wait_for(|closed| *closed), if abandonable => {
            abandon.abort();
            return;
        }
    };
    let payload = answer.unwrap_or_else(|error| match error {
        ttrpc::Error::RpcStatus(status) => response(status),
        other => response(ttrpc::get_status(Code::UNKNOWN, other)),
    });
    let _ = outgoing.send(response_message(header.stream_id, &payload)).await;
}

async fn handle(services: Arc<Services>, header: MessageHeader, request: Request) -> ttrpc::Result<Response> {
    let service = services.unary.get(&request.service);
    let Some(method) = service.and_then(|service| service.methods.get(&request.method)) else {
        return Err(super::status(Code::UNIMPLEMENTED, format!("there is no {}", request.method)));
    };
    let context = TtrpcContext { mh: header, timeout_nano: request.timeout_nano, ..Default::default() };
    method.handler(context, request).await
}

/// Writes the queued messages, each in one piece, until all senders are dropped.
async fn write<S: AsyncWrite>(mut socket: WriteHalf<S>, mut queue: mpsc::Receiver<Vec<u8>>) {
    while let Some(message) = queue.recv().await {
        if socket.write_all(&message).await.is_err() {
            return;
        }
    }
    let _ = socket.shutdown().await;
}

fn response(status: Status) -> Response {
    let mut response = Response::new();
    response.status = protobuf::MessageField::some(status);
    response
}

/// Encodes a message for the socket: ttrpc's header and the payload in one piece.
fn frame(stream_id: u32, kind: u8, flags: u8, message: &impl protobuf::Message) -> Vec<u8> {
    let mut frame = Vec::with_capacity(
        MESSAGE_HEADER_LENGTH + usize::try_from(message.compute_size()).unwrap_or_default(),
    );
    frame.resize(MESSAGE_HEADER_LENGTH, 0);
    let mut frame = super::encode(message, frame);
    #[expect(clippy::expect_used, reason = "no message beyond 2 GiB can be encoded")]
    let length = u32::try_from(frame.len() - MESSAGE_HEADER_LENGTH).expect("a message is shorter than 4 GiB");
    frame[..4].copy_from_slice(&length.to_be_bytes());
    frame[4..8].copy_from_slice(&stream_id.to_be_bytes());
    frame[8..MESSAGE_HEADER_LENGTH].copy_from_slice(&[kind, flags]);
    frame
}

fn response_message(stream_id: u32, response: &Response) -> Vec<u8> {
    frame(stream_id, MESSAGE_TYPE_RESPONSE, 0, response)
}

fn failure(stream_id: u32, status: Status) -> Vec<u8> {
    response_message(stream_id, &response(status))
}

fn end_of_stream(stream_id: u32) -> Vec<u8> {
    frame(stream_id, MESSAGE_TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, &Response::new())
}
