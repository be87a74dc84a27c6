//! The thread that serves one disk.

use std::{io, ops::ControlFlow, sync::Arc, time::Duration};

use virtio_queue::QueueT as _;
use vmm_sys_util::eventfd::EventFd;

use super::{Counters, SERIAL_SIZE, disk::Disk, request};
use crate::{
    attack,
    memory::GuestMemory,
    thread_kind::ThreadKind,
    virtio::{
        ActiveQueue,
        throttle::{NextTurn, Throttle},
        wait_context::{WaitContext, event_tokens},
    },
};

/// Most requests served before the worker checks whether it is to stop: a guest that makes requests without end must
/// not keep its disk in the machine.
const BATCH: usize = 16;

event_tokens! {
    enum Token {
        /// The guest has notified the request queue.
        RequestQueue,
        Stop,
    }
}

/// Serves the request queue.
pub struct Worker {
    /// The device's name, for messages.
    name: String,
    memory: GuestMemory,
    queue: ActiveQueue,
    disk: Arc<Disk>,
    serial: [u8; SERIAL_SIZE],
    counters: Counters,
    throttle: Throttle,
    wait_context: WaitContext<Token>,
}

impl Worker {
    pub fn new(
        name: String,
        memory: GuestMemory,
        queue: ActiveQueue,
        disk: Arc<Disk>,
        serial: [u8; SERIAL_SIZE],
        counters: Counters,
        stop: &EventFd,
    ) -> io::Result<Self> {
        let wait_context = WaitContext::new()?;
        wait_context.add(&queue.notified, Token::RequestQueue)?;
        wait_context.add(stop, Token::Stop)?;
        let throttle = Throttle::default();
        Ok(Self { name, memory, queue, disk, serial, counters, throttle, wait_context })
    }

    /// Gives the worker a rate limit to keep.
    pub fn limited_by(self, throttle: Throttle) -> Self {
        Self { throttle, ..self }
    }

    /// Serves until the stop event is written or the guest breaks the queue.
    pub fn run(mut self) {
        let mut turn = NextTurn::Now;
        loop {
            attack::reached(ThreadKind::Blk);
            match self.handle_events(turn.timeout()) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for requests; the device stops");
                    return;
                }
            }
            if turn.has_to_wait() {
                continue;
            }
            turn = match self.serve() {
                Ok(turn) => turn,
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "the guest broke its queue; the device stops");
                    return;
                }
            };
        }
    }

    /// Waits for requests, at most for `timeout` (`None`: without a limit). Breaks when the worker is to stop.
    fn handle_events(&mut self, timeout: Option<Duration>) -> io::Result<ControlFlow<()>> {
        for event in self.wait_context.wait::<2>(timeout)? {
            match event.token {
                Token::Stop => return Ok(ControlFlow::Break(())),
                // An error means that there was no notification after all.
                Token::RequestQueue => drop(self.queue.notified.read()),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Serves a batch of requests. Returns when it is to serve the next one. An error means that the guest has broken
    /// the queue.
    fn serve(&mut self) -> Result<NextTurn, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                let more = self.queue.queue.enable_notification(&self.memory)?;
                return Ok(if more { NextTurn::Now } else { NextTurn::OnEvent });
            };
            if let Some(not_before) = self.throttle.not_before() {
                self.queue.unpop();
                return Ok(NextTurn::NotBefore(not_before));
            }
            let head = chain.head_index();
            let served = request::serve(&self.memory, chain, &self.disk, &self.serial, &self.counters);
            self.throttle.charge(served.moved);
            self.queue.add_used(&self.memory, head, served.written)?;
            self.queue.signal(&self.memory)?;
        }
        Ok(NextTurn::Now)
    }
}
