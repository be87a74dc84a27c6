//! Exec and attach: the streams behind the URL that containerd returns.
//!
//! containerd's streaming server speaks SPDY and WebSocket. Over WebSocket (subprotocol `v4.channel.k8s.io`) every
//! message starts with a byte that says which stream it belongs to; the outcome is a `metav1.Status` on the error
//! stream. This version of the protocol cannot close stdin.

use anyhow::{Context, Result, bail};
use futures::{SinkExt, StreamExt};
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};

use crate::{ExecOutput, HANG_LIMIT};

const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Whether a command gets a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// A pseudo-terminal: stdout and stderr are one stream.
    Yes,
    /// Three pipes.
    No,
}

/// The streams of one command.
pub struct Session {
    socket: WebSocketStream<TcpStream>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    outcome: Option<Outcome>,
}

/// The fields of Kubernetes' `metav1.Status` that tests read.
#[derive(Debug, Deserialize)]
struct Outcome {
    status: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Details,
}

#[derive(Debug, Default, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Debug, Deserialize)]
struct Cause {
    reason: String,
    message: String,
}

/// Opens a WebSocket to a URL of containerd's streaming server.
pub(crate) async fn connect(url: &str) -> Result<WebSocketStream<TcpStream>> {
    let rest = url.strip_prefix("http://").with_context(|| format!("not an http URL: {url}"))?;
    let (address, _) = rest.split_once('/').with_context(|| format!("no path in the URL {url}"))?;
    let tcp = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
    let mut request = format!("ws://{rest}").into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let (socket, _) = client_async(request, tcp).await.with_context(|| format!("WebSocket to {url}"))?;
    Ok(socket)
}

impl Session {
    /// Opens the streams behind a URL of `Exec` or `Attach`.
    pub async fn open(url: &str) -> Result<Self> {
        let socket = connect(url).await?;
        Ok(Self { socket, stdout: Vec::new(), stderr: Vec::new(), outcome: None })
    }

    /// Writes to the command's standard input.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.send(STDIN, bytes.as_ref()).await
    }

    /// Changes the size of the terminal.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<()> {
        self.send(RESIZE, format!(r#"{{"Width":{columns},"Height":{rows}}}"#).as_bytes()).await
    }

    /// Reads until the standard output so far contains `text`.
    pub async fn read_until(&mut self, text: &str) -> Result<()> {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            if !self.receive().await.with_context(|| format!("waiting for {text:?}"))? {
                bail!(
                    "the streams ended before {text:?}; stdout was {:?}",
                    String::from_utf8_lossy(&self.stdout)
                );
            }
        }
        Ok(())
    }

    /// Reads until the command has ended.
    pub async fn wait_for_end(mut self) -> Result<ExecOutput> {
        while self.receive().await? {}
        let outcome = self.outcome.context("the streams ended without an outcome")?;
        Ok(ExecOutput {
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
            exit_code: outcome.exit_code()?,
        })
    }

    /// Closes the streams while the command may still run.
    pub async fn close(mut self) -> Result<()> {
        self.socket.close(None).await.context("close the WebSocket")
    }

    async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        self.socket.send(Message::binary(message)).await.context("write to the WebSocket")
    }

    /// Receives the next message; returns false at the end of the streams.
    async fn receive(&mut self) -> Result<bool> {
        let message = match timeout(HANG_LIMIT, self.socket.next()).await {
            Err(_) => bail!(
                "no message for {} s; so far stdout {:?}, stderr {:?}",
                HANG_LIMIT.as_secs(),
                String::from_utf8_lossy(&self.stdout),
                String::from_utf8_lossy(&self.stderr)
            ),
            Ok(None | Some(Ok(Message::Close(_)))) => return Ok(false),
            // containerd closes the connection without the WebSocket's own good-bye once it has sent the outcome.
            Ok(Some(Err(_))) if self.outcome.is_some() => return Ok(false),
            Ok(Some(message)) => message.context("read from the WebSocket")?.into_data(),
        };
        let Some((channel, bytes)) = message.split_first() else { return Ok(true) };
        match *channel {
            STDOUT => self.stdout.extend_from_slice(bytes),
            STDERR => self.stderr.extend_from_slice(bytes),
            ERROR if !bytes.is_empty() => {
                self.outcome = Some(serde_json::from_slice(bytes).with_context(|| {
                    format!("not a status on the error stream: {:?}", String::from_utf8_lossy(bytes))
                })?);
            }
            _ => {}
        }
        Ok(true)
    }
}

impl Outcome {
    fn exit_code(&self) -> Result<i32> {
        if self.status == "Success" {
            return Ok(0);
        }
        let cause = self.details.causes.iter().find(|cause| cause.reason == "ExitCode");
        let Some(cause) = cause else { bail!("the command failed: {}", self.message) };
        cause.message.parse().with_context(|| format!("exit code {:?}", cause.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(json: &str) -> Outcome {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_exit_code_is_read_from_the_status() {
        assert_eq!(outcome(r#"{"metadata":{},"status":"Success"}"#).exit_code().unwrap(), 0);
        let failure = r#"{"status":"Failure","message":"command terminated","reason":"NonZeroExitCode",
            "details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(outcome(failure).exit_code().unwrap(), 7);
    }

    #[test]
    fn a_failure_without_an_exit_code_is_an_error_with_its_message() {
        let error = outcome(r#"{"status":"Failure","message":"no such container"}"#).exit_code().unwrap_err();
        assert!(error.to_string().contains("no such container"));
    }
}
