//! The thread that serves the guest's file system requests.

use std::{io, io::Write as _, ops::ControlFlow, sync::Arc};

use thiserror::Error;
use virtio_queue::QueueT as _;
use virtiofsd::{fuse::OutHeader, server::Server};
use vm_memory::ByteValued as _;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    checked::Checked,
    request::{self, ANSWER},
    staging::{Staging, StagingError},
    user::{self, Acting},
};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain, Counter},
};

/// Token of the stop event; the queues' tokens are their numbers.
const STOP: u64 = u64::MAX;
/// Requests of one queue that are served before the other queue, and the order to stop, have a turn.
pub const BATCH: usize = 64;

/// The worker cannot go on.
#[derive(Debug, Error)]
pub enum WorkerError {
    #[error("cannot wait for requests")]
    Wait(#[source] io::Error),
    #[error("the guest broke its queue")]
    Queue(#[from] virtio_queue::Error),
}

pub struct Worker {
    memory: GuestMemory,
    queues: [ActiveQueue; 2],
    /// Which queues may have requests without another notification.
    pending: [bool; 2],
    server: Arc<Server<Checked>>,
    staging: Staging,
    requests: Counter,
    epoll: Epoll,
}

impl Worker {
    pub fn new(
        memory: GuestMemory,
        queues: [ActiveQueue; 2],
        server: Arc<Server<Checked>>,
        requests: Counter,
        stop: &EventFd,
    ) -> io::Result<Worker> {
        let epoll = Epoll::new()?;
        let watch = |fd: &EventFd, token| {
            use std::os::fd::AsRawFd as _;
            epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
        };
        for (index, queue) in queues.iter().enumerate() {
            watch(&queue.notified, index as u64)?;
        }
        watch(stop, STOP)?;
        let staging = Staging::new(&memory).map_err(io::Error::other)?;
        Ok(Worker { memory, queues, pending: [false; 2], server, staging, requests, epoll })
    }

    /// Serves until it is told to stop or the guest breaks a queue.
    pub fn run(mut self) {
        if let Err(error) = own_working_directory() {
            tracing::error!(%error, "fs: cannot give the device's thread its own working directory; it stops");
            return;
        }
        if let Err(error) = user::keep_privileges() {
            tracing::error!(%error, "fs: cannot keep privileges while acting as the guest's users; the device stops");
            return;
        }
        loop {
            match self.turn() {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "fs: the device stops");
                    return;
                }
            }
        }
    }

    /// Waits until there is something to do, and does some of it. `Break` is the order to stop.
    pub fn turn(&mut self) -> Result<ControlFlow<()>, WorkerError> {
        if self.wait().map_err(WorkerError::Wait)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        for index in 0..self.queues.len() {
            if self.pending[index] {
                self.pending[index] = self.serve(index)?;
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn wait(&mut self) -> io::Result<ControlFlow<()>> {
        let mut events = [EpollEvent::default(); 4];
        let patience = if self.pending.contains(&true) { 0 } else { -1 };
        let count = match self.epoll.wait(patience, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            if event.data() == STOP {
                return Ok(ControlFlow::Break(()));
            }
            let index = usize::from(event.data() != 0);
            // An error means that there was no notification after all.
            let _ = self.queues[index].notified.read();
            self.pending[index] = true;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Serves some requests of a queue. Answers whether there may be more without another notification.
    fn serve(&mut self, index: usize) -> Result<bool, virtio_queue::Error> {
        let Worker { memory, queues, server, staging, requests, .. } = self;
        let queue = &mut queues[index];
        queue.queue.disable_notification(&*memory)?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(memory)? else {
                return queue.queue.enable_notification(&*memory);
            };
            requests.add(1);
            let head = chain.head_index();
            let length = answer(memory, staging, server, chain).unwrap_or_else(|error| {
                // Not even a FUSE header: there is nobody to answer.
                tracing::debug!(error = &error as &dyn std::error::Error, "fs: a request is dropped");
                0
            });
            queue.add_used(memory, head, u32::try_from(length).unwrap_or(0))?;
            queue.signal(memory)?;
        }
        Ok(true)
    }
}

/// virtiofsd changes working directory and umask for the length of some requests, which must not
/// concern other threads.
fn own_working_directory() -> rustix::io::Result<()> {
    // SAFETY: only this thread's working directory, root and umask part from the process's.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
}

/// Serves a request. Answers with the length of what was written for the guest.
fn answer(
    guest: &GuestMemory,
    staging: &mut Staging,
    server: &Server<Checked>,
    chain: Chain<'_>,
) -> Result<usize, StagingError> {
    let request = staging.take(guest, chain)?;
    let header = request.header;
    let errno = match request::check(&request) {
        Ok(room) => {
            let (reader, writer) = staging.serve(room)?;
            let _acting = Acting::for_request(&header);
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
    let refusal = OutHeader { len: ANSWER, error: -errno, unique: header.unique };
    let (_, mut writer) = staging.serve(ANSWER as usize)?;
    // Where there is no room for it, nobody waits for an answer.
    Ok(writer.write_all(refusal.as_slice()).map_or(0, |()| ANSWER as usize))
}
