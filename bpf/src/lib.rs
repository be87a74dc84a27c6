//! BPF programs without a compiler: instructions to make them of, and the requests of bpf(2) that load and attach them.
//!
//! The controller leads a pod's connections to localhost with one, and the agent decides with others which devices a
//! container may use.

mod instruction;

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

use nix::sys::signal::{SigSet, SigmaskHow};

pub use instruction::{FRAME, Instruction, Register};

/// `enum bpf_cmd` (Linux `include/uapi/linux/bpf.h`, as all numbers here).
const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SOCKMAP: u32 = 15;

/// Others may attach programs below, and all of them have to agree. Without it a container could have none for its own
/// cgroups.
const F_ALLOW_MULTI: u32 = 1 << 1;

/// What a program decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Which socket a connection goes to.
    SocketLookup,
    /// Whether a process of a cgroup may use a device.
    CgroupDevice,
}

impl Kind {
    /// `enum bpf_prog_type` and `enum bpf_attach_type`.
    const fn numbers(self) -> (u32, u32) {
        match self {
            Kind::SocketLookup => (30, 36),
            Kind::CgroupDevice => (15, 6),
        }
    }
}

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
/// Consists of numbers without gaps between them, is what `COMMAND` reads, and each number that stands for an address
/// is that of memory which lives as long as the value and is as large as the request says.
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

// SAFETY: `BPF_MAP_UPDATE_ELEM` reads these; who makes one guarantees the addresses.
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

// SAFETY: `BPF_PROG_LOAD` reads these; who makes one guarantees the addresses.
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

#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

// SAFETY: `BPF_PROG_ATTACH` reads these; there are no addresses.
unsafe impl Attributes for ProgramAttach {
    const COMMAND: libc::c_int = PROG_ATTACH;
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

/// For requests that return a descriptor. The kernel sets its close-on-exec flag.
fn bpf_fd<T: Attributes>(attributes: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(attributes)?;
    // SAFETY: the kernel has just opened this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Borrowed, because what is only a number to the kernel has to be open until it has been asked.
fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
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
    let value = number(socket.as_fd());
    bpf(&mut MapUpdateElement {
        map: number(map.as_fd()),
        padding: 0,
        key: address(&raw const key),
        value: address(&raw const value),
        flags: 0,
    })?;
    Ok(())
}

/// Loads a program, which the kernel lists under `name` (at most 15 bytes; the rest is left out). An error quotes what
/// the verifier says.
pub fn load(kind: Kind, name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let (program_type, expected_attach_type) = kind.numbers();
    let mut attributes = ProgramLoad {
        program_type,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: address(program),
        license: address(LICENSE.as_ptr()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        expected_attach_type,
    };
    // The kernel wants the name's end within it.
    let last = attributes.name.len() - 1;
    for (to, from) in attributes.name[..last].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let error = match verified(&mut attributes) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    // Once more, to be told why.
    let mut log = vec![0u8; LOG_SIZE];
    attributes.log_level = 1;
    attributes.log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
    attributes.log = address(log.as_mut_ptr());
    match verified(&mut attributes) {
        Ok(program) => Ok(program),
        Err(_) => Err(with_log(error, &log)),
    }
}

/// The verifier gives up when its caller has a signal to handle (bpf(2), `EAGAIN`), as one has whose child has ended.
/// A large program takes a slow machine longer than the time from one signal to the next, so that trying again does
/// not help; the thread has its signals afterwards.
fn verified(attributes: &mut ProgramLoad) -> io::Result<OwnedFd> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let result = bpf_fd(attributes);
    before.thread_set_mask()?;
    result
}

fn with_log(error: io::Error, log: &[u8]) -> io::Error {
    let text = CStr::from_bytes_until_nul(log).unwrap_or_default().to_string_lossy();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let said = lines.join("; ");
    let skipped = said.chars().count().saturating_sub(LOG_QUOTE);
    let end: String = said.chars().skip(skipped).collect();
    if end.is_empty() { error } else { io::Error::new(error.kind(), format!("{error}; its verifier: {end}")) }
}

/// Attaches a program of kind [`Kind::SocketLookup`] to a network namespace, for as long as the link that this returns
/// with is open anywhere.
pub fn attach_to_netns(program: impl AsFd, netns: impl AsFd) -> io::Result<OwnedFd> {
    let (_, attach_type) = Kind::SocketLookup.numbers();
    bpf_fd(&mut LinkCreate {
        program: number(program.as_fd()),
        target: number(netns.as_fd()),
        attach_type,
        flags: 0,
    })
}

/// Attaches a program of kind [`Kind::CgroupDevice`] to a cgroup, given by its directory, for as long as that exists.
pub fn attach_to_cgroup(program: impl AsFd, cgroup: impl AsFd) -> io::Result<()> {
    let (_, attach_type) = Kind::CgroupDevice.numbers();
    bpf(&mut ProgramAttach {
        target: number(cgroup.as_fd()),
        program: number(program.as_fd()),
        attach_type,
        flags: F_ALLOW_MULTI,
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_verifier_says_of_a_bad_program_is_told() {
        // It returns a register that was never written.
        let error = load(Kind::SocketLookup, "bad", &[Instruction::exit()]).unwrap_err().to_string();
        assert!(error.contains("its verifier: "), "{error}");
        assert!(error.contains("R0 !read_ok"), "{error}");
    }

    /// The agent's children end at any time.
    #[test]
    fn a_signal_that_comes_while_a_program_is_verified_does_not_fail_it() {
        use std::sync::atomic::{AtomicBool, Ordering};
        extern "C" fn nothing(_: libc::c_int) {}
        // As long as a program may be, so that the signal comes while it is looked at.
        let mut program = vec![Instruction::set(0, 1); 4000];
        program.push(Instruction::exit());
        let mask = SigSet::thread_get_mask().unwrap();
        // SAFETY: the handler does nothing, and nobody else in this process has a use for the signal.
        let (to, old) = unsafe {
            let handler: extern "C" fn(libc::c_int) = nothing;
            (libc::pthread_self(), libc::signal(libc::SIGUSR2, handler as libc::sighandler_t))
        };
        assert_ne!(old, libc::SIG_ERR);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // SAFETY: the thread waits for this one before it ends.
                    unsafe { libc::pthread_kill(to, libc::SIGUSR2) };
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            let loaded: Vec<_> = (0..50).map(|_| load(Kind::SocketLookup, "signals", &program)).collect();
            stop.store(true, Ordering::Relaxed);
            let failed: Vec<_> = loaded.into_iter().filter_map(Result::err).map(|e| e.to_string()).collect();
            assert!(failed.is_empty(), "{failed:?}");
            assert_eq!(SigSet::thread_get_mask().unwrap(), mask);
        });
    }

    #[test]
    fn only_the_end_of_a_long_log_is_quoted() {
        let log = [b"x".repeat(1000), b"the end\n\0rest".to_vec()].concat();
        let error = with_log(io::Error::from(io::ErrorKind::PermissionDenied), &log).to_string();
        assert!(error.ends_with("xxthe end"), "{error}");
        assert!(error.len() < LOG_QUOTE + 100, "{error}");
    }
}
