//! Builds a machine from its configuration, starts it and waits for its end.

use std::{
    fmt::Write as _,
    fs::File,
    io,
    os::{
        fd::{FromRawFd as _, IntoRawFd as _, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicU8, mpsc},
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pericarp_jail::{Access, open_sealed};
use pericarp_protos::{ttrpc::Server, vmm_blocking::BootTimes};
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::current::{
        self as arch, boot,
        layout::{self, DEVICE_SIZE, DEVICES, FIRST_IRQ, SERIAL_IRQ},
        registers,
    },
    attack,
    bus::{Bus, VmExitCounters},
    config::MachineConfig,
    console::{self, Console},
    control_service::ControlService,
    disks::{Disks, NamedCounters},
    error::{Error, ExitReason, refused},
    lock::unpoisoned,
    memory::{self, GuestMemory},
    memory_hotplug::{HotplugRegion, MemoryHotplug},
    received_descriptors::ReceivedDescriptors,
    signals::end_on_sigterm,
    slot_plan::SlotPlan,
    thread_kind::ThreadKind,
    threads::{ThreadSpawner, renounce_privileges},
    vcpu::{VcpuFactory, Vcpus},
    virtio::{
        Device,
        device_slot::{DeviceEventRegistrar, DeviceSlot},
        fs::{self, Fs},
        net::Net,
        register_page::{self, RegisterPage},
        rng::Rng,
        vsock::{Vsock, VsockSockets},
    },
};

/// What whoever starts a machine has opened for it.
#[derive(Debug)]
pub struct InheritedDescriptors {
    /// A listening socket on which [`Machine`](pericarp_protos::vmm_blocking::Machine) is served once the vCPUs run.
    pub control: UnixListener,
    /// A listening socket on which files of disks arrive ([`pericarp_protos::descriptors`]).
    pub descriptors: OwnedFd,
    /// What the guest's vsock device is connected with.
    pub vsock: VsockSockets,
    /// The user namespace that the process enters ([`pericarp_jail::make_user_namespace`]). Without one, its
    /// capabilities are those on the host.
    pub user_namespace: Option<OwnedFd>,
}

/// Starts a machine and waits for its end.
///
/// `process_start_ns` is when the process began, in nanoseconds on `CLOCK_MONOTONIC`.
///
/// From now on, a panic on any thread aborts the process. The process should exit soon after this returns: vCPU threads
/// may still be running.
pub fn run(
    config: &MachineConfig,
    inherited: InheritedDescriptors,
    process_start_ns: u64,
) -> Result<ExitReason, Error> {
    prepare_process()?;
    end_on_sigterm().map_err(|source| Error::Io { what: "process end when it is asked to", source })?;
    let kvm = open_kvm()?;
    check_size(config, &kvm)?;
    let console_log = console::open_log(&config.console)
        .map_err(|source| Error::Console { path: config.console.path.clone(), source })?;
    let images = boot::Images::open(&config.kernel, &config.initramfs)?;
    let nets = (0..)
        .zip(&config.nets)
        .map(|(index, net)| Net::new(index, net, &config.rate_limits))
        .collect::<Result<Vec<_>, _>>()?;
    fs::raise_file_limit();
    // Everything of the host's is open. There is no other thread yet, not even one of the kernel's.
    let descriptors = leave_host_files(config)?;
    if let Some(namespace) = inherited.user_namespace {
        pericarp_jail::enter_user_namespace(&namespace)
            .map_err(|source| Error::Io { what: "capabilities worthless on the host", source })?;
    }
    let hotplug_region = HotplugRegion::new(config);
    let slot_plan = SlotPlan::new(config, hotplug_region.is_some())?;
    let vm = Arc::new(kvm.create_vm().map_err(refused("create a virtual machine"))?);
    arch::set_up_vm(&vm).map_err(refused("give the machine interrupt controllers"))?;
    let boot_bytes = config.boot_memory_bytes();
    let boot_memory = memory::allocate(&layout::memory_ranges(boot_bytes))?;
    let memory = match hotplug_region {
        Some(HotplugRegion { start, size, .. }) => memory::extend(&boot_memory, (start, size))?,
        None => boot_memory.clone(),
    };
    register_memory(&vm, &memory)?;
    let factory = VcpuFactory::new(&kvm, vm.clone(), config.vcpus_max(), config.nested_virtualization)?;
    let vcpus = (0..config.vcpus).map(|id| factory.create(id)).collect::<Result<Vec<_>, _>>()?;
    let devices = make_boot_devices(config, inherited.vsock, descriptors, nets)?;
    let device_counters = device_counters(&devices);
    renounce_privileges()
        .map_err(|source| Error::Io { what: "process unable to gain privileges", source })?;
    let threads = ThreadSpawner::start()
        .map_err(|source| Error::Io { what: "the thread that starts others", source })?;
    let console = Console::new(console_log, &config.rate_limits.console, interrupt_line(&vm, SERIAL_IRQ)?);
    let bus = Arc::new(make_bus(console, &slot_plan, &vm, &memory, &threads, devices)?);
    let kvm_ready_ns = monotonic_ns();

    let cmdline = cmdline(config, &slot_plan);
    let entry = boot::load(&boot_memory, images, &cmdline, config.vcpus_max())?;
    let Some(boot_vcpu) = vcpus.first() else { unreachable!("check_size refuses a machine without vCPUs") };
    registers::enter_kernel(boot_vcpu, entry)?;
    let kernel_loaded_ns = monotonic_ns();

    // Everything is open. From here on, this thread needs nothing of the host but the other threads.
    ThreadKind::Main.restrict()?;
    let (exit_reasons, received_reasons) = mpsc::channel();
    let vcpus_started_ns = monotonic_ns();
    let mut running = Vcpus {
        factory,
        bus: bus.clone(),
        threads: threads.clone(),
        exit_reasons: exit_reasons.clone(),
        count: 0,
    };
    for vcpu in vcpus {
        running.run(vcpu)?;
    }
    let boot = BootTimes {
        process_start_ns,
        kvm_ready_ns,
        kernel_loaded_ns,
        vcpus_started_ns,
        ..BootTimes::default()
    };
    tracing::debug!(
        kvm_ms = elapsed_ms(process_start_ns, kvm_ready_ns),
        kernel_ms = elapsed_ms(kvm_ready_ns, kernel_loaded_ns),
        vcpus_ms = elapsed_ms(kernel_loaded_ns, vcpus_started_ns),
        "the vCPUs run"
    );
    let service = ControlService {
        boot,
        vcpu_count: AtomicU8::new(running.count),
        vcpus: Mutex::new(running),
        memory,
        counters: [device_counters, vec![console_counters(&bus), vm_exit_counters(&bus)]].concat(),
        memory_hotplug: match hotplug_region.as_ref().zip(slot_plan.memory_hotplug) {
            Some((region, slot)) => MemoryHotplug::new(boot_bytes, region, bus.clone(), slot),
            None => MemoryHotplug::disabled(boot_bytes),
        },
        disks: Disks::new(bus, threads.clone(), slot_plan.disks, config.rate_limits.disk),
        descriptors: ReceivedDescriptors::receive_from(inherited.descriptors, &threads)
            .map_err(|source| Error::Io { what: "the thread that takes descriptors", source })?,
        exit_reasons,
    };
    let _server = serve(service, inherited.control, &threads)?;
    let Ok(reason) = received_reasons.recv() else { unreachable!("the control service holds a sender") };
    Ok(reason)
}

/// Serves the controller's calls. The library starts threads for that itself, which inherit what the thread may do that
/// starts the first of them.
fn serve(service: ControlService, listener: UnixListener, threads: &ThreadSpawner) -> Result<Server, Error> {
    let failed = |source| Error::Io { what: "the thread that serves the control socket", source };
    let (started, is_started) = mpsc::sync_channel(1);
    let start = move || {
        // The other end waits for it.
        let _ = started.send(service.serve(listener));
    };
    threads.spawn(ThreadKind::Control, "control", start).map_err(failed)?;
    is_started.recv().map_err(|error| failed(io::Error::other(error)))?.map_err(Error::Control)
}

/// Makes all threads get their memory from glibc's first arena. For others, glibc opens files the first time that a
/// thread makes one or gives back some of its memory (`arena_get2`, `check_may_shrink_heap`), which most threads may
/// not. A machine's threads allocate little while they serve a guest.
fn allocate_from_one_arena() -> Result<(), Error> {
    // SAFETY: it sets a parameter of the allocator, before there are other threads.
    match unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } {
        0 => Err(Error::Io { what: "allocator use one arena", source: io::ErrorKind::Unsupported.into() }),
        _ => Ok(()),
    }
}

