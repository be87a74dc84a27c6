//! Brings stream connections and the processes they belong to together.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pericarp_protos::ttrpc::Code;
use tokio::sync::mpsc;

use super::message::{self, FromClient};
use crate::server::{Incoming, ServerStream};

/// How many streams may wait for a process at once. containerd opens at most three for each
/// container that it has created but not yet started.
const WAITING_LIMIT: usize = 1024;

/// Another process has claimed the stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stream {0:?} belongs to another process")]
pub struct Taken(String);

/// All streams, by id. Of several connections for one stream the newest counts: an older one is
/// that of a containerd that has been restarted since.
#[derive(Default)]
pub struct Streams {
    slots: Mutex<HashMap<String, Slot>>,
}

enum Slot {
    /// The connection has come first.
    Waiting { stream: ServerStream, number: u64 },
    /// There is a process, which takes every connection that comes.
    Claimed(mpsc::UnboundedSender<ServerStream>),
}

impl Streams {
    /// No streams yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Serves one call of `Streaming.Stream`: learns which stream it is, acknowledges it, and hands
    /// it over.
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
            self.attach(id, stream);
        }
    }

    fn has_room_for(&self, id: &str) -> bool {
        let slots = self.slots();
        slots.contains_key(id)
            || slots.values().filter(|slot| matches!(slot, Slot::Waiting { .. })).count() < WAITING_LIMIT
    }

    fn attach(self: &Arc<Self>, id: String, stream: ServerStream) {
        let mut slots = self.slots();
        let number = match slots.get(&id) {
            Some(Slot::Claimed(process)) => {
                // A process that no longer listens has ended its streams: so does dropping this one.
                let _ = process.send(stream);
                return;
            }
            Some(Slot::Waiting { number, .. }) => number + 1,
            None => 0,
        };
        let disconnected = stream.disconnected();
        slots.insert(id.clone(), Slot::Waiting { stream, number });
        drop(slots);
        // A container that is removed before it was started takes its connections along.
        let streams = Arc::downgrade(self);
        tokio::spawn(async move {
            disconnected.await;
            let Some(streams) = streams.upgrade() else { return };
            let mut slots = streams.slots();
            if matches!(slots.get(&id), Some(Slot::Waiting { number: waiting, .. }) if *waiting == number) {
                slots.remove(&id);
            }
        });
    }

    /// Reserves a stream for a process, until the [`Claim`] is dropped.
    pub fn claim(self: &Arc<Self>, id: &str) -> Result<Claim, Taken> {
        let (sender, connections) = mpsc::unbounded_channel();
        let mut slots = self.slots();
        match slots.remove(id) {
            Some(Slot::Waiting { stream, .. }) => {
                // The receiver is right here.
                let _ = sender.send(stream);
            }
            Some(claimed @ Slot::Claimed(_)) => {
                slots.insert(id.to_owned(), claimed);
                return Err(Taken(id.to_owned()));
            }
            None => {}
        }
        slots.insert(id.to_owned(), Slot::Claimed(sender));
        Ok(Claim { streams: Arc::clone(self), id: id.to_owned(), connections })
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        // Every change is a single insertion or removal, so the map is whole after a panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process's right to the connections of one stream.
pub struct Claim {
    streams: Arc<Streams>,
    id: String,
    connections: mpsc::UnboundedReceiver<ServerStream>,
}

impl Claim {
    /// The next connection for the stream, which replaces the one before. Cancel safe.
    pub async fn next(&mut self) -> ServerStream {
        match self.connections.recv().await {
            Some(stream) => stream,
            // The sender lives in the slot, and the slot as long as this claim.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.streams.slots().remove(&self.id);
    }
}
