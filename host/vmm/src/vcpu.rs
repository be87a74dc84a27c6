//! vCPU threads: each runs its part of the guest and takes its device accesses to the bus.

use std::{
    io,
    sync::{Arc, mpsc::Sender},
    thread::JoinHandle,
};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::{
    ExitReason,
    arch::current::{cpuid, registers},
    bus::{Bus, PortWrite},
    machine::{Error, refused},
};

/// Makes a machine's vCPUs, each as it is after a reset.
///
/// The guest is told at its start of all that there may ever be. Those that are not made yet do not answer
/// when it tries to start them, and cost the host nothing.
pub struct Maker {
    vm: Arc<VmFd>,
    allowed: cpuid::Allowed,
    max: u8,
}

impl Maker {
    /// For a machine that never has more than `max`. `nested`: whether its guest may have virtual machines of its own.
    pub fn new(kvm: &Kvm, vm: Arc<VmFd>, max: u8, nested: bool) -> Result<Maker, Error> {
        let allowed =
            cpuid::allowed(kvm, nested).map_err(refused("tell what processor features it supports"))?;
        Ok(Maker { vm, allowed, max })
    }

    /// Makes the vCPU with this number.
    pub fn make(&self, id: u8) -> Result<VcpuFd, Error> {
        let vcpu = self.vm.create_vcpu(u64::from(id)).map_err(refused("create a vCPU"))?;
        vcpu.set_cpuid2(&cpuid::for_vcpu(&self.allowed, id, self.max))
            .map_err(refused("take a vCPU's CPUID"))?;
        registers::initialize(&vcpu)?;
        Ok(vcpu)
    }
}

/// The vCPUs of a running machine.
pub struct Vcpus {
    pub maker: Maker,
    pub bus: Arc<Bus>,
    /// Where the reason of the machine's end goes.
    pub ended: Sender<ExitReason>,
    /// How many there are.
    pub count: u8,
}

impl Vcpus {
    /// Most that there can be.
    pub fn max(&self) -> u8 {
        self.maker.max
    }

    /// Makes more of them until there are `count`. Each waits in KVM until the guest starts it.
    pub fn grow_to(&mut self, count: u8) -> Result<(), Error> {
        while self.count < count.min(self.max()) {
            let vcpu = self.maker.make(self.count)?;
            self.run(vcpu)?;
        }
        Ok(())
    }

    /// Gives the next vCPU its thread.
    pub fn run(&mut self, vcpu: VcpuFd) -> Result<(), Error> {
        start(self.count, vcpu, self.bus.clone(), self.ended.clone())
            .map_err(|source| Error::Io { what: "vCPU threads", source })?;
        self.count += 1;
        Ok(())
    }
}

/// Starts a thread that runs `vcpu` until the machine ends; the reason goes to `ended`.
///
/// Nothing stops a vCPU from outside but the end of the process: a machine that ends takes all its
/// threads with it, which needs no signal and no handshake.
pub fn start(
    id: u8,
    mut vcpu: VcpuFd,
    bus: Arc<Bus>,
    ended: Sender<ExitReason>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
        let reason = run(&mut vcpu, &bus);
        // The receiver is gone only when the machine is ending already.
        let _ = ended.send(reason);
    })
}

/// Where a vCPU stands, for whoever has to find out why.
pub fn place(vcpu: &VcpuFd) -> String {
    match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(registers), Ok(special)) => format!(
            "rip {:#x}, rsp {:#x}, cr2 {:#x}, cr3 {:#x}",
            registers.rip, registers.rsp, special.cr2, special.cr3
        ),
        _ => "registers unknown".to_owned(),
    }
}

/// An exit that no guest is known to cause.
pub fn unexpected(exit: &VcpuExit) -> ExitReason {
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
        match vcpu.run() {
            Ok(VcpuExit::MmioRead(_, data)) => bus.mmio_read(data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => match bus.port_write(port, data) {
                PortWrite::Done => {}
                PortWrite::Reset => return ExitReason::GuestReset,
            },
            Ok(VcpuExit::Shutdown) => return ExitReason::TripleFault(place(vcpu)),
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(exit) => return unexpected(&exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return ExitReason::Kvm(format!("KVM_RUN failed: {error}")),
        }
    }
}
