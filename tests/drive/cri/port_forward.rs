//! Port-forward: a connection to a pod's port behind the URL that containerd returns.
//!
//! Over WebSocket (`v4.channel.k8s.io`), each port of the query has two channels: one for data, one for an error. Each
//! begins with the port, two bytes in little-endian order. This version of the protocol cannot close one direction.

use anyhow::{Context as _, Result, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{self, Message, error::ProtocolError},
};

use crate::{HANG_LIMIT, Pod, api, cri::streams};

const DATA: u8 = 0;
const ERROR: u8 = 1;

/// The size of one message; containerd itself never sends one as large.
const MESSAGE_MAX: usize = 32 * 1024;

/// A connection to a port of a pod's localhost.
pub struct PortForward {
    socket: WebSocketStream<TcpStream>,
    /// The bytes of the data channel, which begin with the port.
    data: Vec<u8>,
    /// The bytes of the error channel, which begin with the port.
    error: Vec<u8>,
    port: u16,
}

/// What a connection had delivered by its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForwardOutput {
    /// The bytes that no [`PortForward::read`] had returned before.
    pub data: Vec<u8>,
    /// The message on the error channel; empty if nothing went wrong.
    pub error: String,
}

impl Pod {
    /// `PortForward`, and a connection to one port. Whether the pod accepts the connection shows when it is read.
    pub async fn forward_port(&self, port: u16) -> Result<PortForward> {
        let request =
            api::PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![i32::from(port)] };
        let response = self.node.cri.runtime().port_forward(request).await.context("PortForward")?;
        let url = format!("{}?port={port}", response.into_inner().url);
        let socket = streams::connect(&url).await?;
        Ok(PortForward { socket, data: Vec::new(), error: Vec::new(), port })
    }
}

impl PortForward {
    /// Sends to the server.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for piece in bytes.chunks(MESSAGE_MAX) {
            let message = Message::binary([&[DATA], piece].concat());
            self.socket.send(message).await.context("write to the WebSocket")?;
        }
        Ok(())
    }

    /// Reads exactly `count` bytes.
    pub async fn read(&mut self, count: usize) -> Result<Vec<u8>> {
        while self.data.len() < 2 + count {
            let more = self.receive().await.with_context(|| format!("waiting for {count} bytes"))?;
            ensure!(
                more,
                "the connection ended after {} of {count} bytes; error: {}",
                self.data.len(),
                String::from_utf8_lossy(&self.error)
            );
        }
        Ok(self.data.drain(2..2 + count).collect())
    }

    /// Reads until the connection has ended.
    pub async fn wait_for_end(mut self) -> Result<PortForwardOutput> {
        while self.receive().await? {}
        let port = self.port.to_le_bytes();
        match (self.data.strip_prefix(&port), self.error.strip_prefix(&port)) {
            (Some(data), Some(error)) => Ok(PortForwardOutput {
                data: data.to_vec(),
                error: String::from_utf8_lossy(error).into_owned(),
            }),
            _ => {
                bail!("the channels do not begin with port {}: {:?}, {:?}", self.port, self.data, self.error)
            }
        }
    }

    /// Closes both directions, whatever the server does.
    pub async fn close(mut self) -> Result<()> {
        self.socket.close(None).await.context("close the WebSocket")
    }

    /// Receives the next message; returns false at the end of the connection.
    async fn receive(&mut self) -> Result<bool> {
        let message = match timeout(HANG_LIMIT, self.socket.next()).await {
            Err(_) => bail!("no message for {} s; so far {} bytes", HANG_LIMIT.as_secs(), self.data.len()),
            // containerd closes the connection without the WebSocket's own good-bye.
            Ok(
                None
                | Some(
                    Ok(Message::Close(_))
                    | Err(tungstenite::Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)),
                ),
            ) => return Ok(false),
            Ok(Some(message)) => message.context("read from the WebSocket")?.into_data(),
        };
        match message.split_first() {
            Some((&DATA, bytes)) => self.data.extend_from_slice(bytes),
            Some((&ERROR, bytes)) => self.error.extend_from_slice(bytes),
            _ => {}
        }
        Ok(true)
    }
}
