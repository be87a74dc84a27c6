//! Puts a machine together, starts it and waits for its end.

use std::{
    fmt::Write as _,
    io,
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, atomic::AtomicU8, mpsc},
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use pericarp_protos::{ttrpc, vmm_blocking::BootTimes};
use thiserror::Error;
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::current::{
        self as arch,
        boot::{self, BootError},
        layout::{self, DEVICE_SIZE, DEVICES, DEVICES_MAX, FIRST_IRQ, SERIAL_IRQ},
        registers::{self, RegisterError},
    },
    bus::{Bus, Exits},
    config::MachineConfig,
    console::Console,
    control::Control,
    disks::{Disks, NamedCounters},
    extra_memory::ExtraMemory,
    memory::{self, GuestMemory, MemoryError},
    vcpu::{self, Vcpus},
    virtio::{
        Device,
        fs::{Fs, FsError},
        mem,
        net::{Net, NetError},
        page::{self, Page},
        rng::Rng,
        slot::{Slot, SlotError, Wires},
        vsock::{Forward, Vsock, VsockError},
    },
};

/// Smallest guest that the kernel and the agent start in.
const MEMORY_MIB_MIN: u32 = 64;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExitReason {
    /// The guest reset itself: it was shut down from inside, or its kernel panicked (the console log
    /// tells which).
    #[error("the guest shut itself down")]
    GuestReset,
    /// The guest destroyed its own processor state so far that no handler could run.
    #[error("the guest's processor has stopped on a triple fault ({0})")]
    TripleFault(String),
    /// `Machine.Shutdown` was called.
    #[error("the machine was asked to end")]
    Shutdown,
    /// KVM could not run the guest any further.
    #[error("KVM cannot run the guest any further: {0}")]
    Kvm(String),
}

