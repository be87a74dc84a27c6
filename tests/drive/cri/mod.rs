//! Pods and containers over containerd's CRI socket.

pub mod container;
pub mod log;
pub mod pod;
pub mod port_forward;
pub mod streams;
pub mod timeline;

use anyhow::{Context, Result};
use pericarp_protos::cri::{
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::{Channel, Endpoint};

/// Where the node's containerd listens.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// CRI's two services on one connection. Cloning is cheap; calls may run at the same time.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

impl Cri {
    /// Connects to the node's containerd.
    pub async fn connect() -> Result<Self> {
        Ok(Self { channel: connect(CONTAINERD_SOCKET).await? })
    }

    /// CRI's `RuntimeService`.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        // ExecSync returns all of a command's output, up to 16 MiB of each stream.
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// CRI's `ImageService`.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }
}

/// Opens a gRPC connection to a unix socket.
pub async fn connect(socket: &str) -> Result<Channel> {
    Endpoint::from_shared(format!("unix://{socket}"))?
        .connect()
        .await
        .with_context(|| format!("connect to {socket}"))
}
