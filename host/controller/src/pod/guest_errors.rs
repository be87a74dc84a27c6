//! What a guest learns of a failure: enough for whoever reads kubelet's events, and nothing of the host. Paths, devices
//! and the words of other programs on the host stay in the controller's log.

use pericarp_protos::ttrpc::{self, Code};
use thiserror::Error;

use super::{Pod, containers::ContainerError, disks::DiskError, ports::SourceError, resize::ResizeError};
use crate::{
    guest::{service::RequestError, translate},
    host::{share::ShareError, size},
    telemetry::error_chain::chain,
};

/// A failure in words for the guest. Whatever has no word of its own here is [`GuestError::Host`].
#[derive(Debug, Error)]
pub enum GuestError<'a> {
    #[error("there is no container {0:?} in this pod")]
    NotOfThisPod(&'a str),
    #[error("the pod is being taken down")]
    Ended,
    #[error("containerd does not answer the controller; try again")]
    Source,
    /// It speaks of the spec, which the guest would get, and of its paths in the container.
    #[error("{0}")]
    Spec(&'a translate::Error),
    #[error("{0}")]
    Size(&'a size::Error),
    #[error("the source of the volume at {0} does not exist on the host; create it or remove the volume")]
    VolumeMissing(&'a str),
    #[error(
        "the source of the volume at {destination} is a {kind}, which cannot be reached from inside the machine; use a \
             directory or a regular file"
    )]
    VolumeKind { destination: &'a str, kind: &'static str },
    #[error(
        "the ids of the volume at {0} cannot be mapped for the pod's user namespace, by its file system or by this \
             kernel for it (tmpfs can from Linux 6.3 on)"
    )]
    VolumeIds(&'a str),
    #[error("the volume at {0} cannot be mounted; the controller's log on the node says why")]
    Volume(&'a str),
    #[error(
        "the snapshotter {0:?} gives a root file system that cannot be served to a guest; use overlayfs or native for \
             this runtime"
    )]
    Snapshotter(&'a str),
    #[error("the root file system cannot be mounted; the controller's log on the node says why")]
    Root,
    #[error("the machine has no free slot for the volume at {0}; use fewer raw block volumes")]
    NoSlot(&'a str),
    #[error(
        "the machine has no free slot for the image layers of the container; use fewer raw block volumes"
    )]
    NoSlotForLayers,
    #[error(
        "the agent of this pod is of an earlier version, which cannot map the ids of image layers; replace the pod"
    )]
    UnmappedLayers,
    #[error("the block device of the volume at {0} cannot be found on the host")]
    Device(&'a str),
    #[error(
        "the machine cannot be made to fit: {vcpus} vCPUs and {memory_mib} MiB; the controller's log on the node \
         says why"
    )]
    Fit { vcpus: u8, memory_mib: u32 },
    #[error("the machine cannot be kept on CPUs {cpus:?} and memory nodes {mems:?} of the host")]
    Pin { cpus: &'a str, mems: &'a str },
    #[error("the guest uses {online} of the {vcpus} vCPUs that it has now")]
    Vcpus { vcpus: u8, online: u32 },
    #[error("the host could not do it; the controller's log on the node says why")]
    Host,
}

impl<'a> From<&'a ContainerError> for GuestError<'a> {
    fn from(error: &'a ContainerError) -> Self {
        match error {
            ContainerError::Ended => Self::Ended,
            ContainerError::NotOfThisPod { id } | ContainerError::Source(SourceError::NotFound { id }) => {
                Self::NotOfThisPod(id)
            }
            ContainerError::Source(SourceError::Unavailable { .. }) => Self::Source,
            ContainerError::Source(SourceError::RootFs { snapshotter, .. }) => Self::Snapshotter(snapshotter),
            ContainerError::Source(SourceError::Refused(error)) | ContainerError::Spec(error) => {
                Self::Spec(error)
            }
            ContainerError::Share(error) => Self::of_share(error),
            ContainerError::Disk(DiskError::NoSlot { path }) => Self::NoSlot(path),
            ContainerError::Disk(DiskError::Device { path, .. }) => Self::Device(path),
            ContainerError::Resize(error) => Self::of_resize(error),
            ContainerError::NoSlotForLayers => Self::NoSlotForLayers,
            ContainerError::UnmappedLayers => Self::UnmappedLayers,
            ContainerError::Source(_) | ContainerError::Disk(_) | ContainerError::UserNamespace(_) => {
                Self::Host
            }
        }
    }
}

