//! The thread that serves the guest's file system requests.

use std::{io, sync::Arc};

use virtio_queue::QueueT as _;
use virtiofsd::{
    descriptor_utils::{Reader, Writer},
    passthrough::PassthroughFs,
    server::Server,
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::user::{self, Acting};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain, Counter},
};

/// Token of the stop event; the queues' tokens are their numbers.
const STOP: u64 = u64::MAX;

pub struct Worker {
    memory: GuestMemory,
    queues: [ActiveQueue; 2],
    server: Arc<Server<PassthroughFs>>,
    requests: Counter,
    epoll: Epoll,
}

impl Worker {
    pub fn new(
        memory: GuestMemory,
        queues: [ActiveQueue; 2],
        server: Arc<Server<PassthroughFs>>,
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
        Ok(Worker { memory, queues, server, requests, epoll })
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
        let mut events = [EpollEvent::default(); 4];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "fs: cannot wait for requests; the device stops");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return;
                }
                let served = usize::try_from(event.data())
                    .ok()
                    .and_then(|index| self.queues.get_mut(index))
                    .map(|queue| {
                        let _ = queue.notified.read();
                        serve(queue, &self.memory, &self.server, &self.requests)
                    });
                if let Some(Err(error)) = served {
                    tracing::warn!(%error, "fs: the guest broke its queue; the device stops");
                    return;
                }
            }
        }
    }
}

/// virtiofsd changes working directory and umask for the length of some requests, which must not
/// concern other threads.
fn own_working_directory() -> rustix::io::Result<()> {
    // SAFETY: only this thread's working directory, root and umask part from the process's.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
}

/// Acts as the user of a request until the answer is dropped, where that matters.
fn act_for_user(memory: &GuestMemory, mut request: Chain<'_>) -> Option<Acting> {
    // Linux gives the header a buffer of its own.
    let header = request.next().filter(|buffer| buffer.len() >= user::HEADER)?;
    Acting::for_request(memory, header.addr())
}

/// Serves every request of a queue, until none is left and the guest knows that it has to notify.
fn serve(
    queue: &mut ActiveQueue,
    memory: &GuestMemory,
    server: &Server<PassthroughFs>,
    requests: &Counter,
) -> Result<(), virtio_queue::Error> {
    loop {
        queue.queue.disable_notification(memory)?;
        while let Some(chain) = queue.pop(memory)? {
            requests.add(1);
            let head = chain.head_index();
            let _acting = act_for_user(memory, chain.clone());
            let reader = Reader::new(memory, chain.clone());
            let writer = Writer::new(memory, chain);
            let length = match (reader, writer) {
                (Ok(reader), Ok(writer)) => {
                    server.handle_message(reader, writer, None::<&mut ()>).unwrap_or_else(|error| {
                        // Not even a FUSE header: there is nobody to answer.
                        tracing::debug!(%error, "fs: malformed request");
                        0
                    })
                }
                // Buffers outside memory.
                _ => 0,
            };
            queue.add_used(memory, head, u32::try_from(length).unwrap_or(0))?;
            queue.signal(memory)?;
        }
        if !queue.queue.enable_notification(memory)? {
            return Ok(());
        }
    }
}
