//! The machine: one KVM microVM, its vCPUs, memory and virtio devices.
//!
//! A process runs one machine, from its configuration ([`MachineConfig`]) to its end ([`run`]). The crate knows nothing
//! of containers: see ARCHITECTURE.md for who talks to whom. [`probe()`] finds out whether this host can run a machine.
//!
//! Each vCPU has a thread ([`vcpu`]), which takes the guest's accesses to devices to the [`bus`]. Devices with much to
//! do have threads of their own ([`virtio`]). The controller's calls are served by some more ([`control_service`]).

mod arch;
mod attack;
mod bounded_file;
mod bus;
mod config;
mod console;
mod control_service;
mod counter;
mod disks;
mod error;
mod lock;
mod log;
mod machine;
mod memory;
mod memory_hotplug;
mod probe;
mod rate_limiter;
mod received_descriptors;
mod seccomp;
mod signals;
mod slot_plan;
mod thread_kind;
mod threads;
mod vcpu;
mod virtio;

pub use arch::current::probe::Progress;
#[cfg(feature = "fault-points")]
pub use attack::VARIABLE as ATTACK_VARIABLE;
pub use config::{ConsoleConfig, MachineConfig, NetConfig, RateLimit, RateLimits, ShareConfig, VsockConfig};
pub use error::{Error, ExitReason};
pub use log::{LAST_WORDS, Log};
pub use machine::{InheritedDescriptors, monotonic_ns, run};
pub use probe::{ProbeError, probe};
pub use seccomp::{FILTER_EXIT_STATUS, FILTER_VIOLATION};
pub use virtio::vsock::{PortForward, VsockSockets};
