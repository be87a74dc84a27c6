//! The agent's ttrpc server, over vsock in a guest and over a unix socket in tests.
//!
//! The ttrpc crate's own asynchronous server is not used, because stdio streams need three things that it does not
//! have: the messages of a stream in their order of arrival, backpressure from a stream to its connection, and notice
//! of a stream's peer that has gone away. The framing, the messages and the dispatch tables are the crate's.

mod connection;
mod listener;

use std::{collections::HashMap, sync::Arc};

use pericarp_protos::{
    protobuf::{Message, well_known_types::any::Any},
    ttrpc::{self, Code, r#async::Service},
};

pub use connection::{Incoming, ServerStream};
pub use listener::Listener;

/// Handles the opening of one stream, and must not block. It gets the payload of the request that opened the stream,
/// which is empty if the client sends messages of its own.
pub type OpenStream = Box<dyn Fn(Vec<u8>, ServerStream) + Send + Sync>;

/// All methods that can be called.
#[derive(Default)]
pub struct Services {
    unary: HashMap<String, Service>,
    streams: HashMap<(String, String), OpenStream>,
}

impl Services {
    /// Adds the unary methods of a service, as the generated `create_*` functions make them.
    pub fn add(&mut self, services: HashMap<String, Service>) {
        self.unary.extend(services);
    }

    /// Adds one streaming method.
    pub fn add_stream(
        &mut self,
        service: &str,
        method: &str,
        open: impl Fn(Vec<u8>, ServerStream) + Send + Sync + 'static,
    ) {
        self.streams.insert((service.to_owned(), method.to_owned()), Box::new(open));
    }
}

/// Accepts connections and never returns. Each connection is served by a task of its own, so that none disturbs
/// another.
pub async fn serve(listener: Listener, services: Arc<Services>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(connection::serve(connection, Arc::clone(&services)));
            }
            // There are no descriptors or no memory. Running tasks may free some before the next attempt.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// Packs a message into an `Any`.
pub fn pack(type_url: impl Into<String>, message: &impl Message) -> Any {
    let mut any = Any::new();
    any.type_url = type_url.into();
    any.value = encode(message, Vec::new());
    any
}

/// Appends the encoded message to a buffer.
fn encode(message: &impl Message, mut buffer: Vec<u8>) -> Vec<u8> {
    #[expect(
        clippy::expect_used,
        reason = "only messages beyond 2 GiB fail, and those of the agent are far smaller"
    )]
    // Cannot fail: those of the agent are far smaller.
    message.write_to_vec(&mut buffer).expect("a message of less than 2 GiB can be encoded");
    buffer
}

/// The error that a call returns, with a status code and a message.
pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}
