//! A guest's requests, taken on a connection that the controller makes.
//!
//! It is the controller that dials, because the guest's side tells who is there: the agent has taken [`REQUESTS_PORT`]
//! before there was anybody else in the guest, and keeps it. Whoever dials the host could be any process of a
//! container.

use std::{io, sync::Arc, time::Duration};

use async_trait::async_trait;
use pericarp_protos::guest::REQUESTS_PORT;
use tokio::time::Instant;

use super::{Pod, containers::container_id};
use crate::guest::{
    dial,
    service::{AgentFeatures, HostServer, Prepared, RequestError, Requests},
};

/// How long after a failure it is tried again: nothing tells when it is worth it. A guest that takes connections only
/// to break them waits as long as one that takes none.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// For the guest to take the connection.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

impl Pod {
    /// Serves the guest's requests for as long as its machine lives.
    pub(super) fn serve_requests(self: &Arc<Self>) {
        let pod = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                never = pod.keep_serving() => match never {},
                _ended = pod.wait() => {}
            }
        });
    }

    async fn keep_serving(self: &Arc<Self>) -> std::convert::Infallible {
        let server = HostServer::new(Arc::new(GuestRequests(self.clone())));
        let mut pause = PAUSE_MIN;
        // What repeats is said once.
        let mut is_reported = false;
        loop {
            match dial_within(&self.files.vsock(), DIAL_TIMEOUT).await {
                Ok(connection) => {
                    if std::mem::take(&mut is_reported) {
                        tracing::info!(pod = self.id(), "the guest's requests are taken again");
                    }
                    let begun = Instant::now();
                    let error = server.serve(connection).await;
                    tracing::debug!(pod = self.id(), %error, "the connection for the guest's requests has ended");
                    // One that was of use is replaced at once.
                    if begun.elapsed() > PAUSE_MAX {
                        pause = PAUSE_MIN;
                    }
                }
                Err(error) if !self.is_ending() && !std::mem::replace(&mut is_reported, true) => {
                    tracing::warn!(
                        pod = self.id(),
                        %error,
                        "the guest takes no connection for its requests, without which it gets no containers; if the \
                         pod was started by an older version, replace it"
                    );
                }
                Err(_) => {}
            }
            tokio::time::sleep(pause).await;
            pause = PAUSE_MAX.min(2 * pause);
        }
    }
}

async fn dial_within(socket: &std::path::Path, limit: Duration) -> io::Result<tokio::net::UnixStream> {
    let dialled = tokio::time::timeout(limit, dial(socket, REQUESTS_PORT)).await;
    dialled.unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the guest does not answer")))
}

/// The guest's requests, taken to its pod.
struct GuestRequests(Arc<Pod>);

#[async_trait]
impl Requests for GuestRequests {
    async fn prepare(&self, container: &str, agent: AgentFeatures) -> Result<Prepared, RequestError> {
        let prepared = async { self.0.prepare_container(&container_id(container)?, agent).await };
        prepared.await.map_err(|error| self.0.error_for_guest(&error))
    }

    async fn resize_machine(&self, container: &str) -> Result<(), RequestError> {
        let fitted = async { self.0.fit_container(&container_id(container)?).await };
        fitted.await.map_err(|error| self.0.error_for_guest(&error))
    }

    async fn release(&self, container: &str) -> Result<(), RequestError> {
        let released = async { self.0.release_container(&container_id(container)?).await };
        released.await.map_err(|error| self.0.error_for_guest(&error))
    }
}
