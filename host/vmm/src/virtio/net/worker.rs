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
    virtio::{
        throttle::NextTurn,
        wait_context::{WaitContext, event_tokens},
    },
};

/// Most frames moved one way before the other way has its turn.
const BATCH: usize = 64;
/// The tap reports changes only (`EPOLLET`): frames that wait because the guest has no buffers for them do not wake the
/// worker again and again.
const TAP_READABLE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

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
    /// When frames are to be moved from the guest again.
    transmit_turn: NextTurn,
    /// When frames are to be moved to the guest again.
    receive_turn: NextTurn,
    /// Whether the tap wakes the worker when it has frames. It does not while the rate limit holds them back.
    woken_by_frames: bool,
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
        Ok(Self {
            name,
            wait_context,
            receiver,
            transmitter,
            tap: Some(tap),
            readable: true,
            writable: true,
            transmit_turn: NextTurn::Now,
            receive_turn: NextTurn::Now,
            woken_by_frames: true,
        })
    }

    /// Has the tap wake the worker when it takes frames, if it does not now, and when it has frames that may be moved.
    /// If it does or has by now, epoll reports that at once. A tap that cannot be waited for is given up.
    fn watch_tap(&mut self) {
        let Some(tap) = &self.tap else { return };
        let mut events = EventSet::EDGE_TRIGGERED;
        events.set(EventSet::IN, self.woken_by_frames);
        events.set(EventSet::OUT, !self.writable);
        if let Err(error) = self.wait_context.modify(&tap.as_fd(), events, Token::Tap) {
            tracing::error!(device = self.name, %error, "cannot wait for the tap");
            self.give_up_tap();
        }
    }

    /// Serves until the stop event is written or the guest breaks a queue.
    pub fn run(mut self) {
        let mut turn = NextTurn::Now;
        loop {
            attack::reached(ThreadKind::Net);
            match self.handle_events(turn.timeout()) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    tracing::error!(device = self.name, %error, "cannot wait for events; the pair stops");
                    return;
                }
            }
            turn = match self.move_frames() {
                Ok(turn) => turn,
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
                Token::Tap => self.on_tap_event(event.readiness()),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn on_tap_event(&mut self, events: EventSet) {
        // An error of the tap, or its end, is found when the tap is read or written.
        let failed = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        self.readable |= failed || events.contains(EventSet::IN);
        if !self.writable && (failed || events.contains(EventSet::OUT)) {
            self.writable = true;
            self.watch_tap();
        }
    }

    /// Moves some frames both ways. Returns when to move the next ones. An error means that the guest has broken a
    /// queue.
    fn move_frames(&mut self) -> Result<NextTurn, virtio_queue::Error> {
        if !self.transmit_turn.has_to_wait() {
            self.transmit_turn = self.transmit()?;
        }
        if !self.receive_turn.has_to_wait() {
            self.receive_turn = self.receive()?;
            let has_to_wait = matches!(self.receive_turn, NextTurn::NotBefore(_));
            if self.woken_by_frames == has_to_wait {
                self.woken_by_frames = !has_to_wait;
                self.watch_tap();
            }
        }
        Ok(self.transmit_turn.or(self.receive_turn))
    }

    fn transmit(&mut self) -> Result<NextTurn, virtio_queue::Error> {
        if !self.writable {
            return Ok(NextTurn::OnEvent);
        }
        match self.transmitter.serve(self.tap.as_deref(), BATCH)? {
            TransmitOutcome::BudgetSpent => Ok(NextTurn::Now),
            TransmitOutcome::QueueEmpty => Ok(NextTurn::OnEvent),
            TransmitOutcome::Throttled(not_before) => Ok(NextTurn::NotBefore(not_before)),
            TransmitOutcome::TapFull => {
                self.writable = false;
                self.watch_tap();
                Ok(if self.writable { NextTurn::Now } else { NextTurn::OnEvent })
            }
            TransmitOutcome::TapGone => {
                self.give_up_tap();
                // The frames that the guest has sent can now be dropped.
                Ok(NextTurn::Now)
            }
        }
    }

    fn receive(&mut self) -> Result<NextTurn, virtio_queue::Error> {
        let Some(tap) = self.tap.as_deref().filter(|_| self.readable) else { return Ok(NextTurn::OnEvent) };
        let receiving = tap.lock_receiving();
        let outcome = self.receiver.serve(tap, BATCH)?;
        drop(receiving);
        match outcome {
            ReceiveOutcome::BudgetSpent => Ok(NextTurn::Now),
            ReceiveOutcome::NoBuffers => Ok(NextTurn::OnEvent),
            ReceiveOutcome::Throttled(not_before) => Ok(NextTurn::NotBefore(not_before)),
            ReceiveOutcome::TapEmpty => {
                self.readable = false;
                Ok(NextTurn::OnEvent)
            }
            ReceiveOutcome::TapGone => {
                self.give_up_tap();
                Ok(NextTurn::Now)
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
        // The guest's frames, which may wait for the tap, can now be dropped.
        self.transmit_turn = NextTurn::Now;
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
