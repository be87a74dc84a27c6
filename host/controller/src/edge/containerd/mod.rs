//! containerd: it asks for pods through its sandbox API, in CRI's words, and knows their containers.

pub mod announcements;
pub mod container_record;
pub mod containers;
pub mod cri_fields;
pub mod delete;
pub mod events;
mod huge_pages;
pub mod info;
pub mod metrics;
pub mod pod_spec;
pub mod refusals;
pub mod rootfs;
pub mod sandboxes;

use tonic::{Request, Status};

/// Puts containerd's namespace on a request.
pub fn in_namespace<T>(message: T, namespace: &str) -> Result<Request<T>, Status> {
    let mut request = Request::new(message);
    let value = namespace.parse().map_err(|_| Status::invalid_argument("the namespace is not plain text"))?;
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}
