//! The agent's ttrpc server, over vsock in a guest and over a unix socket in tests.
//!
//! ttrpc's own asynchronous server is not used, because stdio streams need three things that it does
//! not give: messages of a stream in the order in which they came, backpressure from a stream to its
//! connection, and knowing that a stream's peer is gone. The framing, the messages and the dispatch
//! tables are ttrpc's.

mod connection;
mod listener;

use std::{collections::HashMap, sync::Arc};

use pericarp_protos::ttrpc::{self, Code, r#async::Service};

pub use connection::{Incoming, ServerStream};
pub use listener::Listener;

/// Opens one stream: is given the payload of the request that began it (empty for a stream whose
/// client sends messages of its own), and must not block.
pub type OpenStream = Box<dyn Fn(Vec<u8>, ServerStream) + Send + Sync>;

/// Everything that can be called.
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

/// Accepts connections for ever. Each is served by its own task, so nothing that happens on one
/// disturbs another.
pub async fn serve(listener: Listener, services: Arc<Services>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(connection::serve(connection, Arc::clone(&services)));
            }
            // Out of descriptors or memory: let running tasks give some back before the next try.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

/// An error answer of a call.
pub fn status(code: Code, message: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.into()))
}
