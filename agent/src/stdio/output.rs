//! Copies what a process writes to whoever reads its stream.

use tokio::{io::AsyncRead, io::AsyncReadExt, sync::watch};

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
pub async fn copy(mut source: impl AsyncRead + Unpin, mut claim: Claim, drained: watch::Sender<bool>) {
    let mut pending = Pending::default();
    let mut stream = claim.next().await;
    while let Ended::Disconnected = send(&mut source, &mut pending, &mut claim, &mut stream).await {
        stream = claim.next().await;
    }
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

/// Bytes that were read but not yet sent.
#[derive(Default)]
struct Pending {
    buffer: Vec<u8>,
}

enum Ended {
    /// The source has ended.
    Source,
    /// The reader has gone; another may come.
    Disconnected,
}

async fn send(
    source: &mut (impl AsyncRead + Unpin),
    pending: &mut Pending,
    claim: &mut Claim,
    stream: &mut ServerStream,
) -> Ended {
    let mut credit = 0;
    loop {
        if !pending.buffer.is_empty() && credit > 0 {
            let length = pending.buffer.len().min(credit);
            if stream.send(&message::data(&pending.buffer[..length])).await.is_err() {
                return Ended::Disconnected;
            }
            pending.buffer.drain(..length);
            credit -= length;
        }
        pending.buffer.reserve(CHUNK);
        let room = if pending.buffer.is_empty() { credit.min(CHUNK) } else { 0 };
        let mut limited = (&mut *source).take(room as u64);
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
            // A console without a process fails with EIO: its end.
            read = limited.read_buf(&mut pending.buffer), if room > 0 => {
                if matches!(read, Ok(0) | Err(_)) {
                    return Ended::Source;
                }
            }
        }
    }
}

/// Waits until the reader has closed its side or its connection.
async fn closed(stream: &mut ServerStream) {
    while let Some(Incoming::Message(_)) = stream.receive().await {}
}
