//! Drives stock containerd through CRI, as kubelet does: what the end-to-end tests, the quickstart and the benchmark
//! share.
//!
//! Everything here runs on a node (see `tests/node`). A test starts with [`on_node`], makes pods with [`Node::pod`] and
//! containers with [`Pod::container`]; whatever it made is removed when it ends, however it ends.
//!
//! - [`cri`]: pods and containers, asked for over CRI.
//! - [`direct`]: our own programs and containerd's event service, called without CRI in between.
//! - [`node`]: the node itself, its processes, its services, and what a run leaves behind on it.

pub mod cri;
pub mod direct;
pub mod node;
mod wait;

pub use cri::{
    Cri,
    container::{BUSYBOX, BUSYBOX_USR1, Container, ContainerBuilder, ExecOutput},
    pod::{POD_ROOT, Pod, PodBuilder, with_mapped_ids},
    port_forward::{PortForward, PortForwardOutput},
};
pub use node::{
    Network, Node, Runtime,
    frame::{
        on_node, on_node_alone, on_pericarp, on_pericarp_alone, on_pericarp_alone_for, without_containerd,
    },
};
pub use pericarp_protos::cri as api;
pub use wait::{HANG_LIMIT, wait_until};