impl<'a> GuestError<'a> {
    fn of_share(error: &'a ShareError) -> Self {
        match error {
            ShareError::VolumeMissing { destination, .. } => Self::VolumeMissing(destination),
            ShareError::VolumeKind { destination, kind, .. } => Self::VolumeKind { destination, kind },
            ShareError::VolumeIds { destination, .. } => Self::VolumeIds(destination),
            ShareError::Volume { destination, .. } => Self::Volume(destination),
            ShareError::Root(_) => Self::Root,
            ShareError::Gone => Self::Ended,
            ShareError::Mount(_) | ShareError::Enter(_) => Self::Host,
        }
    }

    fn of_resize(error: &'a ResizeError) -> Self {
        match error {
            ResizeError::Size(error) => Self::Size(error),
            ResizeError::Machine { vcpus, memory_mib, .. } | ResizeError::Guest { vcpus, memory_mib, .. } => {
                Self::Fit { vcpus: *vcpus, memory_mib: *memory_mib }
            }
            ResizeError::Pin { cpus, mems, .. } => Self::Pin { cpus, mems },
            ResizeError::Vcpus { vcpus, online } => Self::Vcpus { vcpus: *vcpus, online: *online },
            _ => Self::Host,
        }
    }
}

impl Pod {
    /// What the agent hands on to containerd. All of it goes to the log; the guest gets what it may know.
    pub(super) fn error_for_guest(&self, error: &ContainerError) -> RequestError {
        self.caused_by_guest(|| {
            tracing::warn!(pod = self.id(), error = chain(error), "what the guest asks for cannot be done");
        });
        let message = format!("{}: {}", self.title(), GuestError::from(error));
        RequestError { code: code(error), message }
    }
}

