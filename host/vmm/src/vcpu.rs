//! vCPUs and their threads: each thread runs its vCPU and takes its accesses to devices to the bus.

use std::{
    io,
    sync::{Arc, mpsc::Sender},
    thread::JoinHandle,
};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::{
    arch::current::{cpuid, registers},
    attack,
    bus::{Bus, PortWrite},
    error::{Error, ExitReason, refused},
    thread_kind::ThreadKind,
    threads::ThreadSpawner,
};

/// Makes a machine's vCPUs, each in its state after a reset.
///
/// The guest learns at its start of all vCPUs that there may ever be. Those that are not made yet do not respond when
/// it tries to start them, and cost the host nothing.
pub struct VcpuFactory {
    vm: Arc<VmFd>,
    allowed: cpuid::AllowedCpuid,
    max: u8,
}

impl VcpuFactory {
    /// For a machine that never has more than `max` vCPUs. `nested`: whether its guest may run virtual machines itself.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>, max: u8, nested: bool) -> Result<Self, Error> {
        let allowed =
            cpuid::allowed(kvm, nested).map_err(refused("tell what processor features it supports"))?;
        Ok(Self { vm, allowed, max })
    }

    /// Makes the vCPU with this number, which is also its APIC id.
    pub fn create(&self, id: u8) -> Result<VcpuFd, Error> {
        let vcpu = self.vm.create_vcpu(u64::from(id)).map_err(refused("create a vCPU"))?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&self.allowed, id, self.max))
            .map_err(refused("take a vCPU's CPUID"))?;
        registers::initialize(&vcpu)?;
        Ok(vcpu)
    }
}

/// The vCPUs of a running machine.
pub struct Vcpus {
    pub factory: VcpuFactory,
    pub bus: Arc<Bus>,
    pub threads: ThreadSpawner,
    /// Takes the reason for the machine's end.
    pub exit_reasons: Sender<ExitReason>,
    /// Number of vCPUs that run.
    pub count: u8,
}

impl Vcpus {
    /// Most vCPUs that the machine can have.
    pub fn max(&self) -> u8 {
        self.factory.max
    }

    /// Adds vCPUs until there are `count`, or as many as the machine can have. Each waits in KVM until the guest starts
    /// it.
    pub fn grow_to(&mut self, count: u8) -> Result<(), Error> {
        while self.count < count.min(self.max()) {
            let vcpu = self.factory.create(self.count)?;
            self.run(vcpu)?;
        }
        Ok(())
    }

    /// Starts the thread of the next vCPU.
    pub fn run(&mut self, vcpu: VcpuFd) -> Result<(), Error> {
        spawn_vcpu_thread(&self.threads, self.count, vcpu, self.bus.clone(), self.exit_reasons.clone())
            .map_err(|source| Error::Io { what: "vCPU threads", source })?;
        self.count += 1;
        Ok(())
    }
}

/// Starts a thread that runs `vcpu` until the machine ends, and then sends the reason.
///
/// Nothing stops a vCPU from outside except the end of the process: the threads of a machine end with it, which needs
/// neither a signal nor a handshake.
fn spawn_vcpu_thread(
    threads: &ThreadSpawner,
    id: u8,
    mut vcpu: VcpuFd,
    bus: Arc<Bus>,
    exit_reasons: Sender<ExitReason>,
) -> io::Result<JoinHandle<()>> {
    threads.spawn(ThreadKind::Vcpu, &format!("vcpu{id}"), move || {
        let reason = run(&mut vcpu, &bus);
        // There is no receiver any more only if the machine is ending already.
        let _ = exit_reasons.send(reason);
    })
}

/// The registers that tell where a vCPU has stopped, for messages.
pub fn describe_registers(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(registers), Ok(special)) => format!(
            "rip {:#x}, rsp {:#x}, cr2 {:#x}, cr3 {:#x}",
            registers.rip, registers.rsp, special.cr2, special.cr3
        ),
        _ => "registers unknown".to_owned(),
    }
}

/// The end of a machine by an exit that no guest is known to cause.
pub fn unexpected_exit(exit: &VcpuExit) -> ExitReason {
    ExitReason::Kvm(match exit {
        VcpuExit::FailEntry(reason, _) => {
            format!("the processor refuses to enter the guest (reason {reason:#x})")
        }
        VcpuExit::InternalError => "KVM cannot emulate what the guest did (internal error)".to_owned(),
        exit => format!("unexpected exit {exit:?}"),
    })
}

fn run(vcpu: &mut VcpuFd, bus: &Bus) -> ExitReason {
    loop {
        attack::reached(ThreadKind::Vcpu);
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(_, data)) => bus.mmio_read(data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => match bus.port_write(port, data) {
                PortWrite::Done => {}
                PortWrite::Reset => return ExitReason::GuestReset,
            },
            Ok(VcpuExit::Shutdown) => return ExitReason::TripleFault(describe_registers(vcpu)),
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(exit) => return unexpected_exit(&exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return ExitReason::Kvm(format!("KVM_RUN failed: {error}")),
        }
    }
}
