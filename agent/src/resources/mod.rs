//! What containers may use of the guest, and what they have used: cgroups (v2; kernel:
//! `Documentation/admin-guide/cgroup-v2.rst`).

mod cgroup;
mod device_rules;
mod hierarchy;
mod oom;
mod tree;

pub use cgroup::{Cgroup, CgroupError};
pub use device_rules::DeviceRules;
pub use hierarchy::{ROOT, delegate, limit_pod_tasks, reserve_for_agent};
pub use oom::OomWatcher;