/// The status for a guest.
fn code(error: &ContainerError) -> Code {
    match error {
        ContainerError::NotOfThisPod { .. } | ContainerError::Source(SourceError::NotFound { .. }) => {
            Code::NOT_FOUND
        }
        ContainerError::Source(SourceError::Unavailable { .. }) => Code::UNAVAILABLE,
        ContainerError::NoSlotForLayers
        | ContainerError::Disk(DiskError::NoSlot { .. })
        | ContainerError::Resize(ResizeError::Size(_)) => Code::RESOURCE_EXHAUSTED,
        ContainerError::Resize(ResizeError::Machine { source: ttrpc::Error::RpcStatus(status), .. }) => {
            status.code()
        }
        ContainerError::Spec(translate::Error::MemoryVolume { .. }) => Code::INTERNAL,
        ContainerError::Spec(_)
        | ContainerError::Source(SourceError::Refused(_))
        | ContainerError::Disk(DiskError::Device { .. })
        | ContainerError::Share(ShareError::VolumeMissing { .. } | ShareError::VolumeKind { .. }) => {
            Code::INVALID_ARGUMENT
        }
        ContainerError::Ended
        | ContainerError::UnmappedLayers
        | ContainerError::Source(SourceError::RootFs { .. })
        | ContainerError::Share(ShareError::Root(_)) => Code::FAILED_PRECONDITION,
        ContainerError::Source(_)
        | ContainerError::UserNamespace(_)
        | ContainerError::Share(_)
        | ContainerError::Disk(_)
        | ContainerError::Resize(_) => Code::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::host::{mounts::MountError, rootfs::RootfsError, user_namespace::UserNamespaceError};

    const SECRET: &str = "/var/lib/host-secret";

    fn io_error() -> io::Error {
        io::Error::other(format!("cannot open {SECRET}"))
    }

    fn rpc(code: Code) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, format!("cannot open {SECRET}")))
    }

    #[test]
    fn a_guest_learns_what_is_wrong_and_nothing_of_the_host() {
        let (path, destination) = (|| SECRET.into(), || "/in/container".to_owned());
        let table: Vec<(ContainerError, Code, &str)> = vec![
            (ContainerError::NotOfThisPod { id: "x".into() }, Code::NOT_FOUND, "\"x\" in this pod"),
            (ContainerError::Ended, Code::FAILED_PRECONDITION, "taken down"),
            (SourceError::NotFound { id: "x".into() }.into(), Code::NOT_FOUND, "in this pod"),
            (
                SourceError::Unavailable {
                    source_name: "containerd",
                    what: "the record",
                    id: "x".into(),
                    cause: Box::new(io_error()),
                }
                .into(),
                Code::UNAVAILABLE,
                "try again",
            ),
            (
                SourceError::RootFs { snapshotter: "odd".into(), message: SECRET.into() }.into(),
                Code::FAILED_PRECONDITION,
                "\"odd\" gives a root file system",
            ),
            (ContainerError::NoSlotForLayers, Code::RESOURCE_EXHAUSTED, "image layers"),
            (ContainerError::UnmappedLayers, Code::FAILED_PRECONDITION, "replace the pod"),
            (SourceError::Incomplete { what: "spec", id: "x".into() }.into(), Code::INTERNAL, "log"),
            (
                translate::Error::WorkingDirectory("relative".into()).into(),
                Code::INVALID_ARGUMENT,
                "\"relative\" is not an absolute path",
            ),
            (
                translate::Error::MemoryVolume { destination: destination(), source: io_error() }.into(),
                Code::INTERNAL,
                "/in/container cannot be looked at",
            ),
            (
                ShareError::VolumeMissing { path: path(), destination: destination() }.into(),
                Code::INVALID_ARGUMENT,
                "/in/container does not exist",
            ),
            (
                ShareError::VolumeKind { path: path(), destination: destination(), kind: "socket" }.into(),
                Code::INVALID_ARGUMENT,
                "/in/container is a socket",
            ),
            (
                ShareError::VolumeIds { path: path(), destination: destination(), source: io_error() }.into(),
                Code::INTERNAL,
                "/in/container cannot be mapped",
            ),
            (
                ShareError::Volume { path: path(), destination: destination(), source: io_error() }.into(),
                Code::INTERNAL,
                "/in/container cannot be mounted",
            ),
            (
                ShareError::Mount(MountError { action: "open", path: path(), source: io_error() }).into(),
                Code::INTERNAL,
                "log",
            ),
            (
                ShareError::Root(RootfsError::Path(MountError {
                    action: "open",
                    path: path(),
                    source: io_error(),
                }))
                .into(),
                Code::FAILED_PRECONDITION,
                "root file system",
            ),
            (
                DiskError::Device { path: destination(), major: 7, minor: 8, source: io_error() }.into(),
                Code::INVALID_ARGUMENT,
                "/in/container",
            ),
            (DiskError::NoSlot { path: destination() }.into(), Code::RESOURCE_EXHAUSTED, "fewer raw block"),
            (DiskError::Machine(rpc(Code::INTERNAL)).into(), Code::INTERNAL, "log"),
            (DiskError::Record(io_error()).into(), Code::INTERNAL, "log"),
            (UserNamespaceError::Hosts { netns: path() }.into(), Code::INTERNAL, "log"),
            (
                ResizeError::Machine { vcpus: 2, memory_mib: 300, source: rpc(Code::RESOURCE_EXHAUSTED) }
                    .into(),
                Code::RESOURCE_EXHAUSTED,
                "2 vCPUs and 300 MiB",
            ),
            (
                ResizeError::Pin { cpus: "0".into(), mems: "1".into(), cgroup: path(), source: io_error() }
                    .into(),
                Code::INTERNAL,
                "CPUs \"0\" and memory nodes \"1\"",
            ),
            (ResizeError::Agent(io_error()).into(), Code::INTERNAL, "log"),
        ];
        for (error, expected, part) in table {
            let text = GuestError::from(&error).to_string();
            assert_eq!(code(&error), expected, "{error:?}");
            assert!(text.contains(part), "{part:?} is not in {text:?}");
            assert!(!text.contains("secret") && !text.contains("/var"), "{error:?} tells {text:?}");
        }
    }
}
