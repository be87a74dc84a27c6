//! Port-forward: every TCP connection to localhost in the pod's network namespace, to whatever port, is led to one
//! listener, which the machine accepts from.
//!
//! containerd enters that namespace and dials `localhost:<port>` there (`criService.portForward`), where nobody but
//! this listener is: the pod's programs are in the guest. A BPF program at the namespace's socket lookup (kernel doc
//! `bpf/prog_sk_lookup.rst`) chooses the listener; the socket that is accepted has the port that was dialled for its
//! own.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
};

use pericarp_bpf::{self as bpf, FRAME, Instruction, Kind, Register};
use pericarp_vmm::PortForward;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt::set_ipv6_v6only},
};
use thiserror::Error;

/// Connections that wait to be accepted; the most that a machine has at once.
const BACKLOG: i32 = 1024;

/// Offsets in the program's context, `struct bpf_sk_lookup`.
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `enum bpf_func_id`.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// `enum sk_action`: go on, with the socket that was assigned or, without one, as if there were no program.
const SK_PASS: i32 = 1;

/// Localhost's connections cannot be led to a machine: port-forward does not work.
#[derive(Debug, Error)]
pub enum SteerError {
    #[error(
        "the host's kernel refuses to {what}; it must be Linux 5.9 or newer with CONFIG_BPF_SYSCALL, and \
         Pericarp needs CAP_BPF and CAP_NET_ADMIN"
    )]
    Bpf {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot {what} in the pod's network namespace")]
    Socket {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> SteerError {
    move |source| SteerError::Bpf { what, source }
}

fn socket_error<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> SteerError {
    move |source| SteerError::Socket { what, source: source.into() }
}

/// Begins to lead the connections to localhost in the calling thread's network namespace to a new listener. They are
/// led there for as long as what this returns is open anywhere, and nothing of it stays.
pub fn steer() -> Result<PortForward, SteerError> {
    let listener = listener()?;
    let (map, program) = load()?;
    bpf::put_socket(&map, &listener).map_err(refused("put a listener into a BPF map"))?;
    let netns = File::open("/proc/thread-self/ns/net").map_err(socket_error("find its own place"))?;
    let steering = bpf::attach_to_netns(&program, &netns)
        .map_err(refused("attach a BPF program to the pod's network namespace"))?;
    Ok(PortForward { listener, steering })
}

/// Whether this host's kernel takes the program. Changes nothing.
pub fn probe() -> Result<(), SteerError> {
    load().map(drop)
}

fn load() -> Result<(OwnedFd, OwnedFd), SteerError> {
    let map = bpf::socket_map().map_err(refused("make a BPF map for a socket (BPF_MAP_TYPE_SOCKMAP)"))?;
    let program = bpf::load(Kind::SocketLookup, "pericarp_forward", &program(&map))
        .map_err(refused("load a BPF program (BPF_PROG_TYPE_SK_LOOKUP)"))?;
    Ok((map, program))
}

/// A listener for both families, or for IPv4 alone where the kernel has no IPv6. By itself it is at 127.0.0.1, so that
/// the program alone leads anybody to it. (At `::1` it would be for IPv6 alone.)
fn listener() -> Result<TcpListener, SteerError> {
    let listener = match listen_at(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()) {
        Err(Errno::AFNOSUPPORT) => listen_at(Ipv4Addr::LOCALHOST.into()),
        listener => listener,
    };
    listener.map(TcpListener::from).map_err(socket_error("listen on localhost"))
}

fn listen_at(ip: IpAddr) -> Result<OwnedFd, Errno> {
    let family = if ip.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if ip.is_ipv6() {
        // The program may assign it to an IPv4 connection, then.
        set_ipv6_v6only(&socket, false)?;
    }
    bind(&socket, &SocketAddr::new(ip, 0))?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Assigns the socket in `sockets` to a TCP connection to 127.0.0.0/8 or `::1`, and lets everything else pass.
fn program(sockets: impl AsFd) -> Vec<Instruction> {
    /// Stands for the offset of a jump to the program's end.
    const PASS: i16 = i16::MAX;
    const CONTEXT: Register = 6;
    const SOCKET: Register = 7;
    /// The key, on the stack.
    const KEY: i16 = -4;
    /// As it is in memory: `::1` is three words of zeros and this.
    const LAST_OF_LOOPBACK: i32 = 1i32.to_be();

    // Whichever address is of the other family is all zeros.
    let is_ipv6_loopback = [
        Instruction::load_word(2, CONTEXT, LOCAL_IP6),
        Instruction::load_word(3, CONTEXT, LOCAL_IP6 + 4),
        Instruction::or(2, 3),
        Instruction::load_word(3, CONTEXT, LOCAL_IP6 + 8),
        Instruction::or(2, 3),
        Instruction::jump_unless(2, 0, PASS),
        Instruction::load_word(2, CONTEXT, LOCAL_IP6 + 12),
        Instruction::jump_unless(2, LAST_OF_LOOPBACK, PASS),
    ];
    let mut program = vec![
        Instruction::copy(CONTEXT, 1),
        Instruction::load_word(2, CONTEXT, PROTOCOL),
        Instruction::jump_unless(2, libc::IPPROTO_TCP, PASS),
        Instruction::load_byte(2, CONTEXT, LOCAL_IP4),
        Instruction::jump_if(2, 127, offset(is_ipv6_loopback.len())),
    ];
    program.extend(is_ipv6_loopback);
    program.push(Instruction::store_word(FRAME, KEY, 0));
    program.extend(Instruction::load_map(1, sockets));
    program.extend([
        Instruction::copy(2, FRAME),
        Instruction::add(2, KEY.into()),
        Instruction::call(MAP_LOOKUP_ELEM),
        // The listener has been closed.
        Instruction::jump_if(0, 0, PASS),
        Instruction::copy(SOCKET, 0),
        Instruction::copy(1, CONTEXT),
        Instruction::copy(2, SOCKET),
        Instruction::set(3, 0),
        Instruction::call(SK_ASSIGN),
        Instruction::copy(1, SOCKET),
        Instruction::call(SK_RELEASE),
    ]);
    let end = program.len();
    for (index, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == PASS {
            instruction.offset = offset(end - index - 1);
        }
    }
    program.extend([Instruction::set(0, SK_PASS), Instruction::exit()]);
    program
}

/// The offset of a jump over that many instructions. Our programs are far shorter than what it can count.
fn offset(instructions: usize) -> i16 {
    i16::try_from(instructions).unwrap_or(i16::MAX)
}

#[cfg(test)]
#[path = "steer_tests.rs"]
mod tests;
