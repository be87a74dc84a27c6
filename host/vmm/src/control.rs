//! The control socket: what the controller can ask of a running machine (`protos/vmm.proto`).

use std::{
    io,
    os::{fd::IntoRawFd as _, unix::net::UnixListener},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    ExitReason,
    disks::{Disks, InsertError, NamedCounters, Removal},
    extra_memory::{ExtraMemory, MemoryRequestError},
    memory::{self, GuestMemory},
    vcpu::Vcpus,
    virtio::{blk::DiskError, mem::Unfinished},
};

/// Calls at the same time; more wait. The controller is the only client.
const THREADS: usize = 4;
/// Longest that one call waits for the guest.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest that one call waits for a disk's files to be closed; the controller waits for two seconds.
const CLOSE_MAX: Duration = Duration::from_secs(1);

/// What the service answers from.
pub struct Control {
    /// When each step of the start was done.
    pub boot: BootTimes,
    /// What runs the guest.
    pub vcpus: Mutex<Vcpus>,
    /// How many there are. Asking does not wait for a resize.
    pub vcpu_count: AtomicU8,
    /// For the resident size.
    pub memory: GuestMemory,
    /// Name and counters of each device that stays. Reading them needs no lock, so that a device which
    /// the guest keeps busy cannot hold up an answer.
    pub counters: Vec<NamedCounters>,
    /// Those that come and go.
    pub disks: Disks,
    /// What the guest can plug.
    pub extra_memory: ExtraMemory,
    /// Where a shutdown request goes.
    pub ended: Sender<ExitReason>,
}

impl Control {
    fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

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
        let devices =
            self.counters.iter().cloned().chain(self.disks.counters()).map(device_counters).collect();
        Ok(StatusResponse {
            boot: Some(self.boot.clone()).into(),
            vcpus: u32::from(self.vcpu_count.load(Ordering::Relaxed)),
            memory_bytes: self.extra_memory.bytes(),
            requested_memory_bytes: self.extra_memory.requested(),
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

    fn insert_disk(
        &self,
        _context: &TtrpcContext,
        request: InsertDiskRequest,
    ) -> ttrpc::Result<InsertDiskResponse> {
        let paths: Vec<_> = request.segments.into_iter().map(|segment| PathBuf::from(segment.path)).collect();
        let (device, extents) = self
            .disks
            .insert(&paths, request.read_only, &request.serial)
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
        match self.disks.remove(slot, CLOSE_MAX) {
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
        let memory_device = if bytes == 0 { Ok(None) } else { self.extra_memory.request(bytes) }
            .map_err(|error| status(memory_code(&error), error.to_string()))?;
        let grown = vcpus.grow_to(count);
        self.vcpu_count.store(vcpus.count, Ordering::Relaxed);
        grown.map_err(|error| status(Code::INTERNAL, error.to_string()))?;
        Ok(ResizeResponse {
            vcpus: u32::from(vcpus.count),
            memory_device,
            memory_bytes: self.extra_memory.requested(),
            ..Default::default()
        })
    }

    fn wait_memory(
        &self,
        _context: &TtrpcContext,
        request: WaitMemoryRequest,
    ) -> ttrpc::Result<WaitMemoryResponse> {
        let limit = Duration::from_millis(u64::from(request.limit_ms)).min(WAIT_MAX);
        let plugged = self.extra_memory.plugged().map_or(Ok(0), |plugged| plugged.wait(limit));
        match plugged {
            Ok(bytes) => Ok(WaitMemoryResponse {
                memory_bytes: self.extra_memory.boot() + bytes,
                ..Default::default()
            }),
            Err(Unfinished::TimeUp(bytes)) => {
                let (has, wanted) = (self.extra_memory.boot() + bytes, self.extra_memory.requested());
                let message = format!("the guest has {has} bytes of memory; {wanted} are asked for");
                Err(status(Code::DEADLINE_EXCEEDED, message))
            }
            Err(Unfinished::Superseded) => {
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
        InsertError::Disk(DiskError::Open { source, .. }) => match source.kind() {
            io::ErrorKind::NotFound => Code::NOT_FOUND,
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::PERMISSION_DENIED,
            _ => Code::INVALID_ARGUMENT,
        },
        InsertError::Disk(_) => Code::INVALID_ARGUMENT,
    }
}

fn status(code: Code, message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
}
