//! Copies what a process writes to the reader of its stream.

use tokio::{net::unix::pipe, sync::watch};

use super::{
    message::{self, FromClient, MAX_DATA},
    streams::Claim,
};
use crate::ttrpc::{Incoming, ServerStream};

/// The most credit that a reader can have, in bytes, so that the sum cannot overflow.
const CREDIT_LIMIT: usize = 1 << 30;

/// Copies from `source` until all of its writers have closed it.
///
/// Only as much is read as the reader has granted credit for, so a slow reader holds up its own process and no other.
/// Bytes that were read but could not be sent are sent on the next connection.
///
/// After the end of `source`, `drained` becomes true when the reader has closed its side. containerd's reader does so
/// when it has read everything. This function runs until it is aborted.
pub async fn copy(source: pipe::Receiver, mut claim: Claim, drained: watch::Sender<bool>) {
    let mut output = Output { source, pending: Vec::new() };
    let mut stream = claim.next().await;
    while let SendEnd::Disconnected = output.send(&mut claim, &mut stream).await {
        stream = claim.next().await;
    }
    drop(output);
    loop {
        stream.close().await;
        tokio::select! {
            biased;
            newer = claim.next() => stream = newer,
            () = wait_until_closed(&mut stream) => {
                drained.send_replace(true);
                stream = claim.next().await;
            }
        }
    }
}

/// Why [`Output::send`] has returned.
enum SendEnd {
    /// All writers have closed the source.
    Source,
    /// The reader has disconnected. Another one may connect.
    Disconnected,
}

struct Output {
    source: pipe::Receiver,
    /// Bytes that were read but not yet sent.
    pending: Vec<u8>,
}

impl Output {
    /// Sends what the source provides, until it ends or the reader disconnects. A new connection replaces `stream`.
    async fn send(&mut self, claim: &mut Claim, stream: &mut ServerStream) -> SendEnd {
        let mut credit = 0;
        loop {
            if !self.pending.is_empty() && credit > 0 {
                let length = self.pending.len().min(credit);
                if stream.send(&message::data(&self.pending[..length])).await.is_err() {
                    return SendEnd::Disconnected;
                }
                self.pending.drain(..length);
                credit -= length;
            }
            let may_read = self.pending.is_empty() && credit > 0;
            tokio::select! {
                biased;
                newer = claim.next() => {
                    *stream = newer;
                    credit = 0;
                }
                incoming = stream.receive() => match incoming {
                    Some(Incoming::Message(message)) => {
                        if let FromClient::Credit(more) = FromClient::decode(&message) {
                            credit = (credit + more).min(CREDIT_LIMIT);
                        }
                    }
                    Some(Incoming::End) | None => return SendEnd::Disconnected,
                },
                ready = self.source.readable(), if may_read => {
                    if ready.is_err() || self.read(credit.min(MAX_DATA)).is_err() {
                        return SendEnd::Source;
                    }
                }
            }
        }
    }

    /// Reads the bytes that are available, if any, into `pending`.
    fn read(&mut self, limit: usize) -> Result<(), SourceEnded> {
        self.pending.resize(limit, 0);
        let read = self.source.try_read(&mut self.pending);
        self.pending.truncate(read.as_ref().copied().unwrap_or(0));
        match read {
            Ok(0) => Err(SourceEnded),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            // Reading from a console that no process has open fails with EIO.
            Err(_) => Err(SourceEnded),
        }
    }
}

/// All writers of the source have closed it.
struct SourceEnded;

/// Waits until the reader has closed its side or its connection.
async fn wait_until_closed(stream: &mut ServerStream) {
    while let Some(Incoming::Message(_)) = stream.receive().await {}
}
