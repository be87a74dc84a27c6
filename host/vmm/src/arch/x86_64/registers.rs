//! The state in which the first vCPU enters the kernel: 64-bit mode, the first GiB mapped to itself, flat segments,
//! interrupts disabled.

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{BOOT_STACK, GDT, IDT, PAGE_DIRECTORY, PDPT, PML4, ZERO_PAGE};
use crate::memory::GuestMemory;

const CR0_PROTECTION: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;
/// The initial RFLAGS. The reserved bit 1 is always set.
const RFLAGS: u64 = 2;

/// Flags of an entry in a page table: present, and writable for the supervisor.
pub const PAGE_PRESENT_WRITABLE: u64 = 0b11;
/// Flag of an entry in a page directory: a page of 2 MiB.
pub const PAGE_LARGE: u64 = 1 << 7;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 0x4;
const DELIVERY_EXTERNAL: u32 = 0x7;

/// A vCPU cannot be brought into its initial state.
#[derive(Debug, Error)]
pub enum RegisterError {
    #[error("cannot write the boot page tables to guest memory")]
    Tables(#[source] GuestMemoryError),
    #[error("KVM refuses the vCPU's {what}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("KVM accepted {accepted} of {wanted} model-specific registers")]
    Msrs { accepted: usize, wanted: usize },
}

/// Writes the descriptor table and the page tables that a vCPU uses after [`enter_kernel`].
pub fn write_tables(memory: &GuestMemory) -> Result<(), RegisterError> {
    let tables = || -> Result<(), GuestMemoryError> {
        for (index, descriptor) in DESCRIPTORS.iter().enumerate() {
            memory.write_obj(*descriptor, GuestAddress(GDT.0 + index as u64 * 8))?;
        }
        memory.write_obj(0u64, IDT)?;
        memory.write_obj(PDPT.0 | PAGE_PRESENT_WRITABLE, PML4)?;
        memory.write_obj(PAGE_DIRECTORY.0 | PAGE_PRESENT_WRITABLE, PDPT)?;
        for page in 0..512u64 {
            let entry = page << 21 | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            memory.write_obj(entry, GuestAddress(PAGE_DIRECTORY.0 + page * 8))?;
        }
        Ok(())
    };
    tables().map_err(RegisterError::Tables)
}

/// The segment descriptors: null, unused, 64-bit code (selector 0x10), data (0x18). Linux's boot protocol requires
/// these selectors.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Offset of the descriptor table's last byte.
const GDT_LIMIT: u16 = 4 * 8 - 1;

/// A flat segment.
fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Sets the registers of the vCPU that boots so that its first instruction is at `entry`, in the state that the 64-bit
/// boot protocol requires.
pub fn enter_kernel(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegisterError> {
    let kvm = |what| move |source| RegisterError::Kvm { what, source };
    let mut sregs = vcpu.get_sregs().map_err(kvm("segments"))?;
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = GDT_LIMIT;
    sregs.idt.base = IDT.0;
    sregs.idt.limit = 7;
    sregs.cs = segment(0x10, true);
    let data = segment(0x18, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // KVM requires a busy 64-bit TSS for a vCPU in long mode.
    sregs.tr.type_ = 0xb;
    sregs.cr0 |= CR0_PROTECTION | CR0_PAGING;
    sregs.cr3 = PML4.0;
    sregs.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    sregs.efer |= EFER_LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(kvm("segments"))?;

    let regs = kvm_regs {
        rip: entry.0,
        rsp: BOOT_STACK,
        rbp: BOOT_STACK,
        rsi: ZERO_PAGE.0,
        rflags: RFLAGS,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(kvm("registers"))
}

/// Sets the initial state of any vCPU, including those that the kernel starts later.
pub fn initialize(vcpu: &VcpuFd) -> Result<(), RegisterError> {
    let kvm = |what| move |source| RegisterError::Kvm { what, source };
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
    vcpu.set_fpu(&fpu).map_err(kvm("floating-point state"))?;

    let entries = [
        (MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        // All memory is write-back unless the page tables say otherwise.
        (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() });
    // The list is refused only if it has more entries than KVM allows.
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| RegisterError::Msrs { accepted: 0, wanted: entries.len() })?;
    let accepted = vcpu.set_msrs(&msrs).map_err(kvm("model-specific registers"))?;
    if accepted != entries.len() {
        return Err(RegisterError::Msrs { accepted, wanted: entries.len() });
    }

    let mut lapic = vcpu.get_lapic().map_err(kvm("local APIC"))?;
    for (register, delivery) in [(LAPIC_LVT_LINT0, DELIVERY_EXTERNAL), (LAPIC_LVT_LINT1, DELIVERY_NMI)] {
        let value = delivery << 8;
        for (byte, new) in lapic.regs[register..register + 4].iter_mut().zip(value.to_le_bytes()) {
            *byte = new.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm("local APIC"))
}
