//! The thread that serves one pair of queues.

use std::{io, ops::ControlFlow, os::fd::AsFd as _, sync::Arc, time::Duration};

use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::{
    receive::{ReceiveOutcome, Receiver},
    tap::Tap,
    transmit::{TransmitOutcome, Transmitter},
};
use crate::{
    attack,
    thread_kind::ThreadKind,
    virtio::wait_context::{WaitContext, event_tokens},
};

/// Most frames moved one way before the other way has its turn.
const BATCH: usize = 64;
/// The tap reports changes only (`EPOLLET`): frames that wait because the guest has no buffers for them do not wake the
/// worker again and again.
const TAP_READABLE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);
const TAP_READABLE_OR_WRITABLE: EventSet = TAP_READABLE.union(EventSet::OUT);

event_tokens! {
    enum Token {
        /// The guest has notified the receive queue.
        ReceiveQueue,
        /// The guest has notified the transmit queue.
        TransmitQueue,
        /// The tap has frames, or takes them again.
        Tap,
        Stop,
    }
}

/// Serves a pair of queues.
pub struct Worker {
    /// The pair's name, for messages.
    name: String,
    wait_context: WaitContext<Token>,
    receiver: Receiver,
    transmitter: Transmitter,
    /// `None` once the tap is gone. The guest then receives nothing, and what it sends is dropped.
    tap: Option<Arc<Tap>>,
    /// Whether the tap may have frames.
    readable: bool,
    /// Whether the tap may take frames.
    writable: bool,
}

impl Worker {
    pub fn new(
        name: String,
        receiver: Receiver,
        transmitter: Transmitter,
        tap: Arc<Tap>,
        stop: &EventFd,
    ) -> io::Result<Self> {
        let wait_context = WaitContext::new()?;
        wait_context.add(&receiver.queue.notified, Token::ReceiveQueue)?;
        wait_context.add(&transmitter.queue.notified, Token::TransmitQueue)?;
        wait_context.add(stop, Token::Stop)?;
        wait_context.add_for(&tap.as_fd(), TAP_READABLE, Token::Tap)?;
        Ok(Self { name, wait_context, receiver, transmitter, tap: Some(tap), readable: true, writable: true })
    }

    /// Replaces the events of the tap that wake the worker.
    fn watch_tap(&self, events: EventSet) -> io::Result<()> {
        let Some(tap) = &self.tap else { return Ok(()) };
        self.wait_context.modify(&tap.as_fd(), events, Token::Tap)
    }

    /// Serves until the stop event is written or the guest breaks a queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            attack::reached(ThreadKind::Net);
            match self.handle_events(more.then_some(Duration::ZERO)) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for events; the pair stops");
                    return;
                }
            }
            more = match self.move_frames() {
                Ok(more) => more,
                Err(error) => {
                    tracing::warn!(device = self.name, %error, "the guest broke a queue; its pair stops");
                    return;
                }
            };
        }
    }

    /// Waits for events, at most for `timeout` (`None`: without a limit). Breaks when the worker is to stop.
    fn handle_events(&mut self, timeout: Option<Duration>) -> io::Result<ControlFlow<()>> {
        for event in self.wait_context.wait::<4>(timeout)? {
            match event.token {
                Token::Stop => return Ok(ControlFlow::Break(())),
                // An error means that there was no notification after all.
                Token::ReceiveQueue => drop(self.receiver.queue.notified.read()),
                Token::TransmitQueue => drop(self.transmitter.queue.notified.read()),
                Token::Tap => self.on_tap_event(event.readiness())?,
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn on_tap_event(&mut self, events: EventSet) -> io::Result<()> {
        // An error of the tap, or its end, is found when the tap is read or written.
        let failed = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        self.readable |= failed || events.contains(EventSet::IN);
        if !self.writable && (failed || events.contains(EventSet::OUT)) {
            self.writable = true;
            self.watch_tap(TAP_READABLE)?;
        }
        Ok(())
    }

    /// Moves some frames both ways. Returns whether there may be more without another event. An error means that the
    /// guest has broken a queue.
    fn move_frames(&mut self) -> Result<bool, virtio_queue::Error> {
        let more_from_guest = self.transmit()?;
        let more_to_guest = self.receive()?;
        Ok(more_from_guest || more_to_guest)
    }

    fn transmit(&mut self) -> Result<bool, virtio_queue::Error> {
        if !self.writable {
            return Ok(false);
        }
        match self.transmitter.serve(self.tap.as_deref(), BATCH)? {
            TransmitOutcome::BudgetSpent => Ok(true),
            TransmitOutcome::QueueEmpty => Ok(false),
            TransmitOutcome::TapFull => {
                self.writable = false;
                // If the tap takes frames again by now, epoll reports that at once.
                if let Err(error) = self.watch_tap(TAP_READABLE_OR_WRITABLE) {
                    tracing::error!(device = self.name, %error, "cannot wait for the tap");
                    self.give_up_tap();
                }
                Ok(self.writable)
            }
            TransmitOutcome::TapGone => {
                self.give_up_tap();
                // The frames that the guest has sent can now be dropped.
                Ok(true)
            }
        }
    }

    fn receive(&mut self) -> Result<bool, virtio_queue::Error> {
        let Some(tap) = self.tap.as_deref().filter(|_| self.readable) else { return Ok(false) };
        let receiving = tap.lock_receiving();
        let outcome = self.receiver.serve(tap, BATCH)?;
        drop(receiving);
        match outcome {
            ReceiveOutcome::BudgetSpent => Ok(true),
            ReceiveOutcome::NoBuffers => Ok(false),
            ReceiveOutcome::TapEmpty => {
                self.readable = false;
                Ok(false)
            }
            ReceiveOutcome::TapGone => {
                self.give_up_tap();
                // The guest's frames, which may wait for the tap, can now be dropped.
                Ok(true)
            }
        }
    }

    /// Goes on without the tap, which is gone.
    fn give_up_tap(&mut self) {
        tracing::warn!(
            device = self.name,
            "the tap is gone, and with it the guest's connection; the machine goes on without it"
        );
        // When it is closed, now or once the control queue's thread does not use it any more, epoll forgets it.
        self.tap = None;
        self.writable = true;
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
