//! The machine: one KVM microVM, its vCPUs, memory and virtio devices.
//!
//! It speaks no Task API and knows no containers; see ARCHITECTURE.md.

mod config;

pub use config::{ConsoleConfig, MachineConfig, ShareConfig, VsockConfig};
