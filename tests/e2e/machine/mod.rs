//! The machine around a pod: its process on the node, its devices, its size, and its guest's kernel.

mod devices;
pub mod disks;
mod filters;
mod guest_kernel;
mod jail;
mod process;
mod rate_limits;
pub mod resize;
mod starvation;
