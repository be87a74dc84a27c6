//! Copies what a client sends to a process's stdin.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{
    message::{self, FromClient},
    streams::Claim,
};
use crate::server::{Incoming, ServerStream};

/// How much a client may send before the process has read any of it.
const WINDOW: usize = 64 << 10;

/// How long after `CloseIO` more input may be on its way. The call and the input come on different
/// connections; a client that closes its stream ends the wait.
const CLOSE_GRACE: Duration = Duration::from_secs(10);

/// How long the end of a connection is waited for once there is a newer one. A containerd that was ended has closed it; one
/// that hangs without having closed it sends nothing any more.
const SUPERSEDED_GRACE: Duration = Duration::from_secs(2);

/// Copies to `sink` until the client ends its stream, or `close` is notified, or the process has
/// closed its side. A connection that breaks is no end: another may come.
///
/// The end of a terminal's input does not close it: the terminal stays for its output.
/// Afterwards input is thrown away, so that a client that is still sending does not hang.
pub async fn copy(sink: impl AsyncWrite + Unpin, is_terminal: bool, mut claim: Claim, close: Arc<Notify>) {
    let mut input = Input { sink: Some(sink), is_terminal, close, closing: None };
    let mut newer = None;
    loop {
        let mut stream = if let Some(stream) = newer.take() { stream } else { input.next(&mut claim).await };
        if let Ended::ByClient = input.receive(&mut stream, &mut claim, &mut newer).await {
            input.end();
        }
        stream.close().await;
    }
}

enum Ended {
    ByClient,
    Disconnected,
}

struct Input<S> {
    sink: Option<S>,
    is_terminal: bool,
    close: Arc<Notify>,
    /// Since `CloseIO`: when to stop waiting for more.
    closing: Option<Instant>,
}

impl<S: AsyncWrite + Unpin> Input<S> {
    /// The next connection. The input may end before there is one.
    async fn next(&mut self, claim: &mut Claim) -> ServerStream {
        tokio::select! {
            stream = claim.next() => stream,
            () = self.close.notified() => {
                self.end();
                claim.next().await
            }
        }
    }

    /// Takes in what one connection sends, until it ends. When there is a `newer` one, what the client has sent over this one
    /// before it went away is still taken in, but not waited for.
    async fn receive(
        &mut self,
        stream: &mut ServerStream,
        claim: &mut Claim,
        newer: &mut Option<ServerStream>,
    ) -> Ended {
        if stream.send(&message::credit(WINDOW)).await.is_err() {
            return Ended::Disconnected;
        }
        let mut taken = 0;
        let mut superseded = None;
        loop {
            let incoming = tokio::select! {
                biased;
                incoming = stream.receive() => incoming,
                () = self.close.notified() => {
                    self.closing = Some(Instant::now() + CLOSE_GRACE);
                    continue;
                }
                () = expired(self.closing) => return Ended::ByClient,
                // Not while something is written: a write that is broken off has written nobody knows how much.
                stream = claim.next(), if newer.is_none() => {
                    *newer = Some(stream);
                    superseded = Some(Instant::now() + SUPERSEDED_GRACE);
                    continue;
                }
                () = expired(superseded) => return Ended::Disconnected,
            };
            match incoming {
                Some(Incoming::Message(message)) => {
                    if let FromClient::Data(data) = FromClient::decode(&message) {
                        self.write(&data).await;
                        taken += data.len();
                        if self.closing.is_some() {
                            self.closing = Some(Instant::now() + CLOSE_GRACE);
                        }
                    }
                }
                Some(Incoming::End) => return Ended::ByClient,
                // A client that asked for the end and went away meant it.
                None if self.closing.is_some() => return Ended::ByClient,
                None => return Ended::Disconnected,
            }
            if taken >= WINDOW / 2 && newer.is_none() {
                if stream.send(&message::credit(taken)).await.is_err() {
                    return Ended::Disconnected;
                }
                taken = 0;
            }
        }
    }

    async fn write(&mut self, data: &[u8]) {
        if let Some(sink) = &mut self.sink
            && sink.write_all(data).await.is_err()
        {
            // The process has closed its stdin, or is gone.
            self.sink = None;
        }
    }

    fn end(&mut self) {
        if !self.is_terminal {
            self.sink = None;
        }
    }
}

async fn expired(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