/// Sets what holds for all threads, before there are others.
pub(crate) fn prepare_process() -> Result<(), Error> {
    attack::prepare();
    abort_on_panic();
    allocate_from_one_arena()
}

/// KVM's device.
const KVM: &str = "/dev/kvm";

/// Opens KVM's device, which is the whole host's.
fn open_kvm() -> Result<Kvm, Error> {
    let file = open_sealed(Path::new(KVM), Access::ReadAndWrite, 0).map_err(Error::OpenKvm)?;
    // SAFETY: it is KVM's device, and nothing else has this descriptor.
    Ok(unsafe { Kvm::from_raw_fd(file.into_raw_fd()) })
}

/// Makes a panic on any thread end the process: it must not leave half a machine running.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Checks the sizes that the configuration asks for against what this host and the crate can do.
fn check_size(config: &MachineConfig, kvm: &Kvm) -> Result<(), Error> {
    // APIC ids have eight bits. One id is the IOAPIC's, and one addresses all APICs.
    let max = kvm.get_max_vcpus().min(254);
    if config.vcpus == 0 || usize::from(config.vcpus_max()) > max {
        return Err(Error::Vcpus { vcpus: config.vcpus_max(), max });
    }
    let max = MachineConfig::DISK_SLOTS_MAX;
    if config.disk_slots > max {
        return Err(Error::DiskSlots { slots: config.disk_slots, max });
    }
    if config.memory_mib < MachineConfig::MEMORY_MIB_MIN {
        return Err(Error::TooLittleMemory { mib: config.memory_mib });
    }
    Ok(())
}

