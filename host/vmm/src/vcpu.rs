//! vCPU threads: each runs its part of the guest and takes its device accesses to the bus.

use std::{
    io,
    sync::{Arc, mpsc::Sender},
    thread::JoinHandle,
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    ExitReason,
    bus::{Bus, PortWrite},
};

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
