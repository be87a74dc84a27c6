//! What the agent asks of the controller.
//!
//! Its first word it says on a connection of its own. For all that follows the controller has to come: any process in the
//! guest may connect to the host, but [`REQUESTS_PORT`] is the agent's from before there is any other.
//!
//! [`REQUESTS_PORT`]: pericarp_protos::guest::REQUESTS_PORT

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use pericarp_protos::{
    guest::HOST_PORT,
    host::{
        BootClient, FitResourcesRequest, HostClient, PrepareContainerRequest, PrepareContainerResponse,
        ReadyRequest, ReleaseContainerRequest,
    },
    id::ContainerId,
    ttrpc::{
        self, Error,
        r#async::{Client, transport::Socket},
        context,
    },
};
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::server::Listener;

/// Limit for the first word.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// Limit for calls during which the controller mounts, or waits for another container's mounts.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// How long a call waits for the controller to come, which may just be starting again.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for what the controller does by itself if it is not asked.
const LITTLE_PATIENCE: Duration = Duration::from_secs(1);

/// Where the controller waits for the first word.
pub enum Address {
    /// In a guest: the host's vsock port.
    Vsock,
    /// In tests: a unix socket.
    Unix(PathBuf),
}

impl Address {
    async fn connect(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Vsock => {
                Socket::new(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOST_PORT)).await?)
            }
            Self::Unix(path) => Socket::new(UnixStream::connect(path).await?),
        })
    }
}

/// Tells the controller that the agent serves.
pub async fn say_ready(address: &Address, since_init: Duration) -> ttrpc::Result<()> {
    let mut request = ReadyRequest::new();
    request.since_init_ns = u64::try_from(since_init.as_nanos()).unwrap_or(u64::MAX);
    request.kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
    env!("CARGO_PKG_VERSION").clone_into(&mut request.agent_version);
    let said = async {
        let socket = address
            .connect()
            .await
            .map_err(|error| Error::Others(format!("cannot connect to the controller: {error}")))?;
        BootClient::new(Client::new(socket)).ready(context::with_duration(READY_LIMIT), &request).await
    };
    match timeout(READY_LIMIT, said).await {
        Ok(said) => said.map(drop),
        Err(_) => Err(Error::Others("the controller has not answered".into())),
    }
}

/// A connection of the controller's, and which one it is.
type Connected = Option<(u64, HostClient)>;

/// The controller, as far as it has come.
pub struct Host {
    connected: watch::Sender<Connected>,
}

