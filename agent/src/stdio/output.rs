//! Copies what a process writes to whoever reads its stream.

use tokio::{net::unix::pipe, sync::watch};

use super::{
    message::{self, CHUNK, FromClient},
    streams::Claim,
};
use crate::server::{Incoming, ServerStream};

/// The most credit that a reader can pile up, so that the sum cannot overflow.
const CREDIT_LIMIT: usize = 1 << 30;

/// Copies from `source`, which ends when all of its writers have closed it.
///
/// Nothing is read for which the reader has not granted credit, so a slow reader holds up its own
/// process and nobody else. Bytes that were read but could not be sent go to the next connection.
///
/// After the end, `drained` becomes true when the reader has closed its side, which containerd's
/// does once it has read everything. Runs until it is aborted.
pub async fn copy(source: pipe::Receiver, mut claim: Claim, drained: watch::Sender<bool>) {
    let mut output = Output { source, pending: Vec::new() };
    let mut stream = claim.next().await;
    while let Ended::Disconnected = output.send(&mut claim, &mut stream).await {
        stream = claim.next().await;
    }
    drop(output);
    loop {
        stream.close().await;
        tokio::select! {
            biased;
            newer = claim.next() => stream = newer,
            () = closed(&mut stream) => {
                drained.send_replace(true);
                stream = claim.next().await;
            }
        }
    }
}

enum Ended {
    /// The source has ended.
    Source,
    /// The reader has gone; another may come.
    Disconnected,
}

struct Output {
    source: pipe::Receiver,
    /// Bytes that were read but not yet sent.
    pending: Vec<u8>,
}

impl Output {
    async fn send(&mut self, claim: &mut Claim, stream: &mut ServerStream) -> Ended {
        let mut credit = 0;
        loop {
            if !self.pending.is_empty() && credit > 0 {
                let length = self.pending.len().min(credit);
                if stream.send(&message::data(&self.pending[..length])).await.is_err() {
                    return Ended::Disconnected;
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
                    Some(Incoming::End) | None => return Ended::Disconnected,
                },
                ready = self.source.readable(), if may_read => {
                    if ready.is_err() || self.read(credit.min(CHUNK)).is_err() {
                        return Ended::Source;
                    }
                }
            }
        }
    }

    /// Reads what is there, if anything. An error is the source's end.
    fn read(&mut self, limit: usize) -> Result<(), SourceEnded> {
        self.pending.resize(limit, 0);
        let read = self.source.try_read(&mut self.pending);
        self.pending.truncate(read.as_ref().copied().unwrap_or(0));
        match read {
            // A console without a process fails with EIO: its end.
            Ok(0) => Err(SourceEnded),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(SourceEnded),
        }
    }
}

struct SourceEnded;

/// Waits until the reader has closed its side or its connection.
async fn closed(stream: &mut ServerStream) {
    while let Some(Incoming::Message(_)) = stream.receive().await {}
}