/// KVM's first memory slot for the devices' register pages. The slots before it are the guest's memory's: below the
/// device gap, above it, and the region in which memory is plugged.
const REGISTER_PAGES_MEMORY_SLOT: u32 = 3;

/// Gives `vm` its memory, which must stay mapped for as long as a vCPU runs.
pub(crate) fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    register_regions(vm, memory, 0, 0)
}

fn register_regions(
    vm: &VmFd,
    memory: &GuestMemory,
    first_memory_slot: u32,
    flags: u32,
) -> Result<(), Error> {
    for (slot, region) in (first_memory_slot..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping that stays while a vCPU runs, and no two overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("take the guest's memory"))?;
    }
    Ok(())
}

/// Moves this process where there are no files of the host's except those that it has open, unless it is to share a
/// directory of the host's. Returns `/proc/self/fd`, which has no name there.
fn leave_host_files(config: &MachineConfig) -> Result<Option<File>, Error> {
    if config.share.as_ref().is_some_and(|share| share.directory.is_some()) {
        return Ok(None);
    }
    let descriptors = pericarp_jail::enter();
    descriptors.map(Some).map_err(|source| Error::Io { what: "root of its own", source })
}

/// The devices that the machine starts with, in the order of their slots.
fn make_boot_devices(
    config: &MachineConfig,
    vsock: VsockSockets,
    descriptors: Option<File>,
    nets: Vec<Net>,
) -> Result<Vec<Box<dyn Device>>, Error> {
    let mut devices: Vec<Box<dyn Device>> =
        vec![Box::new(Vsock::new(config.vsock, vsock)?), Box::new(Rng::default())];
    if let Some(share) = &config.share {
        devices.push(Box::new(Fs::new(share, &config.rate_limits.fs, descriptors)?));
    }
    for net in nets {
        devices.push(Box::new(net));
    }
    Ok(devices)
}

