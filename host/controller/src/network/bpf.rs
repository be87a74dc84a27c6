//! The four requests of bpf(2) that [`steer`](super::steer) makes, and instructions to make a program of.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// `enum bpf_cmd` (Linux `include/uapi/linux/bpf.h`, as all numbers here).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
/// `enum bpf_attach_type`.
const SK_LOOKUP: u32 = 36;

/// Not read for a program that calls nothing which only the GPL may call.
const LICENSE: &CStr = c"Apache-2.0";
/// Of what the verifier says about a program that it refuses.
const LOG_SIZE: usize = 16 * 1024;
/// How much of its end an error quotes.
const LOG_QUOTE: usize = 300;

/// A request's own part of `union bpf_attr`. The kernel takes what is missing at its end as zeros.
///
/// # Safety
///
/// Consists of numbers without gaps between them, is what `COMMAND` reads, and each number that stands for an address is that of
/// memory which lives as long as the value and is as large as the request says.
unsafe trait Attributes {
    const COMMAND: libc::c_int;
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

// SAFETY: `BPF_MAP_CREATE` reads these; there are no addresses.
unsafe impl Attributes for MapCreate {
    const COMMAND: libc::c_int = MAP_CREATE;
}

#[repr(C)]
struct MapUpdateElement {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

// SAFETY: `BPF_MAP_UPDATE_ELEM` reads these; who makes one answers for the addresses.
unsafe impl Attributes for MapUpdateElement {
    const COMMAND: libc::c_int = MAP_UPDATE_ELEM;
}

#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

// SAFETY: `BPF_PROG_LOAD` reads these; who makes one answers for the addresses.
unsafe impl Attributes for ProgramLoad {
    const COMMAND: libc::c_int = PROG_LOAD;
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

// SAFETY: `BPF_LINK_CREATE` reads these; there are no addresses.
unsafe impl Attributes for LinkCreate {
    const COMMAND: libc::c_int = LINK_CREATE;
}

fn bpf<T: Attributes>(attributes: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads and writes no more than the size that it is told, and what the addresses in it stand
    // for (see `Attributes`).
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, T::COMMAND, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}

/// For requests that answer with a descriptor. The kernel sets its close-on-exec flag.
fn bpf_fd<T: Attributes>(attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(attributes)?;
    // SAFETY: the kernel has just opened this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn address<T: ?Sized>(of: *const T) -> u64 {
    of.cast::<u8>() as usize as u64
}

/// A map with room for one socket. It does not keep that socket open.
pub fn socket_map() -> io::Result<OwnedFd> {
    bpf_fd(&mut MapCreate { map_type: MAP_TYPE_SOCKMAP, key_size: 4, value_size: 4, max_entries: 1 })
}

/// Puts a socket into a [`socket_map`].
pub fn put_socket(map: impl AsFd, socket: impl AsFd) -> io::Result<()> {
    let key = 0u32;
    let value = number(socket);
    bpf(&mut MapUpdateElement {
        map: number(map),
        padding: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    })?;
    Ok(())
}

/// Loads a program that chooses the socket for a connection. An error quotes what the verifier says.
pub fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut attributes = ProgramLoad {
        program_type: PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: address(program),
        license: address(LICENSE.as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"pericarp_forward",
        interface: 0,
        expected_attach_type: SK_LOOKUP,
    };
    // The kernel wants the name's end within it.
    attributes.name[15] = 0;
    let error = match bpf_fd(&mut attributes) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    // Once more, to be told why.
    let mut log = vec![0u8; LOG_SIZE];
    attributes.log_level = 1;
    attributes.log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
    attributes.log = address(log.as_mut_ptr());
    match bpf_fd(&mut attributes) {
        Ok(program) => Ok(program),
        Err(_) => Err(with_log(error, &log)),
    }
}

fn with_log(error: io::Error, log: &[u8]) -> io::Error {
    let text = CStr::from_bytes_until_nul(log).unwrap_or_default().to_string_lossy();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let said = lines.join("; ");
    let skipped = said.chars().count().saturating_sub(LOG_QUOTE);
    let end: String = said.chars().skip(skipped).collect();
    if end.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}; its verifier: {end}")) }
}

/// Attaches a program to a network namespace for as long as the link that this answers with is open anywhere.
pub fn attach(program: impl AsFd, netns: impl AsFd) -> io::Result<OwnedFd> {
    bpf_fd(&mut LinkCreate {
        program: number(program),
        target: number(netns),
        attach_type: SK_LOOKUP,
        flags: 0,
    })
}

/// A register: 0 has a call's result, 1 to 5 its arguments, and 1 the context at the start. 6 to 9 survive calls.
pub type Register = u8;

/// The frame pointer; memory below it is the program's own.
pub const FRAME: Register = 10;

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper.
    registers: u8,
    /// Of an address, or of a jump, counted from the next instruction.
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

    /// Ends the program; its answer is in register 0.
    pub const fn exit() -> Instruction {
        Instruction::new(0x95, 0, 0, 0, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_verifier_says_of_a_bad_program_is_told() {
        // Answers with a register that was never written.
        let error = load(&[Instruction::exit()]).unwrap_err().to_string();
        assert!(error.contains("its verifier: "), "{error}");
        assert!(error.contains("R0 !read_ok"), "{error}");
    }

    #[test]
    fn only_the_end_of_a_long_log_is_quoted() {
        let log = [b"x".repeat(1000), b"the end\n\0rest".to_vec()].concat();
        let error = with_log(io::Error::from(io::ErrorKind::PermissionDenied), &log).to_string();
        assert!(error.ends_with("xxthe end"), "{error}");
        assert!(error.len() < LOG_QUOTE + 100, "{error}");
    }
}
