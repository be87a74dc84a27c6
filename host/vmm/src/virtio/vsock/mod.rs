//! virtio-vsock (virtio 1.2, section 5.10) with unix sockets for the host's side, as in Firecracker. The host needs no
//! vhost module, and file permissions decide who may reach the guest.
//!
//! * A host program connects to [`VsockConfig::path`], sends `CONNECT <port>\n`, and receives `OK <host port>\n` once
//!   the guest has accepted the connection.
//! * When the guest connects to host port P, the device connects to `<path>_<P>`, if P is among
//!   [`VsockConfig::host_ports`].
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
    fs::Permissions,
    io,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::PathBuf,
};

use thiserror::Error;

pub use self::port_forward::PortForward;
use self::{mux::Mux, packet::GUEST_CID, worker::Worker};
use super::{
    ActivateError, Activation, ActiveQueue, Counter, Device, F_EVENT_IDX, RunningWorker, all_queues,
    device_type, read_config_bytes,
};
use crate::{config::VsockConfig, memory::GuestMemory};

/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// The device's sockets cannot be opened.
#[derive(Debug, Error)]
pub enum VsockError {
    #[error("cannot listen on the vsock socket {path}")]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the inherited listener of forwarded connections cannot be used")]
    PortForward(#[source] io::Error),
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
    /// Goes to the worker when the device is activated.
    listener: Option<UnixListener>,
    /// Goes to the worker when the device is activated.
    forward: Option<PortForward>,
    counters: Counters,
    worker: Option<RunningWorker>,
}

impl Vsock {
    /// Listens on the socket, which only its owner may connect to. A connection that is made before the guest is up
    /// waits.
    pub fn new(config: &VsockConfig, forward: Option<PortForward>) -> Result<Self, VsockError> {
        let error = |source| VsockError::Listen { path: config.path.clone(), source };
        let listener = UnixListener::bind(&config.path).map_err(error)?;
        std::fs::set_permissions(&config.path, Permissions::from_mode(0o600)).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        if let Some(forward) = &forward {
            forward.listener.set_nonblocking(true).map_err(VsockError::PortForward)?;
        }
        Ok(Self {
            config: config.clone(),
            listener: Some(listener),
            forward,
            counters: Counters::default(),
            worker: None,
        })
    }

    fn start(&mut self, memory: GuestMemory, queues: [ActiveQueue; 3]) -> io::Result<()> {
        let listener = self.listener.take().ok_or(io::ErrorKind::NotConnected)?;
        let forward = self.forward.take();
        let mux = Mux::new(self.config.clone(), listener, forward, self.counters.clone())?;
        let worker = super::start_worker("vsock", |stop| {
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
        self.start(activation.memory, queues).map_err(ActivateError::Worker)
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
