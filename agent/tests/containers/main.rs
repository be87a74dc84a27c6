//! Runs real containers through the agent's Task API, on this machine instead of in a guest: the
//! agent serves on a unix socket, in namespaces of its own. Needs root, cgroup v2 and a static busybox, so it runs on
//! the test node (`scripts/test e2e`).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![allow(clippy::assigning_clones, reason = "the fields of generated messages")]

mod calls;
mod cgroups;
mod client_stream;
mod execs;
mod harness;
mod lifecycle;
mod memory_volumes;
mod streams;
