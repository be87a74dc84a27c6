//! The machine: one KVM microVM, its vCPUs, memory and virtio devices.
//!
//! A process runs one machine, from its configuration ([`MachineConfig`]) to its end ([`run`]). The crate knows nothing
//! of containers: see ARCHITECTURE.md for who talks to whom. [`probe()`] finds out whether this host can run a machine.
//!
//! Each vCPU has a thread ([`vcpu`]), which takes the guest's accesses to devices to the [`bus`]. Devices with much to
//! do have threads of their own ([`virtio`]). The controller's calls are served by some more ([`control_service`]).

mod arch;
mod bounded_file;
mod bus;
mod config;
mod console;
mod control_service;
mod disks;
mod lock;
mod log;
mod machine;
mod memory;
mod memory_hotplug;
mod probe;
mod slot_plan;
mod vcpu;
mod virtio;

/// The log message of a machine that has ended by itself, for which the controller looks.
pub const LAST_WORDS: &str = "the machine has ended";

pub use config::{ConsoleConfig, MachineConfig, NetConfig, ShareConfig, VsockConfig};
pub use log::Log;
pub use machine::{Error, ExitReason, InheritedSockets, monotonic_ns, run};
pub use probe::{ProbeError, Progress, probe};
pub use virtio::vsock::PortForward;
