//! The thread that serves the guest's file system requests.

use std::{io, io::Write as _, ops::ControlFlow, sync::Arc};

use thiserror::Error;
use virtio_queue::QueueT as _;
use virtiofsd::{fuse::OutHeader, server::Server};
use vm_memory::ByteValued as _;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Counters,
    checked_fs::CheckedFs,
    credentials::FsCredentials,
    request::{self, REPLY_HEADER_SIZE, Request, RequestError},
    staging::{Staging, StagingError},
};
use crate::{
    attack,
    memory::GuestMemory,
    thread_kind::ThreadKind,
    virtio::{
        ActiveQueue, Chain,
        throttle::{NextTurn, Throttle},
        wait_context::{WaitContext, event_tokens},
    },
};

/// Most requests of one queue that are served before the other queue, and the order to stop, have their turn.
pub const BATCH: usize = 64;
/// Indices of the device's queues (virtio 1.2, section 5.11.2).
const HIGH_PRIORITY_QUEUE: usize = 0;
const REQUEST_QUEUE: usize = 1;

event_tokens! {
    enum Token {
        /// The guest has notified the high-priority queue.
        HighPriorityQueue,
        /// The guest has notified the request queue.
        RequestQueue,
        Stop,
    }
}

/// The worker cannot go on.
#[derive(Debug, Error)]
pub enum WorkerError {
    #[error("cannot wait for requests")]
    Wait(#[source] io::Error),
    #[error("the guest broke its queue")]
    Queue(#[from] virtio_queue::Error),
}

/// Checks a request. Returns how many bytes of the room for its reply may be used.
type Check = fn(&Request<'_>) -> Result<usize, RequestError>;

/// Serves both queues.
pub struct Worker {
    memory: GuestMemory,
    queues: [ActiveQueue; 2],
    /// When each queue is to be served again.
    turns: [NextTurn; 2],
    server: Arc<Server<CheckedFs>>,
    staging: Staging,
    counters: Counters,
    /// What the request queue is limited to. What comes over the high-priority queue lets the guest's kernel free
    /// memory or end a request, and has no limit.
    throttle: Throttle,
    wait_context: WaitContext<Token>,
}

impl Worker {
    pub fn new(
        memory: GuestMemory,
        queues: [ActiveQueue; 2],
        server: Arc<Server<CheckedFs>>,
        counters: Counters,
        throttle: Throttle,
        stop: &EventFd,
    ) -> io::Result<Self> {
        let wait_context = WaitContext::new()?;
        wait_context.add(&queues[HIGH_PRIORITY_QUEUE].notified, Token::HighPriorityQueue)?;
        wait_context.add(&queues[REQUEST_QUEUE].notified, Token::RequestQueue)?;
        wait_context.add(stop, Token::Stop)?;
        let staging = Staging::new(&memory).map_err(io::Error::other)?;
        let turns = [NextTurn::OnEvent; 2];
        Ok(Self { memory, queues, turns, server, staging, counters, throttle, wait_context })
    }

    /// Serves until the stop event is written or the guest breaks a queue.
    pub fn run(mut self) {
        if let Err(error) = unshare_fs_attributes() {
            tracing::error!(%error, "fs: cannot give the device's thread its own working directory; the device stops");
            return;
        }
        loop {
            attack::reached(ThreadKind::Fs);
            match self.serve_pending() {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "fs: the device stops");
                    return;
                }
            }
        }
    }

    /// Waits until there are requests, and serves a batch of each queue. Breaks when the worker is to stop.
    pub fn serve_pending(&mut self) -> Result<ControlFlow<()>, WorkerError> {
        if self.wait().map_err(WorkerError::Wait)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for index in 0..self.queues.len() {
            if self.turns[index] != NextTurn::OnEvent && !self.turns[index].has_to_wait() {
                self.turns[index] = self.serve(index)?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn wait(&mut self) -> io::Result<ControlFlow<()>> {
        let [urgent, requests] = self.turns;
        for event in self.wait_context.wait::<4>(urgent.or(requests).timeout())? {
            let index = match event.token {
                Token::Stop => return Ok(ControlFlow::Break(())),
                Token::HighPriorityQueue => HIGH_PRIORITY_QUEUE,
                Token::RequestQueue => REQUEST_QUEUE,
            };
            // An error means that there was no notification after all.
            let _ = self.queues[index].notified.read();
            if !self.turns[index].has_to_wait() {
                self.turns[index] = NextTurn::Now;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Serves a batch of requests of a queue. Returns when it is to serve the next one. An error means that the guest
    /// has broken the queue.
    fn serve(&mut self, index: usize) -> Result<NextTurn, virtio_queue::Error> {
        let Self { memory, queues, server, staging, counters, throttle, .. } = self;
        let (throttle, check): (_, Check) = match index {
            HIGH_PRIORITY_QUEUE => (None, request::check_urgent),
            _ => (Some(throttle), request::check),
        };
        let queue = &mut queues[index];
        queue.queue.disable_notification(&*memory)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(memory)? else {
                let more = queue.queue.enable_notification(&*memory)?;
                return Ok(if more { NextTurn::Now } else { NextTurn::OnEvent });
            };
            if let Some(not_before) = throttle.as_ref().and_then(|throttle| throttle.not_before()) {
                queue.unpop();
                return Ok(NextTurn::NotBefore(not_before));
            }
            counters.requests.add(1);
            let moved_before = counters.data_bytes.get();
            let head = chain.head_index();
            let length = serve_request(memory, staging, server, chain, check).unwrap_or_else(|error| {
                // There is not even a FUSE header, so that there can be no reply.
                tracing::debug!(error = &error as &dyn std::error::Error, "fs: a request is dropped");
                0
            });
            if let Some(throttle) = &throttle {
                throttle.charge(counters.data_bytes.get().wrapping_sub(moved_before));
            }
            let Ok(length) = u32::try_from(length) else {
                unreachable!("a reply has at most a header and DATA_MAX bytes")
            };
            queue.add_used(memory, head, length)?;
            queue.signal(memory)?;
        }
        Ok(NextTurn::Now)
    }
}

/// Gives the calling thread its own working directory and umask, which virtiofsd changes during some requests: that
/// must not affect other threads.
fn unshare_fs_attributes() -> rustix::io::Result<()> {
    // SAFETY: only this thread's working directory, root and umask are separated from those of the process.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
}

/// Serves the request in a chain. Returns the bytes of the reply.
fn serve_request(
    guest: &GuestMemory,
    staging: &mut Staging,
    server: &Server<CheckedFs>,
    chain: Chain<'_>,
    check: Check,
) -> Result<usize, StagingError> {
    let request = staging.copy_request(guest, chain)?;
    let header = request.header;
    let errno = match check(&request) {
        Ok(room) => {
            let (reader, writer) = staging.reader_and_writer(room)?;
            let _credentials = FsCredentials::for_request(&header);
            match server.handle_message(reader, writer, None::<&mut ()>) {
                Ok(length) => return Ok(length),
                Err(error) => {
                    tracing::debug!(%error, opcode = header.opcode, "fs: a request is not understood");
                    libc::EINVAL
                }
            }
        }
        Err(error) => {
            tracing::debug!(%error, opcode = header.opcode, "fs: a request is refused");
            error.errno()
        }
    };
    let refusal = OutHeader { len: REPLY_HEADER_SIZE, error: -errno, unique: header.unique };
    let (_, mut writer) = staging.reader_and_writer(REPLY_HEADER_SIZE as usize)?;
    // If there is no room for it, the operation has no reply.
    Ok(writer.write_all(refusal.as_slice()).map_or(0, |()| REPLY_HEADER_SIZE as usize))
}
