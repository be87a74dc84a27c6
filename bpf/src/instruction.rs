//! What programs are made of.

use std::os::fd::{AsFd, AsRawFd as _};

/// A register: 0 has a call's result, 1 to 5 its arguments, and 1 the context at the start. 6 to 9 survive calls.
pub type Register = u8;

/// The frame pointer; memory below it is the program's own.
pub const FRAME: Register = 10;

/// `struct bpf_insn` (kernel doc `bpf/standardization/instruction-set.rst`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper.
    registers: u8,
    /// The offset of an address, or of a jump, counted from the next instruction.
    pub offset: i16,
    immediate: i32,
}

impl Instruction {
    const fn new(code: u8, to: Register, from: Register, offset: i16, immediate: i32) -> Instruction {
        Instruction { code, registers: from << 4 | to, offset, immediate }
    }

    /// `to = from`
    pub const fn copy(to: Register, from: Register) -> Instruction {
        Instruction::new(0xbf, to, from, 0, 0)
    }

    /// `to = value`
    pub const fn set(to: Register, value: i32) -> Instruction {
        Instruction::new(0xb7, to, 0, 0, value)
    }

    /// `to += value`
    pub const fn add(to: Register, value: i32) -> Instruction {
        Instruction::new(0x07, to, 0, 0, value)
    }

    /// `to |= from`
    pub const fn or(to: Register, from: Register) -> Instruction {
        Instruction::new(0x4f, to, from, 0, 0)
    }

    /// `to &= value`
    pub const fn and(to: Register, value: i32) -> Instruction {
        Instruction::new(0x57, to, 0, 0, value)
    }

    /// `to >>= bits`, filling with zeros.
    pub const fn shift_right(to: Register, bits: i32) -> Instruction {
        Instruction::new(0x77, to, 0, 0, bits)
    }

    /// `to = *(u8 *)(from + offset)`
    pub const fn load_byte(to: Register, from: Register, offset: i16) -> Instruction {
        Instruction::new(0x71, to, from, offset, 0)
    }

    /// `to = *(u32 *)(from + offset)`
    pub const fn load_word(to: Register, from: Register, offset: i16) -> Instruction {
        Instruction::new(0x61, to, from, offset, 0)
    }

    /// `*(u32 *)(to + offset) = value`
    pub const fn store_word(to: Register, offset: i16, value: i32) -> Instruction {
        Instruction::new(0x62, to, 0, offset, value)
    }

    /// `if register == value: skip offset instructions`
    pub const fn jump_if(register: Register, value: i32, offset: i16) -> Instruction {
        Instruction::new(0x15, register, 0, offset, value)
    }

    /// `if register != value: skip offset instructions`
    pub const fn jump_unless(register: Register, value: i32, offset: i16) -> Instruction {
        Instruction::new(0x55, register, 0, offset, value)
    }

    /// `to = map`
    pub fn load_map(to: Register, map: impl AsFd) -> [Instruction; 2] {
        const IS_MAP: Register = 1;
        let fd = map.as_fd().as_raw_fd();
        [Instruction::new(0x18, to, IS_MAP, 0, fd), Instruction::new(0, 0, 0, 0, 0)]
    }

    /// Calls one of the kernel's helpers (`enum bpf_func_id`).
    pub const fn call(helper: i32) -> Instruction {
        Instruction::new(0x85, 0, 0, 0, helper)
    }

    /// Ends the program; its result is in register 0.
    pub const fn exit() -> Instruction {
        Instruction::new(0x95, 0, 0, 0, 0)
    }
}
