//! `x86_64`: the machine enters the kernel by the 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`),
//! without firmware, ACPI or PCI.

pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod probe;
pub mod registers;

use kvm_ioctls::VmFd;

/// Gives the VM the interrupt controllers that every vCPU needs. Must be called before the first vCPU is made.
///
/// There is no timer chip: the guest takes its clock from kvm-clock and its ticks from the local
/// APIC's TSC deadline.
pub fn set_up_vm(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    vm.set_identity_map_address(layout::IDENTITY_MAP)?;
    vm.set_tss_address(layout::TSS)?;
    vm.create_irq_chip()
}
