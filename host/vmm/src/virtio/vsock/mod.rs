//! virtio-vsock (virtio 1.2, section 5.10) with unix sockets for the host's side, as in Firecracker. The host needs no
//! vhost module, and file permissions decide who may reach the guest. The device opens none of them itself
//! ([`VsockSockets`]).
//!
//! * A host program connects to the listener, sends `CONNECT <port>\n`, and receives `OK <host port>\n` once the guest
//!   has accepted the connection.
//! * The guest's first connection to [`VsockConfig::host_port`] is the stream that the machine has inherited. There
//!   is no
//!   second, and none to any other port.
//! * Connections to localhost in the pod's network namespace go to the guest's [`VsockConfig::forward_port`]:
//!   see [`port_forward`].
//!
//! One thread ([`worker`]) moves packets between the queues and the sockets. [`mux`] has all streams, without the
//! queues; [`connection`] is one stream and its flow control; [`connection_limits`] bounds their number.
//!
//! Trust: the guest is hostile. It chooses every field of its packets, may ignore the end of a connection, and may take
//! or send packets without end; the worker keeps no more for it than [`connection::BUF_ALLOC`] bytes for each
//! connection. Host programs are trusted to connect, but one that is slow delays no other.

mod connection;
mod connection_limits;
mod mux;
mod packet;
mod port_forward;
mod token;
mod worker;

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
};

use thiserror::Error;

pub use self::port_forward::PortForward;
use self::{mux::Mux, packet::GUEST_CID, worker::Worker};
use super::{
    ActivateError, Activation, ActiveQueue, Counter, Device, F_EVENT_IDX, RunningWorker, all_queues,
    device_type, read_config_bytes,
};
use crate::{config::VsockConfig, memory::GuestMemory, thread_kind::ThreadKind, threads::ThreadSpawner};

/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The device's sockets cannot be used.
#[derive(Debug, Error)]
#[error("the inherited {what} cannot be used")]
pub struct VsockError {
    what: &'static str,
    #[source]
    source: io::Error,
}

/// The host's side of the guest's vsock. Whoever starts the machine opens all of it.
#[derive(Debug)]
pub struct VsockSockets {
    /// Where host programs connect. A connection that is made before the guest is up waits.
    pub listener: UnixListener,
    /// What the guest's one connection to the host is connected with.
    pub host: Option<UnixStream>,
    /// Where connections to the pod's localhost arrive.
    pub forward: Option<PortForward>,
}

impl VsockSockets {
    /// The device's thread waits for none of them.
    fn set_nonblocking(&self) -> Result<(), VsockError> {
        let failed = |what| move |source| VsockError { what, source };
        self.listener.set_nonblocking(true).map_err(failed("listener of host programs"))?;
        if let Some(host) = &self.host {
            host.set_nonblocking(true).map_err(failed("stream to the host"))?;
        }
        if let Some(forward) = &self.forward {
            let set = forward.listener.set_nonblocking(true);
            set.map_err(failed("listener of forwarded connections"))?;
        }
        Ok(())
    }
}

/// Counted by the worker, read by the control service.
#[derive(Clone, Default)]
struct Counters {
    to_guest_packets: Counter,
    from_guest_packets: Counter,
    to_guest_bytes: Counter,
    from_guest_bytes: Counter,
    connections: Counter,
    resets: Counter,
}

/// The guest's vsock device.
pub struct Vsock {
    config: VsockConfig,
    /// Go to the worker when the device is activated.
    sockets: Option<VsockSockets>,
    counters: Counters,
    worker: Option<RunningWorker>,
}

impl Vsock {
    /// Makes the device of these sockets.
    pub fn new(config: VsockConfig, sockets: VsockSockets) -> Result<Self, VsockError> {
        sockets.set_nonblocking()?;
        Ok(Self { config, sockets: Some(sockets), counters: Counters::default(), worker: None })
    }

    fn start(
        &mut self,
        threads: &ThreadSpawner,
        memory: GuestMemory,
        queues: [ActiveQueue; 3],
    ) -> io::Result<()> {
        let sockets = self.sockets.take().ok_or(io::ErrorKind::NotConnected)?;
        let mux = Mux::new(self.config, sockets, self.counters.clone())?;
        let worker = super::start_worker(threads, ThreadKind::Vsock, "vsock", |stop| {
            let worker = Worker::new(memory, queues, mux, stop)?;
            Ok(move || worker.run())
        })?;
        self.worker = Some(worker);
        Ok(())
    }
}

impl Device for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn device_type(&self) -> u32 {
        device_type::VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = all_queues(activation.queues)?;
        self.start(&activation.threads, activation.memory, queues).map_err(ActivateError::Worker)
    }

    fn stop(&mut self) {
        super::stop_worker(self.worker.take());
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        let counters = &self.counters;
        vec![
            ("to_guest_packets", counters.to_guest_packets.clone()),
            ("from_guest_packets", counters.from_guest_packets.clone()),
            ("to_guest_bytes", counters.to_guest_bytes.clone()),
            ("from_guest_bytes", counters.from_guest_bytes.clone()),
            ("connections", counters.connections.clone()),
            ("resets", counters.resets.clone()),
        ]
    }
}
