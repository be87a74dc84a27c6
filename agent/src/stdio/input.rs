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
use crate::ttrpc::{Incoming, ServerStream};

/// How many bytes a client may send before the process has read any of them.
const WINDOW: usize = 64 << 10;

/// How long after `CloseIO` more input may arrive. The call and the input come on different connections. A client that
/// closes its stream ends the wait.
const CLOSE_GRACE: Duration = Duration::from_secs(10);

/// How long a connection is still read after a newer one has come. A containerd that has ended has closed its
/// connection; one that hangs without having closed it does not send anything any more.
const REPLACED_GRACE: Duration = Duration::from_secs(2);

/// Copies to `sink` until the client ends its stream, or `close` is notified, or the process has closed its stdin. A
/// connection that breaks does not end the input, because another one may come.
///
/// The end of a terminal's input does not close the terminal, which is still needed for output. After the end, input is
/// read and dropped, so that a client that is still sending does not hang.
pub async fn copy(sink: impl AsyncWrite + Unpin, is_terminal: bool, mut claim: Claim, close: Arc<Notify>) {
    let mut input = Input { sink: Some(sink), is_terminal, close, close_deadline: None };
    let mut stream = input.next_connection(&mut claim).await;
    loop {
        let mut replacement = None;
        if let InputEnd::ByClient = input.receive(&mut stream, &mut claim, &mut replacement).await {
            input.end();
        }
        stream.close().await;
        stream = match replacement {
            Some(Replacement { stream, .. }) => stream,
            None => input.next_connection(&mut claim).await,
        };
    }
}

/// Why [`Input::receive`] has returned.
enum InputEnd {
    /// The client has ended its stream, or has asked for the end of the input.
    ByClient,
    /// The connection is closed. Another one may come.
    Disconnected,
}

/// A connection that has come while an older one for the same stream was still open.
struct Replacement {
    stream: ServerStream,
    /// When to stop reading the older connection.
    deadline: Instant,
}

struct Input<S> {
    /// `None` after the end of the input.
    sink: Option<S>,
    is_terminal: bool,
    close: Arc<Notify>,
    /// Set by `CloseIO`: when to stop waiting for more input.
    close_deadline: Option<Instant>,
}

impl<S: AsyncWrite + Unpin> Input<S> {
    /// Waits for the next connection. `CloseIO` may end the input before it comes.
    async fn next_connection(&mut self, claim: &mut Claim) -> ServerStream {
        tokio::select! {
            stream = claim.next() => stream,
            () = self.close.notified() => {
                self.end();
                claim.next().await
            }
        }
    }

    /// Writes what one connection sends, until the connection ends or its replacement's deadline passes. If a
    /// replacement comes, what the client has sent on this connection before it went away is still written.
    async fn receive(
        &mut self,
        stream: &mut ServerStream,
        claim: &mut Claim,
        replacement: &mut Option<Replacement>,
    ) -> InputEnd {
        if stream.send(&message::credit(WINDOW)).await.is_err() {
            return InputEnd::Disconnected;
        }
        let mut received = 0;
        loop {
            let incoming = tokio::select! {
                biased;
                incoming = stream.receive() => incoming,
                () = self.close.notified() => {
                    self.close_deadline = Some(Instant::now() + CLOSE_GRACE);
                    continue;
                }
                () = passed(self.close_deadline) => return InputEnd::ByClient,
                // Not while something is being written: nobody would know how much of it has been.
                stream = claim.next(), if replacement.is_none() => {
                    *replacement = Some(Replacement { stream, deadline: Instant::now() + REPLACED_GRACE });
                    continue;
                }
                () = passed(replacement.as_ref().map(|newer| newer.deadline)) => return InputEnd::Disconnected,
            };
            match incoming {
                Some(Incoming::Message(message)) => {
                    if let FromClient::Data(data) = FromClient::decode(&message) {
                        self.write(&data).await;
                        received += data.len();
                        if self.close_deadline.is_some() {
                            self.close_deadline = Some(Instant::now() + CLOSE_GRACE);
                        }
                    }
                }
                Some(Incoming::End) => return InputEnd::ByClient,
                // The client has asked for the end of the input before it went away.
                None if self.close_deadline.is_some() => return InputEnd::ByClient,
                None => return InputEnd::Disconnected,
            }
            if received >= WINDOW / 2 && replacement.is_none() {
                if stream.send(&message::credit(received)).await.is_err() {
                    return InputEnd::Disconnected;
                }
                received = 0;
            }
        }
    }

    async fn write(&mut self, data: &[u8]) {
        if let Some(sink) = &mut self.sink
            && sink.write_all(data).await.is_err()
        {
            // The process has closed its stdin or has ended.
            self.sink = None;
        }
    }

    fn end(&mut self) {
        if !self.is_terminal {
            self.sink = None;
        }
    }
}

/// Completes when the deadline has passed; never if there is none.
async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
