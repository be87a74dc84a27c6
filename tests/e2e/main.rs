//! The end-to-end tests: stock containerd on a real node, asked over CRI as kubelet asks. Run by `scripts/test e2e`.
//!
//! With `PERICARP_TEST_RUNTIME=runc` the same tests run against containerd's default runtime, which proves what they expect.

mod attach;
mod containers;
mod controller;
mod controls;
mod devices;
mod disks;
mod errors;
mod events;
mod exec;
mod guest_kernel;
mod host_service;
mod logs;
mod machine;
mod network;
mod parity;
mod pods;
mod port_forward;
mod resilience;
mod resize;
mod starvation;
mod stdin;
mod user_namespaces;
mod validation;
mod volumes;
