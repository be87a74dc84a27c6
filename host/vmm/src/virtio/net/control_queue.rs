//! The control queue (virtio 1.2, section 5.1.6.5). Its only command says how many queue pairs are in use.
//!
//! The queue has a thread of its own. To change the number of pairs is slow, because it takes the lock that all of the
//! host's network configuration shares, and no frame should wait for that.

use std::{io, time::Duration};

use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;
use vmm_sys_util::eventfd::EventFd;

use super::steering::{Steering, SteeringError};
use crate::{
    memory::GuestMemory,
    virtio::{
        ActiveQueue, Chain,
        wait_context::{WaitContext, event_tokens},
    },
};

/// `VIRTIO_NET_CTRL_MQ` (virtio 1.2, section 5.1.6.5.5): the class of the only command.
const CLASS_MQ: u8 = 4;
/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const MQ_VQ_PAIRS_SET: u8 = 0;
/// Bytes of the command: its class, its number, and the number of pairs.
const COMMAND_SIZE: usize = 4;
const ACK_OK: u8 = 0;
const ACK_ERR: u8 = 1;
/// Least time between two commands. A driver gives one when it starts, and one whenever somebody in the guest changes
/// the number. A guest that changes it without end must not delay the network configuration of the whole host.
const COMMAND_INTERVAL: Duration = Duration::from_millis(100);

event_tokens! {
    enum Token {
        /// The guest has notified the control queue.
        ControlQueue,
        Stop,
    }
}

/// Serves the control queue.
pub struct ControlQueue {
    /// The queue's name, for messages.
    name: String,
    memory: GuestMemory,
    queue: ActiveQueue,
    /// `None` if the driver has not accepted `VIRTIO_NET_F_MQ`.
    steering: Option<Steering>,
    /// Waits for the order to stop alone: what the worker waits on between two commands.
    stop_only: WaitContext<Token>,
    /// Waits for that and for commands.
    wait_context: WaitContext<Token>,
}

impl ControlQueue {
    pub fn new(
        name: String,
        memory: GuestMemory,
        queue: ActiveQueue,
        steering: Option<Steering>,
        stop: &EventFd,
    ) -> io::Result<Self> {
        let stop_only = WaitContext::new()?;
        stop_only.add(stop, Token::Stop)?;
        let wait_context = WaitContext::new()?;
        wait_context.add(stop, Token::Stop)?;
        wait_context.add(&queue.notified, Token::ControlQueue)?;
        Ok(Self { name, memory, queue, steering, stop_only, wait_context })
    }

    /// Serves until the stop event is written or the guest breaks the queue.
    pub fn run(mut self) {
        loop {
            let waited = match self.serve_one() {
                Ok(true) => next_token(&self.stop_only, Some(COMMAND_INTERVAL)),
                Ok(false) => next_token(&self.wait_context, None),
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "the guest broke the queue, which stops");
                    return;
                }
            };
            match waited {
                Ok(Some(Token::Stop)) => return,
                // An error means that there was no notification after all.
                Ok(Some(Token::ControlQueue)) => drop(self.queue.notified.read()),
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for commands; the queue stops");
                    return;
                }
            }
        }
    }

    /// Serves one command. Returns false if there is none; the guest then notifies the queue of the next. An error
    /// means that the guest has broken the queue.
    fn serve_one(&mut self) -> Result<bool, virtio_queue::Error> {
        self.queue.queue.disable_notification(&self.memory)?;
        loop {
            if let Some(chain) = self.queue.pop(&self.memory)? {
                let head = chain.head_index();
                let command = read_command(&self.memory, chain.clone());
                let succeeded = execute(&self.name, self.steering.as_mut(), command);
                let length = acknowledge(&self.memory, chain, succeeded);
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

/// Waits for one event; `None` if `timeout` has passed without one.
fn next_token(wait_context: &WaitContext<Token>, timeout: Option<Duration>) -> io::Result<Option<Token>> {
    Ok(wait_context.wait::<1>(timeout)?.next().map(|event| event.token))
}

/// Reads what the driver has written. `None` if it is not as long as the only command, or lies outside memory.
fn read_command(memory: &GuestMemory, chain: Chain<'_>) -> Option<[u8; COMMAND_SIZE]> {
    let mut command = [0; COMMAND_SIZE];
    let mut free = &mut command[..];
    for descriptor in chain.readable() {
        let (now, later) = free.split_at_mut_checked(descriptor.len() as usize)?;
        memory.read_slice(now, descriptor.addr()).ok()?;
        free = later;
    }
    free.is_empty().then_some(command)
}

/// Executes a command. Returns whether that has succeeded.
fn execute(name: &str, steering: Option<&mut Steering>, command: Option<[u8; COMMAND_SIZE]>) -> bool {
    let (Some(steering), Some([CLASS_MQ, MQ_VQ_PAIRS_SET, low, high])) = (steering, command) else {
        tracing::debug!(device = name, ?command, "a command that the device does not know");
        return false;
    };
    let pairs = u16::from_le_bytes([low, high]);
    match steering.set(pairs) {
        Ok(()) => true,
        Err(error) => {
            // The other errors are the guest's own fault.
            if let SteeringError::Tap { source, .. } = &error {
                tracing::warn!(device = name, %error, %source, "the number of queue pairs stays as it is");
            } else {
                tracing::debug!(device = name, %error, "the number of queue pairs stays as it is");
            }
            false
        }
    }
}

/// Writes the command's result into the chain. Returns the number of bytes written: 0 if there is no room in memory.
fn acknowledge(memory: &GuestMemory, chain: Chain<'_>, succeeded: bool) -> u32 {
    let ack = if succeeded { ACK_OK } else { ACK_ERR };
    let target = chain.writable().find(|descriptor| descriptor.len() > 0);
    match target.map(|descriptor| memory.write_obj(ack, descriptor.addr())) {
        Some(Ok(())) => 1,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "control_queue_tests.rs"]
mod tests;
