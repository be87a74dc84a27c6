//! Containers, their processes, and what they use of the pod.

mod attachments;
#[expect(clippy::module_inception, reason = "the module has the type of the same name")]
mod container;
mod error;
mod exec;
mod namespaces;
mod pause;
mod process;

pub use self::{
    attachments::{Attachments, PodStorage},
    container::{Container, ContainerConfig},
    error::ContainerError,
    process::{Process, ProcessState, send_signal},
};
