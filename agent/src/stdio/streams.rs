//! Matches stream connections with the processes that they belong to.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_protos::ttrpc::Code;
use tokio::sync::mpsc;

use super::message::{self, FromClient};
use crate::ttrpc::{Incoming, ServerStream};

/// How many streams may wait for their processes at the same time. containerd opens at most three for each container
/// that it is creating.
const WAITING_LIMIT: usize = 1024;

/// Another process has claimed the stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stream {0:?} belongs to another process")]
pub struct StreamInUse(String);

/// All streams, by id. Of several connections for one stream only the newest is used: an older one belongs to a
/// containerd that has been restarted since.
#[derive(Default)]
pub struct Streams {
    streams: Mutex<HashMap<String, StreamState>>,
}

/// One stream that has a connection, a process, or both.
enum StreamState {
    /// There is a connection and no process yet. The number distinguishes it from later connections for the same
    /// stream.
    Waiting { stream: ServerStream, number: u64 },
    /// There is a process, which gets every connection for the stream.
    Claimed(mpsc::UnboundedSender<ServerStream>),
}

impl Streams {
    /// An empty map.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Serves one call of `Streaming.Stream`: reads which stream it is for, acknowledges it, and passes it to its
    /// process.
    pub async fn open(self: Arc<Self>, mut stream: ServerStream) {
        let id = match stream.receive().await {
            Some(Incoming::Message(message)) => match FromClient::decode(&message) {
                FromClient::Init(id) => id,
                _ => {
                    return stream
                        .fail(Code::INVALID_ARGUMENT, "the first message must be a StreamInit")
                        .await;
                }
            },
            _ => return,
        };
        if !self.has_room_for(&id) {
            return stream.fail(Code::RESOURCE_EXHAUSTED, "too many streams wait for their containers").await;
        }
        if stream.send(&message::acknowledgement()).await.is_ok() {
            self.connect(id, stream);
        }
    }

    fn has_room_for(&self, id: &str) -> bool {
        let streams = self.streams();
        streams.contains_key(id)
            || streams.values().filter(|stream| matches!(stream, StreamState::Waiting { .. })).count()
                < WAITING_LIMIT
    }

    /// Passes a connection to its process, or keeps it until there is one.
    fn connect(self: &Arc<Self>, id: String, stream: ServerStream) {
        let mut streams = self.streams();
        let number = match streams.get(&id) {
            Some(StreamState::Claimed(process)) => {
                // This fails if the process's streams have ended. The connection is dropped then, which ends its
                // stream.
                let _ = process.send(stream);
                return;
            }
            Some(StreamState::Waiting { number, .. }) => number + 1,
            None => 0,
        };
        let disconnected = stream.disconnected();
        streams.insert(id.clone(), StreamState::Waiting { stream, number });
        drop(streams);
        // A container that is never created closes its connections, which must not stay here.
        let this = Arc::downgrade(self);
        tokio::spawn(async move {
            disconnected.await;
            let Some(this) = this.upgrade() else { return };
            let mut streams = this.streams();
            if matches!(streams.get(&id), Some(StreamState::Waiting { number: waiting, .. }) if *waiting == number)
            {
                streams.remove(&id);
            }
        });
    }

    /// Reserves a stream for a process, until the [`Claim`] is dropped.
    pub fn claim(self: &Arc<Self>, id: &str) -> Result<Claim, StreamInUse> {
        let (sender, connections) = mpsc::unbounded_channel();
        let mut streams = self.streams();
        match streams.remove(id) {
            Some(StreamState::Waiting { stream, .. }) => {
                // This cannot fail, because this function has the receiver.
                let _ = sender.send(stream);
            }
            Some(claimed @ StreamState::Claimed(_)) => {
                streams.insert(id.to_owned(), claimed);
                return Err(StreamInUse(id.to_owned()));
            }
            None => {}
        }
        streams.insert(id.to_owned(), StreamState::Claimed(sender));
        Ok(Claim { streams: Arc::clone(self), id: id.to_owned(), connections })
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<String, StreamState>> {
        // Every change is a single insertion or removal, so the map is consistent after a panic.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process's right to the connections of one stream.
pub struct Claim {
    streams: Arc<Streams>,
    id: String,
    connections: mpsc::UnboundedReceiver<ServerStream>,
}

impl Claim {
    /// Waits for the next connection for the stream, which replaces the one before. Cancel safe.
    pub async fn next(&mut self) -> ServerStream {
        match self.connections.recv().await {
            Some(stream) => stream,
            // Unreachable: the map keeps the sender until this claim is dropped.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.streams.streams().remove(&self.id);
    }
}
