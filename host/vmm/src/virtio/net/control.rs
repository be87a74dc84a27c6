//! The control queue (virtio 1.2, section 5.1.6.5). The only command is the one that says how many
//! queue pairs are in use.
//!
//! It has a thread of its own: to change the number of pairs is slow, as it takes the lock that all of
//! the host's network configuration shares, and no frame waits for that.

use std::{io, os::fd::AsRawFd as _};

use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::steering::{Steering, SteeringError};
use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain},
};

/// `VIRTIO_NET_CTRL_MQ` (virtio 1.2, section 5.1.6.5.5).
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
/// Class, command, and the number of pairs.
const COMMAND_SIZE: usize = 4;
const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;
/// Milliseconds between a command and the next. A driver gives one when it starts, and one whenever
/// somebody in the guest changes the number; a guest that never stops changing it must not hold up the
/// network configuration of the whole host.
const PAUSE: i32 = 100;
/// Without time limit.
const FOREVER: i32 = -1;

const TOKEN_STOP: u64 = 1;
const TOKEN_COMMAND: u64 = 2;

/// Serves the control queue.
pub struct Control {
    /// For messages.
    name: String,
    memory: GuestMemory,
    queue: ActiveQueue,
    /// None if the driver has not accepted `VIRTIO_NET_F_MQ`.
    steering: Option<Steering>,
    /// Watches for the time to stop.
    stop: Epoll,
    /// Watches for that and for commands.
    events: Epoll,
}

impl Control {
    pub fn new(
        name: String,
        memory: GuestMemory,
        queue: ActiveQueue,
        steering: Option<Steering>,
        stop: &EventFd,
    ) -> io::Result<Control> {
        let control = Control { name, memory, queue, steering, stop: Epoll::new()?, events: Epoll::new()? };
        watch(&control.stop, stop, TOKEN_STOP)?;
        watch(&control.events, stop, TOKEN_STOP)?;
        watch(&control.events, &control.queue.notified, TOKEN_COMMAND)?;
        Ok(control)
    }

    /// Serves until it is told to stop or the guest breaks the queue.
    pub fn run(mut self) {
        loop {
            let waited = match self.answer() {
                Ok(true) => wait(&self.stop, PAUSE),
                Ok(false) => wait(&self.events, FOREVER),
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "the guest broke the queue, which stops");
                    return;
                }
            };
            match waited {
                Ok(Some(TOKEN_STOP)) => return,
                // An error means that there was no notification after all.
                Ok(Some(_)) => drop(self.queue.notified.read()),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for commands; the queue stops");
                    return;
                }
            }
        }
    }

    /// Answers one command. False if there is none, and the guest knows that it has to notify.
    fn answer(&mut self) -> Result<bool, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        loop {
            if let Some(chain) = self.queue.pop(&self.memory)? {
                let head = chain.head_index();
                let command = read_command(&self.memory, chain.clone());
                let obeyed = obey(&self.name, self.steering.as_mut(), command);
                let length = acknowledge(&self.memory, chain, obeyed);
                self.queue.add_used(&self.memory, head, length)?;
                self.queue.signal(&self.memory)?;
                return Ok(true);
            }
            if !self.queue.queue.enable_notification(&self.memory)? {
                return Ok(false);
            }
        }
    }
}

fn watch(epoll: &Epoll, event: &EventFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))
}

/// The token of one event; none if the time (in milliseconds) is over.
fn wait(epoll: &Epoll, patience: i32) -> io::Result<Option<u64>> {
    let mut events = [EpollEvent::default()];
    match epoll.wait(patience, &mut events) {
        Ok(count) => Ok(events[..count].first().map(EpollEvent::data)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the driver has written, if it is as long as the only command and lies in memory.
fn read_command(memory: &GuestMemory, chain: Chain<'_>) -> Option<[u8; COMMAND_SIZE]> {
    let mut command = [0; COMMAND_SIZE];
    let mut free = &mut command[..];
    for descriptor in chain.readable() {
        let (piece, rest) = free.split_at_mut_checked(descriptor.len() as usize)?;
        memory.read_slice(piece, descriptor.addr()).ok()?;
        free = rest;
    }
    free.is_empty().then_some(command)
}

/// Whether the command was carried out.
fn obey(name: &str, steering: Option<&mut Steering>, command: Option<[u8; COMMAND_SIZE]>) -> bool {
    let (Some(steering), Some([CLASS_MQ, MQ_VQ_PAIRS_SET, low, high])) = (steering, command) else {
        tracing::debug!(device = name, ?command, "a command that the device does not know");
        return false;
    };
    let pairs = u16::from_le_bytes([low, high]);
    match steering.set(pairs) {
        Ok(()) => true,
        Err(error) => {
            // Nobody but the guest is to blame for the others.
            if let SteeringError::Tap { source, .. } = &error {
                tracing::warn!(device = name, %error, %source, "the number of queue pairs stays as it is");
            } else {
                tracing::debug!(device = name, %error, "the number of queue pairs stays as it is");
            }
            false
        }
    }
}

/// Writes the answer where the driver wants it; the number of bytes written.
fn acknowledge(memory: &GuestMemory, chain: Chain<'_>, obeyed: bool) -> u32 {
    let ack = if obeyed { ACK_OK } else { ACK_ERR };
    let place = chain.writable().find(|descriptor| descriptor.len() > 0);
    match place.map(|descriptor| memory.write_obj(ack, descriptor.addr())) {
        Some(Ok(())) => 1,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
