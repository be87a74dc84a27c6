//! What the agent asks of the controller.

use std::{io, path::PathBuf, time::Duration};

use pericarp_protos::{
    guest::HOST_PORT,
    host::{
        FitResourcesRequest, HostClient, PrepareContainerRequest, PrepareContainerResponse, ReadyRequest,
        ReleaseContainerRequest,
    },
    id::ContainerId,
    ttrpc::{
        self, Error,
        r#async::{Client, transport::Socket},
        context,
    },
};
use tokio::{net::UnixStream, sync::Mutex};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// Limit for calls that the controller answers from memory.
const SHORT: Duration = Duration::from_secs(10);

/// Limit for calls during which the controller mounts, or waits for another container's mounts.
const LONG: Duration = Duration::from_secs(60);

/// Where the controller is.
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

/// The controller, reached over one connection that is made again when it breaks.
pub struct Host {
    address: Address,
    client: Mutex<Option<HostClient>>,
}

impl Host {
    /// Does not connect yet.
    pub fn new(address: Address) -> Self {
        Self { address, client: Mutex::new(None) }
    }

    /// Tells the controller that the agent serves.
    pub async fn ready(&self, since_init: Duration) -> ttrpc::Result<()> {
        let mut request = ReadyRequest::new();
        request.since_init_ns = u64::try_from(since_init.as_nanos()).unwrap_or(u64::MAX);
        request.kernel_release = rustix::system::uname().release().to_string_lossy().into_owned();
        env!("CARGO_PKG_VERSION").clone_into(&mut request.agent_version);
        self.call(
            SHORT,
            request,
            |client, context, request| async move { client.ready(context, &request).await },
        )
        .await?;
        Ok(())
    }

    /// Has the controller make a container's files appear under the share.
    ///
    /// Answers the OCI spec for the guest, as JSON, and the disks that were put into the machine for it.
    pub async fn prepare_container(&self, id: &ContainerId) -> ttrpc::Result<PrepareContainerResponse> {
        let mut request = PrepareContainerRequest::new();
        request.container_id = id.to_string();
        self.call(LONG, request, |client, context, request| async move {
            client.prepare_container(context, &request).await
        })
        .await
    }

    /// Undoes [`Self::prepare_container`].
    pub async fn release_container(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = ReleaseContainerRequest::new();
        request.container_id = id.to_string();
        self.call(LONG, request, |client, context, request| async move {
            client.release_container(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Has the controller make the machine fit the limits that containerd has recorded for a container.
    pub async fn fit_resources(&self, id: &ContainerId) -> ttrpc::Result<()> {
        let mut request = FitResourcesRequest::new();
        request.container_id = id.to_string();
        self.call(LONG, request, |client, context, request| async move {
            client.fit_resources(context, &request).await
        })
        .await?;
        Ok(())
    }

    /// Makes one call, once more on a fresh connection if the old one turns out to be broken (the
    /// controller may have been restarted). Every call can be repeated without harm.
    async fn call<Q: Clone, A, F: Future<Output = ttrpc::Result<A>>>(
        &self,
        limit: Duration,
        request: Q,
        call: impl Fn(HostClient, context::Context, Q) -> F,
    ) -> ttrpc::Result<A> {
        let attempts = async {
            let client = self.client(false).await?;
            match call(client, context::with_duration(limit), request.clone()).await {
                Ok(answer) => Ok(answer),
                Err(Error::RpcStatus(status)) => Err(Error::RpcStatus(status)),
                Err(_) => {
                    let client = self.client(true).await?;
                    call(client, context::with_duration(limit), request).await
                }
            }
        };
        tokio::time::timeout(limit, attempts).await.unwrap_or_else(|_| {
            Err(Error::Others(format!("the controller has not answered within {} s", limit.as_secs())))
        })
    }

    async fn client(&self, fresh: bool) -> ttrpc::Result<HostClient> {
        let mut client = self.client.lock().await;
        match &*client {
            Some(client) if !fresh => Ok(client.clone()),
            _ => {
                let socket =
                    self.address.connect().await.map_err(|error| {
                        Error::Others(format!("cannot connect to the controller: {error}"))
                    })?;
                Ok(client.insert(HostClient::new(Client::new(socket))).clone())
            }
        }
    }
}
