//! The controller's own interfaces: to containerd, which calls it and receives its events, and to the guests' agents.

pub mod bad_input;
mod busy_node;
mod events;
mod host_service;
mod versions;
