//! What a client of CRI sees of pods and containers. These tests pass under runc as well, unless they say why not.

mod attach;
mod containers;
mod errors;
pub mod exec;
mod logs;
mod memory_volumes;
mod pods;
mod port_forward;
mod stdin;
mod user_namespaces;
mod volumes;
