//! The test guest of `pericarp check kvm`: the smallest guest that needs of KVM what a stock kernel needs. It
//! starts as a kernel does (see [`registers`]), jumps to the upper half of the address space, computes, halts, and is
//! woken by its local APIC's timer.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{
    layout::PML4,
    registers::{self, PAGE_LARGE, PAGE_PRESENT_WRITABLE, RegisterError},
};
use crate::memory::GuestMemory;

/// Size of the guest's memory in bytes: the large page that the upper half maps.
pub const MEMORY_BYTES: usize = 2 << 20;
/// The port to which the guest reports its [`Progress`]. A PC's firmware uses it for that purpose too.
pub const PORT: u16 = 0x80;

/// How far the test guest has come. It reports the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Progress {
    /// It has reported nothing.
    Nothing = 0,
    /// It runs 64-bit code in the upper half of the address space.
    Started = 1,
    /// It runs at a processor's speed.
    Computed = 2,
    /// An interrupt has woken it from its halt. That was the last step.
    Woken = 3,
}

impl Progress {
    /// What comes next.
    #[must_use]
    pub fn next(self) -> Self {
        match self {
            Self::Nothing => Self::Started,
            Self::Started => Self::Computed,
            Self::Computed | Self::Woken => Self::Woken,
        }
    }

    /// When a guest that has come no further has stopped, as a part of a sentence.
    pub fn when_stopped(self) -> &'static str {
        match self {
            Self::Nothing => "before its 64-bit code could run in the upper half of the address space",
            Self::Started => "while it was computing",
            Self::Computed => "while it was waiting for its timer's interrupt",
            Self::Woken => "after its last step",
        }
    }
}

const CODE: GuestAddress = GuestAddress(0x1_0000);
const IDT: GuestAddress = GuestAddress(0x1_1000);
/// The operand of `lidt`: the offset of the table's last byte, and its address.
const IDT_POINTER: GuestAddress = GuestAddress(0x1_1800);
/// Page tables of the upper half.
const PDPT: GuestAddress = GuestAddress(0x1_2000);
const PAGE_DIRECTORY: GuestAddress = GuestAddress(0x1_3000);

/// The addresses to which a kernel maps itself: the last 2 GiB. Here the first large page is the guest's memory, and
/// the second contains the local APIC.
const UPPER_HALF: u64 = 0xffff_ffff_8000_0000;
const UPPER_PML4_INDEX: u64 = UPPER_HALF >> 39 & 0x1ff;
const UPPER_PDPT_INDEX: u64 = UPPER_HALF >> 30 & 0x1ff;
const LOCAL_APIC: u64 = 0xfee0_0000;
const PAGE_UNCACHED: u64 = 1 << 4 | 1 << 3;

/// Vector of the timer's interrupt: the first that does not belong to an exception.
const VECTOR: u16 = 0x20;
/// Offset of the interrupt's handler in [`INSTRUCTIONS`].
const HANDLER: u64 = 0x6c;
/// 64-bit interrupt gate of privilege level 0, present.
const INTERRUPT_GATE: u64 = 0x8e;
const CODE_SELECTOR: u64 = 0x10;

#[rustfmt::skip]
const INSTRUCTIONS: [u8; 122] = [
    // The code begins in identity-mapped memory, as a kernel does.
    0x48, 0xc7, 0xc0, 0x09, 0x00, 0x01, 0x80, // mov rax, 0xffffffff80010009
    0xff, 0xe0,                               // jmp rax: to the next instruction, in the upper half

    // From here on the code runs in the upper half. The stack and the interrupt table are there too.
    0x48, 0xc7, 0xc4, 0x00, 0x50, 0x01, 0x80, // mov rsp, 0xffffffff80015000
    0x0f, 0x01, 0x1c, 0x25, 0x00, 0x18, 0x01, 0x80, // lidt [0xffffffff80011800]
    0xb0, Progress::Started as u8,            // mov al, Started
    0xe6, 0x80,                               // out PORT, al

    // A KVM that emulates instructions, instead of letting the processor execute them, knows few vector instructions.
    0x0f, 0x20, 0xe1,                         // mov rcx, cr4
    0x81, 0xc9, 0x00, 0x02, 0x00, 0x00,       // or ecx, 0x200: OSFXSR, allows SSE
    0x0f, 0x22, 0xe1,                         // mov cr4, rcx
    0x66, 0x0f, 0xd4, 0xc0,                   // paddq xmm0, xmm0
    // It also takes seconds for four million rounds of a loop, for which a processor takes a few milliseconds.
    0xb9, 0x00, 0x00, 0x40, 0x00,             // mov ecx, 0x400000
    0xff, 0xc9,                               // dec ecx
    0x75, 0xfc,                               // jnz back to the dec
    0xb0, Progress::Computed as u8,           // mov al, Computed
    0xe6, 0x80,                               // out PORT, al

    // Halt until the timer's interrupt.
    0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x80, // mov rbx, 0xffffffff80200000: the local APIC
    0xc7, 0x83, 0xf0, 0x00, 0x00, 0x00, 0xff, 0x01, 0x00, 0x00, // mov dword [rbx+0xf0], 0x1ff: enable it
    0xc7, 0x83, 0x20, 0x03, 0x00, 0x00, 0x20, 0x00, 0x00, 0x00, // mov dword [rbx+0x320], VECTOR: one-shot timer
    0xc7, 0x83, 0xe0, 0x03, 0x00, 0x00, 0x0b, 0x00, 0x00, 0x00, // mov dword [rbx+0x3e0], 0xb: clock divided by 1
    0xc7, 0x83, 0x80, 0x03, 0x00, 0x00, 0x40, 0x42, 0x0f, 0x00, // mov dword [rbx+0x380], 1000000: 1 ms of KVM's 1 GHz
    0xfb,                                     // sti: takes effect after the next instruction
    0xf4,                                     // hlt
    0xe6, 0x80,                               // out PORT, al: the value that the handler has set

    // The interrupt's handler.
    0xc7, 0x83, 0xb0, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // mov dword [rbx+0xb0], 0: end of interrupt
    0xb0, Progress::Woken as u8,              // mov al, Woken
    0x48, 0xcf,                               // iretq: to after the hlt
];

