//! Copies what a process writes to whoever reads its stream.

use std::{
    thread,
    time::{Duration, Instant},
};

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
    let mut output = Output { source, pending: Vec::new(), pace: Pace::default() };
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
    pace: Pace,
}

impl Output {
    async fn send(&mut self, claim: &mut Claim, stream: &mut ServerStream) -> Ended {
        let mut credit = 0;
        loop {
            if !self.pending.is_empty() && credit > 0 {
                let length = self.pending.len().min(credit);
                if stream.send_frame(message::data(&self.pending[..length])).await.is_err() {
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
        self.pace.before_reading();
        self.pending.resize(limit, 0);
        let read = self.source.try_read(&mut self.pending);
        self.pending.truncate(read.as_ref().copied().unwrap_or(0));
        match read {
            // A console without a process fails with EIO: its end.
            Ok(0) => Err(SourceEnded),
            Ok(length) => {
                self.pace.has_read(length);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(SourceEnded),
        }
    }
}

struct SourceEnded;

/// Collects small writes into large messages. On a guest's only CPU, the first few bytes of a process that has much
/// to write take the CPU from it; each message would carry no more than one of its writes. While output keeps coming, the
/// process is given the CPU back before its output is taken.
#[derive(Default)]
struct Pace {
    /// When something was last read, and whether that was little.
    last: Option<(Instant, bool)>,
    /// Not before this: the CPU has other work, and giving it away took long.
    not_before: Option<Instant>,
}

impl Pace {
    /// Output that comes after a longer silence is no flood.
    const FLOOD: Duration = Duration::from_millis(2);
    /// What is worth a message.
    const ENOUGH: usize = CHUNK / 2;
    /// How long giving way may take to be worth it, and how long it is left alone if it takes longer.
    const PATIENCE: Duration = Duration::from_millis(5);
    const REST: Duration = Duration::from_millis(500);

    fn before_reading(&mut self) {
        let Some((at, true)) = self.last else { return };
        let now = Instant::now();
        if now.duration_since(at) > Self::FLOOD || self.not_before.is_some_and(|until| now < until) {
            return;
        }
        thread::yield_now();
        let after = Instant::now();
        self.not_before = (after - now > Self::PATIENCE).then(|| after + Self::REST);
    }

    fn has_read(&mut self, length: usize) {
        self.last = Some((Instant::now(), length < Self::ENOUGH));
    }
}

/// Waits until the reader has closed its side or its connection.
async fn closed(stream: &mut ServerStream) {
    while let Some(Incoming::Message(_)) = stream.receive().await {}
}
