//! What pods have on the host: machines, cgroups, networks, mounts.

pub mod cgroup;
pub mod cpuset;
pub mod empty_dir;
pub mod machine;
pub mod machine_times;
pub mod mounts;
pub mod network;
pub mod oom;
pub mod process;
pub mod replace;
pub mod rootfs;
pub mod share;
pub mod size;
pub mod user_namespace;
