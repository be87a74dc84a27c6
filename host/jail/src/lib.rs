//! What surrounds a machine's process on the host, so that a captured one finds as little as possible.
//!
//! [`JailedCommand`] starts the process: in namespaces of its own, in its cgroup from its first instruction on, without
//! a way to gain privileges, and with no descriptor except those that it is handed. What is left to do inside, when
//! everything is open and before the guest runs, the process does itself: it enters an empty root ([`enter`]) and a
//! user namespace ([`enter_user_namespace`]), and drops its capabilities (the machine's `threads.rs`).
//!
//! | namespace | what a captured machine does not find |
//! |---|---|
//! | PID | any other process: none can be signalled, traced or looked into |
//! | network | any interface, address or abstract socket; the pod's taps are descriptors |
//! | IPC | System V objects and message queues of the host |
//! | UTS | a host name that it could change |
//! | cgroup | the path of its own cgroup, and those above it |
//! | mount | any file of the host except those of its share |
//! | user | a capability on the host: those that it has are for the files of its share alone |

mod clone;
mod command;
mod probe;
mod root;
mod sealed;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod testing;
mod user_namespace;

pub use command::{JailedChild, JailedCommand};
pub use probe::probe;
pub use root::{SHARE, enter};
pub use sealed::{Access, open_sealed, set_mount_attributes};
pub use user_namespace::{enter_user_namespace, make_user_namespace};
