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

/// Copies to `sink` until the client ends its stream, or `close` is notified, or the process has
/// closed its side. A connection that breaks is no end: another may come.
///
/// The end of a terminal's input does not close it: the terminal stays for its output.
/// Afterwards input is thrown away, so that a client that is still sending does not hang.
pub async fn copy(sink: impl AsyncWrite + Unpin, is_terminal: bool, mut claim: Claim, close: Arc<Notify>) {
    let mut input = Input { sink: Some(sink), is_terminal, close, closing: None };
    let mut stream = tokio::select! {
        stream = claim.next() => stream,
        () = input.close.notified() => {
            input.end();
            claim.next().await
        }
    };
    loop {
        tokio::select! {
            biased;
            newer = claim.next() => stream = newer,
            ended = input.receive(&mut stream) => {
                if let Ended::ByClient = ended {
                    input.end();
                }
                stream.close().await;
                tokio::select! {
                    newer = claim.next() => stream = newer,
                    () = input.close.notified() => {
                        input.end();
                        stream = claim.next().await;
                    }
                }
            }
        }
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
    /// Takes in what one connection sends.
    async fn receive(&mut self, stream: &mut ServerStream) -> Ended {
        if stream.send(&message::credit(WINDOW)).await.is_err() {
            return Ended::Disconnected;
        }
        let mut taken = 0;
        loop {
            let incoming = tokio::select! {
                biased;
                incoming = stream.receive() => incoming,
                () = self.close.notified() => {
                    self.closing = Some(Instant::now() + CLOSE_GRACE);
                    continue;
                }
                () = expired(self.closing) => return Ended::ByClient,
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
            if taken >= WINDOW / 2 {
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
