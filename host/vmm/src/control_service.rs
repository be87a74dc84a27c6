//! The service on the control socket: what the controller can ask of a running machine (`protos/vmm.proto`).

use std::{
    os::{fd::IntoRawFd as _, unix::net::UnixListener},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use pericarp_protos::{
    ttrpc::{self, Code, Server, TtrpcContext},
    vmm_blocking::{
        BootTimes, DeviceCounters, Extent, InsertDiskRequest, InsertDiskResponse, Machine, RemoveDiskRequest,
        RemoveDiskResponse, ResizeRequest, ResizeResponse, ShutdownRequest, ShutdownResponse, StatusRequest,
        StatusResponse, WaitMemoryRequest, WaitMemoryResponse, create_machine,
    },
};

use crate::{
    attack,
    disks::{Disks, InsertError, NamedCounters, Removal},
    error::ExitReason,
    lock::unpoisoned,
    memory::{self, GuestMemory},
    memory_hotplug::{MemoryHotplug, MemoryRequestError},
    received_descriptors::ReceivedDescriptors,
    thread_kind::ThreadKind,
    vcpu::Vcpus,
    virtio::mem::WaitError,
};

/// Most calls that are served at the same time; others wait. The controller is the only client.
const THREADS: usize = 4;
/// Longest time that one call waits for the guest.
const GUEST_WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest time that one call waits for a disk's files to be closed. The controller waits for two seconds.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(1);

/// The service `Machine`.
pub struct ControlService {
    /// When each step of the machine's start was done.
    pub boot: BootTimes,
    pub vcpus: Mutex<Vcpus>,
    /// Number of vCPUs, as in `vcpus`: reading it does not wait for a resize.
    pub vcpu_count: AtomicU8,
    pub memory: GuestMemory,
    /// Name and counters of each device that the machine was started with. Reading them needs no lock, so that a device
    /// which the guest keeps busy cannot delay a response.
    pub counters: Vec<NamedCounters>,
    pub disks: Disks,
    /// The files of disks that are to be inserted.
    pub descriptors: ReceivedDescriptors,
    pub memory_hotplug: MemoryHotplug,
    /// Takes the reason for the machine's end, when it is to shut down.
    pub exit_reasons: Sender<ExitReason>,
}

impl ControlService {
    fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        unpoisoned(self.vcpus.lock())
    }

    /// Serves on a socket that is already listening, on threads that the calling thread starts.
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

impl Machine for ControlService {
    fn status(&self, _context: &TtrpcContext, _request: StatusRequest) -> ttrpc::Result<StatusResponse> {
        attack::allow();
        attack::reached(ThreadKind::Control);
        let devices =
            self.counters.iter().cloned().chain(self.disks.counters()).map(device_counters).collect();
        Ok(StatusResponse {
            boot: Some(self.boot.clone()).into(),
            vcpus: u32::from(self.vcpu_count.load(Ordering::Relaxed)),
            memory_bytes: self.memory_hotplug.bytes(),
            requested_memory_bytes: self.memory_hotplug.requested_bytes(),
            resident_bytes: memory::resident_bytes(&self.memory),
            devices,
            disks: self.disks.devices(),
            ..Default::default()
        })
    }

    fn shutdown(
        &self,
        _context: &TtrpcContext,
        _request: ShutdownRequest,
    ) -> ttrpc::Result<ShutdownResponse> {
        // There is no receiver any more only if the machine is ending already.
        let _ = self.exit_reasons.send(ExitReason::Shutdown);
        Ok(ShutdownResponse::default())
    }

    fn insert_disk(
        &self,
        _context: &TtrpcContext,
        request: InsertDiskRequest,
    ) -> ttrpc::Result<InsertDiskResponse> {
        let files = self.descriptors.remove(request.ticket).ok_or_else(|| {
            let message = format!("no files have arrived under ticket {}", request.ticket);
            status(Code::FAILED_PRECONDITION, message)
        })?;
        let (device, extents) = self
            .disks
            .insert(files, request.read_only, &request.serial)
            .map_err(|error| status(insert_code(&error), error.to_string()))?;
        let extents = extents
            .into_iter()
            .map(|extent| Extent { offset: extent.offset, length: extent.length, ..Default::default() })
            .collect();
        Ok(InsertDiskResponse { device, extents, ..Default::default() })
    }

    fn remove_disk(
        &self,
        _context: &TtrpcContext,
        request: RemoveDiskRequest,
    ) -> ttrpc::Result<RemoveDiskResponse> {
        let slot = request.device;
        match self.disks.remove(slot, CLOSE_WAIT_MAX) {
            Removal::Closed => Ok(RemoveDiskResponse::default()),
            Removal::NoDisk => Err(status(Code::NOT_FOUND, format!("there is no disk in slot {slot}"))),
            Removal::StillOpen => {
                let message = format!("the disk in slot {slot} is still being closed; ask again");
                Err(status(Code::UNAVAILABLE, message))
            }
        }
    }

    fn resize(&self, _context: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<ResizeResponse> {
        let mut vcpus = self.vcpus();
        let max = u32::from(vcpus.max());
        let count = u8::try_from(request.vcpus).ok().filter(|count| *count <= vcpus.max());
        let Some(count) = count else {
            let message = format!("{} vCPUs are asked for; this machine can have {max}", request.vcpus);
            return Err(status(Code::OUT_OF_RANGE, message));
        };
        let bytes = request.memory_bytes;
        let memory_device = if bytes == 0 { Ok(None) } else { self.memory_hotplug.request(bytes) }
            .map_err(|error| status(memory_code(&error), error.to_string()))?;
        let grown = vcpus.grow_to(count);
        self.vcpu_count.store(vcpus.count, Ordering::Relaxed);
        grown.map_err(|error| status(Code::INTERNAL, error.to_string()))?;
        Ok(ResizeResponse {
            vcpus: u32::from(vcpus.count),
            memory_device,
            memory_bytes: self.memory_hotplug.requested_bytes(),
            ..Default::default()
        })
    }

    fn wait_memory(
        &self,
        _context: &TtrpcContext,
        request: WaitMemoryRequest,
    ) -> ttrpc::Result<WaitMemoryResponse> {
        let limit = Duration::from_millis(u64::from(request.limit_ms)).min(GUEST_WAIT_MAX);
        // A machine that cannot be given more memory has what is requested of it.
        let plugged = self.memory_hotplug.state().map_or(Ok(0), |state| state.wait_for_request(limit));
        match plugged {
            Ok(bytes) => Ok(WaitMemoryResponse {
                memory_bytes: self.memory_hotplug.boot_bytes() + bytes,
                ..Default::default()
            }),
            Err(WaitError::TimedOut { plugged_bytes: bytes }) => {
                let (has, wanted) =
                    (self.memory_hotplug.boot_bytes() + bytes, self.memory_hotplug.requested_bytes());
                let message = format!("the guest has {has} bytes of memory; {wanted} are asked for");
                Err(status(Code::DEADLINE_EXCEEDED, message))
            }
            Err(WaitError::Superseded) => {
                Err(status(Code::ABORTED, "another size has been asked for meanwhile".to_owned()))
            }
        }
    }
}

fn memory_code(error: &MemoryRequestError) -> Code {
    match error {
        MemoryRequestError::Range { .. } => Code::OUT_OF_RANGE,
        MemoryRequestError::Slot(_) => Code::INTERNAL,
    }
}

fn device_counters((device, counters): NamedCounters) -> DeviceCounters {
    let counters = counters.iter().map(|(name, counter)| ((*name).to_owned(), counter.get())).collect();
    DeviceCounters { device, counters, ..Default::default() }
}

fn insert_code(error: &InsertError) -> Code {
    match error {
        InsertError::NoSlot(_) => Code::RESOURCE_EXHAUSTED,
        InsertError::Slot(_) => Code::INTERNAL,
        InsertError::Disk(_) => Code::INVALID_ARGUMENT,
    }
}

fn status(code: Code, message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}
