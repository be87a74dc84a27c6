//! What differs between processor architectures: the address layout, the state in which a vCPU
//! starts, and what the kernel is told at boot.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as current;