impl Host {
    /// Nobody has come yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { connected: watch::Sender::new(None) })
    }

    /// Takes the controller's connections for ever. The newest is used: an earlier one is that of a controller which has
    /// ended, or it is broken.
    pub async fn welcome(self: Arc<Self>, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok(connection) => {
                    let client = HostClient::new(Client::new(Socket::new(connection)));
                    self.connected.send_modify(|connected| {
                        let number = connected.as_ref().map_or(0, |(number, _)| *number) + 1;
                        *connected = Some((number, client));
                    });
                }
                // Out of descriptors or memory: let running tasks give some back before the next try.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept the controller's connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Has the controller make a container's files appear under the share.
    ///
    /// Answers the OCI spec for the guest, as JSON, and the disks that were put into the machine for it.
    pub async fn prepare_container(&self, id: &ContainerId) -> ttrpc::Result<PrepareContainerResponse> {
        let mut request = PrepareContainerRequest::new();
        request.container_id = id.to_string();
        self.call(PATIENCE, request, |client, context, request| async move {
            client.prepare_container(context, &request).await
        })
        .await
    }

    /// Undoes [`Self::prepare_container`]. The controller does so, too, when it hears that the container is deleted.
    pub async fn release_container(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = ReleaseContainerRequest::new();
        request.container_id = id.to_string();
        self.call(LITTLE_PATIENCE, request, |client, context, request| async move {
            client.release_container(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Has the controller make the machine fit the limits that containerd has recorded for a container.
    pub async fn fit_resources(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = FitResourcesRequest::new();
        request.container_id = id.to_string();
        self.call(PATIENCE, request, |client, context, request| async move {
            client.fit_resources(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Makes one call, once more on the next connection if the first turns out to be broken (the controller may have been
    /// restarted). Every call can be repeated without harm.
    async fn call<Q: Clone, A, F: Future<Output = ttrpc::Result<A>>>(
        &self,
        patience: Duration,
        request: Q,
        call: impl Fn(HostClient, context::Context, Q) -> F,
    ) -> ttrpc::Result<A> {
        let attempts = async {
            let (number, client) = self.after(0, patience).await?;
            match call(client, context::with_duration(CALL_LIMIT), request.clone()).await {
                Ok(answer) => Ok(answer),
                Err(Error::RpcStatus(status)) => Err(Error::RpcStatus(status)),
                Err(_) => {
                    let (_, client) = self.after(number, patience).await?;
                    call(client, context::with_duration(CALL_LIMIT), request).await
                }
            }
        };
        timeout(CALL_LIMIT, attempts).await.unwrap_or_else(|_| {
            Err(Error::Others(format!("the controller has not answered within {} s", CALL_LIMIT.as_secs())))
        })
    }

    /// A connection that came after the one with a number.
    async fn after(&self, number: u64, patience: Duration) -> ttrpc::Result<(u64, HostClient)> {
        let mut connected = self.connected.subscribe();
        let newer = |connected: &Connected| connected.as_ref().is_some_and(|(newest, _)| *newest > number);
        let found = timeout(patience, connected.wait_for(newer)).await;
        match found.ok().and_then(Result::ok).and_then(|connected| connected.clone()) {
            Some(connected) => Ok(connected),
            None => Err(Error::Others(format!(
                "the controller has not connected within {} s; is `pericarp serve` running on the host?",
                patience.as_secs()
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use pericarp_protos::{
        host::{FitResourcesResponse, Host as Service, create_host},
        ttrpc::r#async::{Server, TtrpcContext},
    };
    use tokio::net::UnixListener;

    use super::*;

    /// A controller that says its name in an error.
    struct Named(&'static str);

    #[async_trait::async_trait]
    impl Service for Named {
        async fn fit_resources(
            &self,
            _: &TtrpcContext,
            _: FitResourcesRequest,
        ) -> ttrpc::Result<FitResourcesResponse> {
            Err(Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, self.0)))
        }
    }

    async fn controller(socket: &std::path::Path, name: &'static str) -> Server {
        let connection = UnixStream::connect(socket).await;
        let listener = ttrpc::r#async::transport::Listener::new(futures::stream::iter([connection]));
        let mut server =
            Server::new().add_listener(listener).register_service(create_host(Arc::new(Named(name))));
        server.start().await.unwrap();
        server
    }

    async fn asked(host: &Host) -> String {
        let id = "c1".parse().unwrap();
        match host.fit_resources(&id).await {
            Err(Error::RpcStatus(status)) => status.message,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_call_goes_to_the_newest_connection_and_waits_for_the_next_if_that_is_broken() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("requests.sock");
        let host = Host::new();
        tokio::spawn(host.clone().welcome(Listener::Unix(UnixListener::bind(&socket).unwrap())));
        let first = controller(&socket, "first").await;
        assert_eq!(asked(&host).await, "first");
        let mut second = controller(&socket, "second").await;
        let mut connected = host.connected.subscribe();
        connected.wait_for(|connected| connected.as_ref().unwrap().0 == 2).await.unwrap();
        assert_eq!(asked(&host).await, "second");
        drop(first);

        second.disconnect().await;
        let waiting = tokio::spawn({
            let host = host.clone();
            async move { asked(&host).await }
        });
        tokio::task::yield_now().await;
        let _third = controller(&socket, "third").await;
        assert_eq!(waiting.await.unwrap(), "third");
    }
}