/// A machine cannot be started.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot open /dev/kvm; `pericarp check kvm` says what is wrong")]
    OpenKvm(#[source] kvm_ioctls::Error),
    #[error("KVM refuses to {what}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("{vcpus} vCPUs are asked for; this host's KVM allows 1 to {max}")]
    Vcpus { vcpus: u8, max: usize },
    #[error("{slots} slots for disks are asked for; a machine has {max} at most")]
    DiskSlots { slots: u8, max: u8 },
    #[error("{mib} MiB of memory are asked for; a guest needs {MEMORY_MIB_MIN}")]
    TooLittleMemory { mib: u32 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("cannot set up a vCPU")]
    Registers(#[from] RegisterError),
    #[error("cannot write the console log {path}")]
    Console {
        path: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("{count} devices are asked for; there are interrupts for {DEVICES_MAX}, so use fewer networks")]
    TooManyDevices { count: usize },
    #[error("cannot make the machine's {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot serve the control socket")]
    Control(#[source] ttrpc::Error),
}

/// What whoever starts a machine has opened for it.
#[derive(Debug)]
pub struct Inherited {
    /// A listening socket on which [`Machine`](pericarp_protos::vmm_blocking::Machine) is served once the vCPUs run.
    pub control: UnixListener,
    /// Connections to the pod's localhost, if they can be had.
    pub forward: Option<Forward>,
}

/// Starts a machine and waits for its end.
///
/// `process_start_ns` (`CLOCK_MONOTONIC`) is when the process began.
///
/// The process should exit soon after this returns: vCPU threads may still be running.
pub fn run(config: &MachineConfig, inherited: Inherited, process_start_ns: u64) -> Result<ExitReason, Error> {
    abort_on_panic();
    let kvm = Kvm::new().map_err(Error::OpenKvm)?;
    check_size(config, &kvm)?;
    let vm = Arc::new(kvm.create_vm().map_err(refused("create a virtual machine"))?);
    arch::set_up_vm(&vm).map_err(refused("give the machine interrupt controllers"))?;
    let boot_bytes = u64::from(config.memory_mib) << 20;
    let boot_memory = memory::allocate(&layout::memory_ranges(boot_bytes))?;
    let extra = extra_memory(config);
    let memory = match extra {
        Some((_, range)) => memory::extend(&boot_memory, range)?,
        None => boot_memory.clone(),
    };
    register_memory(&vm, &memory)?;
    let maker = vcpu::Maker::new(&kvm, vm.clone(), config.vcpus_max(), config.nested_virtualization)?;
    let vcpus = (0..config.vcpus).map(|id| maker.make(id)).collect::<Result<Vec<_>, _>>()?;
    let devices = make_devices(config, inherited.forward)?;
    let fixed = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let counters = counters(&devices);
    let bus = Arc::new(make_bus(config, &vm, &memory, devices)?);
    let kvm_ready_ns = monotonic_ns();

    let slots = u32::try_from(bus.slots.len()).unwrap_or(u32::MAX);
    let cmdline = cmdline(config, slots);
    let entry = boot::load(&boot_memory, &config.kernel, &config.initramfs, &cmdline, config.vcpus_max())?;
    if let Some(first) = vcpus.first() {
        registers::enter_kernel(first, entry)?;
    }
    let kernel_loaded_ns = monotonic_ns();

    let (ended, end) = mpsc::channel();
    let vcpus_started_ns = monotonic_ns();
    let mut running = Vcpus { maker, bus: bus.clone(), ended: ended.clone(), count: 0 };
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
    let server = Control {
        boot,
        vcpu_count: AtomicU8::new(running.count),
        vcpus: Mutex::new(running),
        memory,
        counters: [counters, vec![exits(&bus)]].concat(),
        // The one that memory is plugged through has the first slot behind those that stay.
        extra_memory: match extra {
            Some((limit, range)) => ExtraMemory::new(boot_bytes, limit, range, bus.clone(), fixed),
            None => ExtraMemory::none(boot_bytes),
        },
        disks: Disks::new(bus, fixed + u32::from(extra.is_some())..slots),
        ended,
    };
    let _server = server.serve(inherited.control).map_err(Error::Control)?;
    // The channel cannot close before its first message: the control server holds a sender.
    let reason = end.recv().unwrap_or(ExitReason::Shutdown);
    // The name goes with the machine; the sockets behind it close with the process.
    let _ = std::fs::remove_file(&config.vsock.path);
    Ok(reason)
}

pub(crate) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}

/// A thread that panics must not leave half a machine running.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn check_size(config: &MachineConfig, kvm: &Kvm) -> Result<(), Error> {
    // APIC ids have eight bits, of which one is the IOAPIC's and one means all.
    let max = kvm.get_max_vcpus().min(254);
    if config.vcpus == 0 || usize::from(config.vcpus_max()) > max {
        return Err(Error::Vcpus { vcpus: config.vcpus_max(), max });
    }
    let max = MachineConfig::DISK_SLOTS_MAX;
    if config.disk_slots > max {
        return Err(Error::DiskSlots { slots: config.disk_slots, max });
    }
    if config.memory_mib < MEMORY_MIB_MIN {
        return Err(Error::TooLittleMemory { mib: config.memory_mib });
    }
    Ok(())
}

/// Slot of KVM's for the devices' pages; the guest's memory has the first ones: below the gap, above it, and what
/// is plugged.
const DEVICES_SLOT: u32 = 3;

/// Gives `vm` its memory, which must stay mapped for as long as a vCPU runs.
pub(crate) fn register_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), Error> {
    register_regions(vm, memory, 0, 0)
}