/// Loads the guest into memory. Returns the address of its first instruction.
pub fn load(memory: &GuestMemory) -> Result<GuestAddress, RegisterError> {
    registers::write_tables(memory)?;
    write(memory).map_err(RegisterError::Tables)?;
    Ok(CODE)
}

/// Writes the page tables of the upper half, the interrupt table and the instructions.
fn write(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let entry = |table: GuestAddress, index: u64| GuestAddress(table.0 + index * 8);
    memory.write_obj(PDPT.0 | PAGE_PRESENT_WRITABLE, entry(PML4, UPPER_PML4_INDEX))?;
    memory.write_obj(PAGE_DIRECTORY.0 | PAGE_PRESENT_WRITABLE, entry(PDPT, UPPER_PDPT_INDEX))?;
    memory.write_obj(PAGE_PRESENT_WRITABLE | PAGE_LARGE, entry(PAGE_DIRECTORY, 0))?;
    let apic = LOCAL_APIC | PAGE_PRESENT_WRITABLE | PAGE_LARGE | PAGE_UNCACHED;
    memory.write_obj(apic, entry(PAGE_DIRECTORY, 1))?;

    // All other vectors are absent, so that an exception ends the guest with a triple fault.
    memory.write_obj(VECTOR * 16 + 15, IDT_POINTER)?;
    memory.write_obj(UPPER_HALF + IDT.0, GuestAddress(IDT_POINTER.0 + 2))?;
    let [low, high] = gate(UPPER_HALF + CODE.0 + HANDLER);
    memory.write_obj(low, entry(IDT, u64::from(VECTOR) * 2))?;
    memory.write_obj(high, entry(IDT, u64::from(VECTOR) * 2 + 1))?;
    memory.write_slice(&INSTRUCTIONS, CODE)
}

/// The descriptor of an interrupt's handler (AMD64 Architecture Programmer's Manual, volume 2, 4.8.4).
fn gate(handler: u64) -> [u64; 2] {
    let low = handler & 0xffff | CODE_SELECTOR << 16 | INTERRUPT_GATE << 40 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    /// The 32 bits at an offset of the instructions, sign-extended as the processor does.
    fn operand(offset: usize) -> u64 {
        let bytes = INSTRUCTIONS[offset..offset + 4].try_into().unwrap();
        i64::from(i32::from_le_bytes(bytes)).cast_unsigned()
    }

    #[test]
    fn the_instructions_use_the_addresses_of_the_tables() {
        assert_eq!(operand(3), UPPER_HALF + CODE.0 + 9);
        assert_eq!(operand(0x14), UPPER_HALF + IDT_POINTER.0);
        assert_eq!(operand(0x3c), UPPER_HALF + (2 << 20));
        assert_eq!(operand(0x50), u64::from(VECTOR));
        let handler = &INSTRUCTIONS[usize::try_from(HANDLER).unwrap()..];
        assert_eq!(handler[10..], [0xb0, Progress::Woken as u8, 0x48, 0xcf]);
    }

    #[test]
    fn the_guest_fits_its_memory() {
        let memory = memory::allocate(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let entry = load(&memory).unwrap();
        let mut loaded = [0; INSTRUCTIONS.len()];
        memory.read_slice(&mut loaded, entry).unwrap();
        assert_eq!(loaded, INSTRUCTIONS);
    }

    #[test]
    fn a_gate_holds_the_whole_address_of_its_handler() {
        let [low, high] = gate(0xffff_ffff_8001_006c);
        assert_eq!((low, high), (0x8001_8e00_0010_006c, 0xffff_ffff));
    }
}
