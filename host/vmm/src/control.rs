//! The control socket: what the controller can ask of a running machine (`protos/vmm.proto`).

use std::{
    collections::HashMap,
    os::{fd::IntoRawFd as _, unix::net::UnixListener},
    sync::{Arc, PoisonError, mpsc::Sender},
};

use pericarp_protos::{
    ttrpc::{self, Server, TtrpcContext},
    vmm_blocking::{
        BootTimes, DeviceCounters, Machine, ShutdownRequest, ShutdownResponse, StatusRequest, StatusResponse,
        create_machine,
    },
};

use crate::{
    ExitReason,
    bus::Bus,
    memory::{self, GuestMemory},
};

/// Calls at the same time; more wait. The controller is the only client.
const THREADS: usize = 3;

/// What the service answers from.
pub struct Control {
    /// When each step of the start was done.
    pub boot: BootTimes,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// For the resident size.
    pub memory: GuestMemory,
    /// For the devices' counters.
    pub bus: Arc<Bus>,
    /// Where a shutdown request goes.
    pub ended: Sender<ExitReason>,
}

impl Control {
    /// Serves on a socket that is already listening. The server lives as long as the answer.
    pub fn serve(self, listener: UnixListener) -> ttrpc::Result<Server> {
        let mut server = Server::new()
            .set_thread_count_default(2)
            .set_thread_count_min(1)
            .set_thread_count_max(THREADS)
            .add_listener(listener.into_raw_fd())?
            .register_service(create_machine(Arc::new(self)));
        server.start()?;
        Ok(server)
    }
}

impl Machine for Control {
    fn status(&self, _context: &TtrpcContext, _request: StatusRequest) -> ttrpc::Result<StatusResponse> {
        let devices = self
            .bus
            .mmio
            .iter()
            .map(|device| {
                let device = device.lock().unwrap_or_else(PoisonError::into_inner);
                let counters: HashMap<_, _> =
                    device.device().counters().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
                DeviceCounters { device: device.device().name().to_owned(), counters, ..Default::default() }
            })
            .collect();
        Ok(StatusResponse {
            boot: Some(self.boot.clone()).into(),
            vcpus: u32::from(self.vcpus),
            memory_bytes: memory::total_bytes(&self.memory),
            resident_bytes: memory::resident_bytes(&self.memory),
            devices,
            ..Default::default()
        })
    }

    fn shutdown(&self, _context: &TtrpcContext, _request: ShutdownRequest) -> ttrpc::Result<ShutdownResponse> {
        // The receiver is gone only when the machine is ending already.
        let _ = self.ended.send(ExitReason::Shutdown);
        Ok(ShutdownResponse::default())
    }
}
