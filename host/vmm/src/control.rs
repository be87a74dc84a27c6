//! The control socket: what the controller can ask of a running machine (`protos/vmm.proto`).

use std::{
    os::{fd::IntoRawFd as _, unix::net::UnixListener},
    sync::{Arc, mpsc::Sender},
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
    memory::{self, GuestMemory},
    virtio::Counter,
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
    /// Each device's name and counters. Reading them needs no lock, so that a device which the guest
    /// keeps busy cannot hold up an answer.
    pub counters: Vec<(String, Vec<(&'static str, Counter)>)>,
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
            .counters
            .iter()
            .map(|(device, counters)| DeviceCounters {
                device: device.clone(),
                counters: counters
                    .iter()
                    .map(|(name, counter)| ((*name).to_owned(), counter.get()))
                    .collect(),
                ..Default::default()
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

    fn shutdown(
        &self,
        _context: &TtrpcContext,
        _request: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        // The receiver is gone only when the machine is ending already.
        let _ = self.ended.send(ExitReason::Shutdown);
        Ok(ShutdownResponse::default())
    }
}