/// Connects the console and the devices to the machine. The slots without a device stay empty for now.
fn make_bus(
    console: Console,
    slot_plan: &SlotPlan,
    vm: &Arc<VmFd>,
    memory: &GuestMemory,
    threads: &ThreadSpawner,
    devices: Vec<Box<dyn Device>>,
) -> Result<Bus, Error> {
    assert_eq!(devices.len(), slot_plan.boot_devices.len(), "the slot plan counts other devices");
    // Each slot keeps the mapping of its page.
    let pages = register_page::allocate(slot_plan.all().len())?;
    register_regions(vm, &pages, REGISTER_PAGES_MEMORY_SLOT, KVM_MEM_READONLY)?;
    let mut slots: Vec<DeviceSlot> = slot_plan
        .all()
        .map(|index| {
            let registrar: Arc<dyn DeviceEventRegistrar> = vm.clone();
            let page = RegisterPage::new(pages.clone(), index);
            DeviceSlot::new(index, page, memory.clone(), threads.clone(), registrar)
        })
        .collect();
    for (slot, device) in slots.iter_mut().zip(devices) {
        slot.insert(device)?;
    }
    Ok(Bus {
        slots: slots.into_iter().map(Mutex::new).collect(),
        console: Mutex::new(console),
        exits: VmExitCounters::default(),
    })
}

/// Makes an eventfd that raises an interrupt of the guest.
fn interrupt_line(vm: &VmFd, irq: u32) -> Result<EventFd, Error> {
    let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| Error::Io { what: "eventfds", source })?;
    vm.register_irqfd(&irqfd, irq).map_err(refused("take a device's interrupt"))?;
    Ok(irqfd)
}

fn device_counters(devices: &[Box<dyn Device>]) -> Vec<NamedCounters> {
    devices.iter().map(|device| (device.name().to_owned(), device.counters())).collect()
}

fn console_counters(bus: &Bus) -> NamedCounters {
    ("console".to_owned(), unpoisoned(bus.console.lock()).counters())
}

fn vm_exit_counters(bus: &Bus) -> NamedCounters {
    ("vcpus".to_owned(), vec![("mmio_exits", bus.exits.mmio.clone()), ("port_exits", bus.exits.port.clone())])
}

/// The kernel's command line: the parameters of every guest, the devices' slots, and what the configuration adds.
fn cmdline(config: &MachineConfig, slot_plan: &SlotPlan) -> String {
    // quiet, 8250.nr_uarts=1: each character and each probed port costs an exit from the guest.
    // reboot=k: the guest resets itself through the keyboard controller, which the bus understands.
    // panic=-1: a guest that panics ends at once, and its pod with it.
    // oops=panic: so does one whose kernel has found a fault of its own. It would go on with a process that never ends,
    // and whoever waits for that process would wait for ever.
    // no_timer_check, tsc=reliable: there is no timer chip to check against; the TSC is KVM's.
    // rcupdate.rcu_expedited=1: nothing in a small guest gains from lazy grace periods.
    // dummy.numdummies=0: a pod's first interface should not be a dummy.
    // random.trust_cpu: the guest's random numbers are seeded by the processor's generator and virtio-rng.
    let mut line = String::from(
        "console=ttyS0 8250.nr_uarts=1 quiet reboot=k panic=-1 oops=panic no_timer_check tsc=reliable \
         rcupdate.rcu_expedited=1 dummy.numdummies=0 random.trust_cpu=on",
    );
    if config.vcpus_max() > config.vcpus {
        // The MP table lists all vCPUs. The guest starts the others when the machine grows.
        let _ = write!(line, " maxcpus={}", config.vcpus);
    }
    if slot_plan.memory_hotplug.is_some() {
        // The guest uses plugged memory at once, and only for what it can move away again.
        line.push_str(" memhp_default_state=online_movable");
    }
    for slot in slot_plan.all() {
        let (address, irq) = (DEVICES + u64::from(slot) * DEVICE_SIZE, FIRST_IRQ + slot);
        // Writing to a string cannot fail.
        let _ = write!(line, " virtio_mmio.device=4K@{address:#x}:{irq}");
    }
    if !config.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&config.cmdline);
    }
    line
}

fn elapsed_ms(from_ns: u64, to_ns: u64) -> u64 {
    to_ns.saturating_sub(from_ns) / 1_000_000
}

/// Nanoseconds on `CLOCK_MONOTONIC`, the clock of all [`BootTimes`].
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // The monotonic clock starts at zero and does not go back.
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
