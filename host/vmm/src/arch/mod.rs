//! What depends on the processor architecture: the address layout, the state in which a vCPU starts, and the boot
//! parameters of the kernel.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;
