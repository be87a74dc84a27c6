//! What the agent asks of the controller.
//!
//! The agent reports once that it is ready, on the only connection to the host that the guest may make. For all other
//! calls the controller connects to the guest, at [`REQUESTS_PORT`]. The agent listens on that port before there is any
//! other process.
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

use crate::ttrpc::Listener;

/// How long the report that the agent is ready may take.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// How long a call may take. During a call the controller may mount, or wait for another container's mounts.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// How long a call waits for the controller to connect, which may just be restarting.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long [`ControllerClient::release_container`] waits for the controller to connect. The controller releases a
/// container without being asked when it learns that the container is deleted.
const RELEASE_CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// Where the controller waits for the report that the agent is ready.
pub enum ControllerAddress {
    /// In a guest: the host's vsock port.
    Vsock,
    /// In tests: a unix socket.
    Unix(PathBuf),
}

impl ControllerAddress {
    async fn connect(&self) -> io::Result<Socket> {
        Ok(match self {
            Self::Vsock => {
                Socket::new(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, HOST_PORT)).await?)
            }
            Self::Unix(path) => Socket::new(UnixStream::connect(path).await?),
        })
    }
}

/// Reports to the controller that the agent is ready, and how long that took since PID 1 was started.
pub async fn announce_ready(address: &ControllerAddress, since_init: Duration) -> ttrpc::Result<()> {
    let mut request = ReadyRequest::new();
    request.since_init_ns = u64::try_from(since_init.as_nanos()).unwrap_or(u64::MAX);
    request.kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
    env!("CARGO_PKG_VERSION").clone_into(&mut request.agent_version);
    let call = async {
        let socket = address
            .connect()
            .await
            .map_err(|error| Error::Others(format!("cannot connect to the controller: {error}")))?;
        BootClient::new(Client::new(socket)).ready(context::with_duration(READY_LIMIT), &request).await
    };
    match timeout(READY_LIMIT, call).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(Error::Others("the controller has not answered".into())),
    }
}

/// A client on one of the controller's connections, which are numbered from 1.
#[derive(Clone)]
struct Connection {
    number: u64,
    client: HostClient,
}

/// Calls the controller on the newest connection that it has made.
pub struct ControllerClient {
    newest: watch::Sender<Option<Connection>>,
}

