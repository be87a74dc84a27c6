//! The thread that serves one disk.

use std::{io, os::fd::AsRawFd as _, sync::Arc};

use virtio_queue::QueueT as _;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{Counters, SERIAL_SIZE, disk::Disk, request};
use crate::{memory::GuestMemory, virtio::ActiveQueue};

const TOKEN_QUEUE: u64 = 1;
const TOKEN_STOP: u64 = 2;
/// Requests served before the worker looks whether it is to stop: a guest that never stops asking must not
/// keep its disk in the machine.
const BATCH: usize = 16;

pub struct Worker {
    /// For messages.
    name: String,
    memory: GuestMemory,
    queue: ActiveQueue,
    disk: Arc<Disk>,
    serial: [u8; SERIAL_SIZE],
    counters: Counters,
    epoll: Epoll,
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
    ) -> io::Result<Worker> {
        let epoll = Epoll::new()?;
        for (event, token) in [(&queue.notified, TOKEN_QUEUE), (stop, TOKEN_STOP)] {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))?;
        }
        Ok(Worker { name, memory, queue, disk, serial, counters, epoll })
    }

    /// Serves until it is told to stop or the guest breaks the queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            match self.told_to_stop(if more { 0 } else { -1 }) {
                Ok(false) => {}
                Ok(true) => return,
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

    /// Waits for at most `patience` milliseconds (-1: for ever) for something to do.
    fn told_to_stop(&mut self, patience: i32) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(patience, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            if event.data() == TOKEN_STOP {
                return Ok(true);
            }
            // An error means that there was no notification after all.
            let _ = self.queue.notified.read();
        }
        Ok(false)
    }

    /// Serves some requests. Answers whether there may be more without another notification.
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
