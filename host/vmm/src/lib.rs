//! The machine: one KVM microVM, its vCPUs, memory and virtio devices.
//!
//! It speaks no Task API and knows no containers; see ARCHITECTURE.md. [`run`] is the whole of it:
//! everything else is reached from there. [`probe()`] finds out whether this host can run one.

mod arch;
mod bounded_file;
mod bus;
mod config;
mod console;
mod control;
mod disks;
mod extra_memory;
mod log;
mod machine;
mod memory;
mod probe;
mod vcpu;
mod virtio;

/// What a machine that was not killed says at its end: the controller looks for it.
pub const LAST_WORDS: &str = "the machine has ended";

pub use config::{ConsoleConfig, MachineConfig, NetConfig, ShareConfig, VsockConfig};
pub use log::Log;
pub use machine::{Error, ExitReason, Inherited, monotonic_ns, run};
pub use probe::{ProbeError, Progress, probe};
pub use virtio::vsock::Forward;
