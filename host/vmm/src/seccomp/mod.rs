//! Which system calls the machine's threads may make: one filter (seccomp(2)) for each kind of thread.
//!
//! [`needs`] has the tables, and says what each call is needed for. [`filter`] makes programs for the kernel of them. A
//! thread installs its own filter before it sees anything of a guest's ([`ThreadKind::restrict`]). A call that is not
//! allowed ends the process, and [`violation`] says which it was. docs/seccomp.md is made from the tables.
//!
//! A thread has the filters of the one that has started it as well, and can never drop any. So the spawner may do all
//! that the threads it starts may do, and nothing inside the machine may do more than that.
//!
//! [`ThreadKind::restrict`]: crate::thread_kind::ThreadKind::restrict

mod calls;
mod filter;
mod needs;
mod violation;

#[cfg(test)]
mod page;
#[cfg(test)]
mod tests;

pub use filter::{FilterError, install};
pub use violation::{FILTER_EXIT_STATUS, FILTER_VIOLATION, report_violations};
