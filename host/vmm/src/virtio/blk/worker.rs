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
        Ok(Self { name, memory, queue, disk, serial, counters, wait_context })
    }

    /// Serves until the stop event is written or the guest breaks the queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            attack::reached(ThreadKind::Blk);
            match self.handle_events(more.then_some(Duration::ZERO)) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for requests; the device stops");
                    return;
                }
            }
            more = match self.serve() {
                Ok(more) => more,
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

    /// Serves a batch of requests. Returns whether there may be more without another notification. An error means that
    /// the guest has broken the queue.
    fn serve(&mut self) -> Result<bool, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        for _ in 0..BATCH {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                return self.queue.queue.enable_notification(&self.memory);
            };
            let head = chain.head_index();
            let written = request::serve(&self.memory, chain, &self.disk, &self.serial, &self.counters);
            self.queue.add_used(&self.memory, head, written)?;
            self.queue.signal(&self.memory)?;
        }
        Ok(true)
    }
}