fn register_regions(vm: &VmFd, memory: &GuestMemory, first_slot: u32, flags: u32) -> Result<(), Error> {
    for (slot, region) in (first_slot..).zip(memory.iter()) {
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

/// How many bytes can be plugged while the machine runs, and where; `None` if none can.
fn extra_memory(config: &MachineConfig) -> Option<(u64, (GuestAddress, usize))> {
    let boot = u64::from(config.memory_mib) << 20;
    let limit = (u64::from(config.memory_max_mib()) << 20) - boot;
    let limit = limit - limit % mem::BLOCK_SIZE;
    (limit > 0).then(|| (limit, layout::extra_range(boot, limit)))
}

/// The devices that the machine starts with, in the order of their slots.
fn make_devices(config: &MachineConfig, forward: Option<Forward>) -> Result<Vec<Box<dyn Device>>, Error> {
    let mut devices: Vec<Box<dyn Device>> =
        vec![Box::new(Vsock::new(&config.vsock, forward)?), Box::new(Rng::default())];
    if let Some(share) = &config.share {
        devices.push(Box::new(Fs::new(share)?));
    }
    let count = devices.len() + config.nets.len() + usize::from(extra_memory(config).is_some());
    if count > DEVICES_MAX {
        return Err(Error::TooManyDevices { count });
    }
    for (index, net) in config.nets.iter().enumerate() {
        devices.push(Box::new(Net::new(index, net)?));
    }
    Ok(devices)
}

/// Connects the console and the devices to the machine, with empty slots behind them as far as there are
/// interrupts.
fn make_bus(
    config: &MachineConfig,
    vm: &Arc<VmFd>,
    memory: &GuestMemory,
    devices: Vec<Box<dyn Device>>,
) -> Result<Bus, Error> {
    let console = Console::open(&config.console, interrupt_line(vm, SERIAL_IRQ)?)
        .map_err(|source| Error::Console { path: config.console.path.clone(), source })?;
    let empty = usize::from(config.disk_slots) + usize::from(extra_memory(config).is_some());
    let count = (devices.len() + empty).min(DEVICES_MAX);
    // As long as there is a slot, its page is mapped.
    let pages = page::allocate(count)?;
    register_regions(vm, &pages, DEVICES_SLOT, KVM_MEM_READONLY)?;
    let mut slots: Vec<Slot> = (0..)
        .take(count)
        .map(|index| {
            let wires: Arc<dyn Wires> = vm.clone();
            Slot::new(index, Page::new(pages.clone(), index), memory.clone(), wires)
        })
        .collect();
    for (slot, device) in slots.iter_mut().zip(devices) {
        slot.insert(device)?;
    }
    Ok(Bus {
        slots: slots.into_iter().map(Mutex::new).collect(),
        console: Mutex::new(console),
        exits: Exits::default(),
    })
}

/// An eventfd that raises an interrupt of the guest's.
fn interrupt_line(vm: &VmFd, irq: u32) -> Result<EventFd, Error> {
    let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| Error::Io { what: "eventfds", source })?;
    vm.register_irqfd(&irqfd, irq).map_err(refused("take a device's interrupt"))?;
    Ok(irqfd)
}

fn counters(devices: &[Box<dyn Device>]) -> Vec<NamedCounters> {
    devices.iter().map(|device| (device.name().to_owned(), device.counters())).collect()
}

fn exits(bus: &Bus) -> NamedCounters {
    ("vcpus".to_owned(), vec![("mmio_exits", bus.exits.mmio.clone()), ("port_exits", bus.exits.port.clone())])
}

/// The kernel's command line: what every guest is started with, the devices' slots, and what the
/// configuration adds.
fn cmdline(config: &MachineConfig, slots: u32) -> String {
    // quiet, 8250.nr_uarts=1: each character and each probed port is a trip out of the guest.
    // reboot=k: reset through the keyboard controller, which the bus understands.
    // panic=-1: a guest that panics ends at once, and its pod with it.
    // no_timer_check, tsc=reliable: there is no timer chip to check against; the TSC is KVM's.
    // rcupdate.rcu_expedited=1: nothing in a small guest gains from lazy grace periods.
    // dummy.numdummies=0: a pod's first interface should not be a dummy that nobody asked for.
    // random.trust_cpu: the processor's generator and virtio-rng seed it.
    let mut line = String::from(
        "console=ttyS0 8250.nr_uarts=1 quiet reboot=k panic=-1 no_timer_check tsc=reliable \
         rcupdate.rcu_expedited=1 dummy.numdummies=0 random.trust_cpu=on",
    );
    if config.vcpus_max() > config.vcpus {
        // The others are there for the guest to start when the machine grows.
        let _ = write!(line, " maxcpus={}", config.vcpus);
    }
    if extra_memory(config).is_some() {
        // What is plugged is used at once, and for nothing that could not be moved away again.
        line.push_str(" memhp_default_state=online_movable");
    }
    for slot in 0..slots {
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