impl ControllerClient {
    /// A client without connections.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { newest: watch::Sender::new(None) })
    }

    /// Accepts the controller's connections and never returns. Only the newest is used: an older one belongs to a
    /// controller that has ended, or is broken.
    pub async fn accept_connections(self: Arc<Self>, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok(connection) => {
                    let client = HostClient::new(Client::new(Socket::new(connection)));
                    self.newest.send_modify(|newest| {
                        let number = newest.as_ref().map_or(0, |connection| connection.number) + 1;
                        *newest = Some(Connection { number, client });
                    });
                }
                // There are no descriptors or no memory. Running tasks may free some before the next attempt.
                Err(error) => {
                    tracing::warn!(%error, "cannot accept the controller's connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Has the controller put a container's files into the share.
    ///
    /// Returns the OCI spec for the guest, as JSON, the disks that have been inserted into the machine for it, and the
    /// volumes in memory that it uses.
    pub async fn prepare_container(&self, id: &ContainerId) -> ttrpc::Result<PrepareContainerResponse> {
        let mut request = PrepareContainerRequest::new();
        request.container_id = id.to_string();
        request.makes_memory_volumes = true;
        request.maps_layers = true;
        self.call(CONNECT_LIMIT, request, |client, context, request| async move {
            client.prepare_container(context, &request).await
        })
        .await
    }

    /// Undoes [`Self::prepare_container`]. The controller also does so when it learns that the container is deleted.
    pub async fn release_container(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = ReleaseContainerRequest::new();
        request.container_id = id.to_string();
        self.call(RELEASE_CONNECT_LIMIT, request, |client, context, request| async move {
            client.release_container(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Has the controller resize the machine for the limits that containerd has recorded for a container.
    pub async fn fit_resources(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = FitResourcesRequest::new();
        request.container_id = id.to_string();
        self.call(CONNECT_LIMIT, request, |client, context, request| async move {
            client.fit_resources(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Makes one call. If the connection turns out to be broken (the controller may have been restarted), the call is
    /// repeated on the next connection. Every call can be repeated without harm.
    async fn call<Q: Clone, A, F: Future<Output = ttrpc::Result<A>>>(
        &self,
        connect_limit: Duration,
        request: Q,
        call: impl Fn(HostClient, context::Context, Q) -> F,
    ) -> ttrpc::Result<A> {
        let attempts = async {
            let Connection { number, client } = self.connection_after(0, connect_limit).await?;
            match call(client, context::with_duration(CALL_LIMIT), request.clone()).await {
                Ok(answer) => Ok(answer),
                Err(Error::RpcStatus(status)) => Err(Error::RpcStatus(status)),
                Err(_) => {
                    let Connection { client, .. } = self.connection_after(number, connect_limit).await?;
                    call(client, context::with_duration(CALL_LIMIT), request).await
                }
            }
        };
        timeout(CALL_LIMIT, attempts).await.unwrap_or_else(|_| {
            Err(Error::Others(format!("the controller has not answered within {} s", CALL_LIMIT.as_secs())))
        })
    }

    /// Waits for a connection with a higher number than `number`.
    async fn connection_after(&self, number: u64, connect_limit: Duration) -> ttrpc::Result<Connection> {
        let mut newest = self.newest.subscribe();
        let is_newer =
            |newest: &Option<Connection>| newest.as_ref().is_some_and(|newest| newest.number > number);
        let found = timeout(connect_limit, newest.wait_for(is_newer)).await;
        match found.ok().and_then(Result::ok).and_then(|newest| newest.clone()) {
            Some(connection) => Ok(connection),
            None => Err(Error::Others(format!(
                "the controller has not connected within {} s; is `pericarp serve` running on the host?",
                connect_limit.as_secs()
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

    /// A controller that returns its name in an error.
    struct NamedController(&'static str);

    #[async_trait::async_trait]
    impl Service for NamedController {
        async fn fit_resources(
            &self,
            _: &TtrpcContext,
            _: FitResourcesRequest,
        ) -> ttrpc::Result<FitResourcesResponse> {
            Err(Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INTERNAL, self.0)))
        }
    }

    async fn connect_controller(socket: &std::path::Path, name: &'static str) -> Server {
        let connection = UnixStream::connect(socket).await;
        let listener = ttrpc::r#async::transport::Listener::new(futures::stream::iter([connection]));
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(create_host(Arc::new(NamedController(name))));
        server.start().await.unwrap();
        server
    }

    async fn name_of_called_controller(client: &ControllerClient) -> String {
        let id = "c1".parse().unwrap();
        match client.fit_resources(&id).await {
            Err(Error::RpcStatus(status)) => status.message,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_call_goes_to_the_newest_connection_and_waits_for_the_next_if_that_is_broken() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("requests.sock");
        let client = ControllerClient::new();
        tokio::spawn(client.clone().accept_connections(Listener::Unix(UnixListener::bind(&socket).unwrap())));
        let first = connect_controller(&socket, "first").await;
        assert_eq!(name_of_called_controller(&client).await, "first");
        let mut second = connect_controller(&socket, "second").await;
        let mut newest = client.newest.subscribe();
        newest.wait_for(|newest| newest.as_ref().unwrap().number == 2).await.unwrap();
        assert_eq!(name_of_called_controller(&client).await, "second");
        drop(first);

        second.disconnect().await;
        let waiting = tokio::spawn({
            let client = client.clone();
            async move { name_of_called_controller(&client).await }
        });
        tokio::task::yield_now().await;
        let _third = connect_controller(&socket, "third").await;
        assert_eq!(waiting.await.unwrap(), "third");
    }
}
