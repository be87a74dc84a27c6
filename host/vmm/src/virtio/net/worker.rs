//! The thread that serves one pair of queues.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::Arc,
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};

use super::{
    receive::{self, Receiver},
    tap::Tap,
    transmit::{self, Transmitter},
};

const TOKEN_RECEIVE: u64 = 1;
const TOKEN_TRANSMIT: u64 = 2;
const TOKEN_STOP: u64 = 3;
const TOKEN_TAP: u64 = 4;
/// Frames moved one way before the other way has its turn.
const BATCH: usize = 64;

pub struct Worker {
    /// For messages.
    name: String,
    epoll: Epoll,
    receiver: Receiver,
    transmitter: Transmitter,
    /// None once it is gone: the guest then receives nothing, and what it sends is dropped.
    tap: Option<Arc<Tap>>,
    /// The tap may have frames: none has been missed since it last said that it had none.
    readable: bool,
    /// The tap has not refused a frame since it last said that it takes some.
    writable: bool,
}

impl Worker {
    pub fn new(
        name: String,
        receiver: Receiver,
        transmitter: Transmitter,
        tap: Arc<Tap>,
        stop: &EventFd,
    ) -> io::Result<Worker> {
        let epoll = Epoll::new()?;
        let watched = [
            (&receiver.queue.notified, TOKEN_RECEIVE),
            (&transmitter.queue.notified, TOKEN_TRANSMIT),
            (stop, TOKEN_STOP),
        ];
        for (event, token) in watched {
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, token))?;
        }
        let worker =
            Worker { name, epoll, receiver, transmitter, tap: Some(tap), readable: true, writable: true };
        worker.watch_tap(ControlOperation::Add, EventSet::IN)?;
        Ok(worker)
    }

    /// The tap reports changes only (`EPOLLET`): frames that wait because the guest has no buffers for
    /// them do not wake this thread again and again.
    fn watch_tap(&self, operation: ControlOperation, events: EventSet) -> io::Result<()> {
        let Some(tap) = &self.tap else { return Ok(()) };
        let interest = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, TOKEN_TAP);
        self.epoll.ctl(operation, tap.as_fd().as_raw_fd(), interest)
    }

    /// Serves until it is told to stop or the guest breaks a queue.
    pub fn run(mut self) {
        let mut more = true;
        loop {
            match self.handle_events(if more { 0 } else { -1 }) {
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

    /// Waits for at most `patience` milliseconds (-1: for ever). Breaks when it is time to stop.
    fn handle_events(&mut self, patience: i32) -> io::Result<ControlFlow<()>> {
        let mut events = [EpollEvent::default(); 4];
        let count = match self.epoll.wait(patience, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                TOKEN_STOP => return Ok(ControlFlow::Break(())),
                // An error means that there was no notification after all.
                TOKEN_RECEIVE => drop(self.receiver.queue.notified.read()),
                TOKEN_TRANSMIT => drop(self.transmitter.queue.notified.read()),
                _ => self.tap_has_changed(event.event_set())?,
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn tap_has_changed(&mut self, events: EventSet) -> io::Result<()> {
        // An error or the end of the tap shows when it is read or written.
        let failed = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        self.readable |= failed || events.contains(EventSet::IN);
        if !self.writable && (failed || events.contains(EventSet::OUT)) {
            self.writable = true;
            self.watch_tap(ControlOperation::Modify, EventSet::IN)?;
        }
        Ok(())
    }

    /// Moves some frames both ways. Answers whether there may be more without another event.
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
            transmit::Stopped::Turn => Ok(true),
            transmit::Stopped::QueueEmpty => Ok(false),
            transmit::Stopped::TapFull => {
                self.writable = false;
                // Reports at once if the tap takes frames again by now.
                if let Err(error) = self.watch_tap(ControlOperation::Modify, EventSet::IN | EventSet::OUT) {
                    tracing::error!(device = self.name, %error, "cannot wait for the tap");
                    self.lose_tap();
                }
                Ok(self.writable)
            }
            transmit::Stopped::TapGone => {
                self.lose_tap();
                // What the guest has sent is now dropped.
                Ok(true)
            }
        }
    }

    fn receive(&mut self) -> Result<bool, virtio_queue::Error> {
        let Some(tap) = self.tap.as_deref().filter(|_| self.readable) else { return Ok(false) };
        let turn = tap.receive();
        let stopped = self.receiver.serve(tap, BATCH)?;
        drop(turn);
        match stopped {
            receive::Stopped::Turn => Ok(true),
            receive::Stopped::NoBuffers => Ok(false),
            receive::Stopped::TapEmpty => {
                self.readable = false;
                Ok(false)
            }
            receive::Stopped::TapGone => {
                self.lose_tap();
                // The guest's frames may wait for this tap.
                Ok(true)
            }
        }
    }

    fn lose_tap(&mut self) {
        tracing::warn!(
            device = self.name,
            "the tap is gone, and with it the guest's connection; the machine goes on without it"
        );
        // Closing it, now or once nobody changes its queues, ends the watch too.
        self.tap = None;
        self.writable = true;
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
