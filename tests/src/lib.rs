//! Drives stock containerd through CRI, as kubelet does: what the end-to-end tests, the quickstart and the benchmark share.
//!
//! Everything here runs on a node (see `tests/node`). A test starts with [`on_node`], makes pods with [`Node::pod`] and
//! containers with [`Pod::container`]; whatever it made is removed when it ends, however it ends.

pub mod bare;
#[cfg(test)]
mod compatibility;
mod container;
pub mod containerd;
pub mod controller;
mod cri;
pub mod events;
mod forward;
pub mod leaks;
pub mod log;
pub mod machine;
mod node;
mod pod;
pub mod report;
pub mod streaming;
mod waiting;

pub use container::{BUSYBOX, BUSYBOX_USR1, Container, ContainerBuilder, ExecOutput};
pub use cri::Cri;
pub use forward::{Forward, Forwarded};
pub use node::{
    Network, Node, Runtime, on_node, on_node_alone, on_pericarp, on_pericarp_alone, on_pericarp_alone_for,
    without_containerd,
};
pub use pericarp_protos::cri as api;
pub use pod::{POD_ROOT, Pod, PodBuilder, mapped};
pub use waiting::{HANG_LIMIT, until};
