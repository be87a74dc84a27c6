//! A directory or file of the host that containers have.

use std::path::PathBuf;

/// A directory or file of the host that appears in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Its place in the share is `.volumes/<name>`, the same for all containers that have it.
    pub name: String,
    /// Path on the host, without symbolic links (containerd has resolved them).
    pub source: PathBuf,
    /// Path in the container, for messages.
    pub destination: String,
    /// Mounts below the source appear too.
    pub recursive: bool,
    /// Whether it may be written.
    pub read_only: ReadOnly,
    /// Whether mounts that the host makes below the source later appear too.
    pub propagation: Propagation,
    /// Whose ids its files show.
    pub ids: IdMapping,
}

/// Whose ids a volume's files show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdMapping {
    /// The host's.
    Host,
    /// What the pod's user namespace makes of them; mounts below it keep their own, as with runc.
    Pod,
    /// What the pod's user namespace makes of them, also in mounts below it.
    PodRecursive,
}

/// Whether a volume may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOnly {
    /// It may be written.
    No,
    /// It may not be written.
    Top,
    /// It may not, but mounts below it keep their own setting, as with runc. The host alone sees to it: what the guest
    /// mounts by itself below a read-only mount is read-only.
    TopOfTree,
    /// Neither it nor any mount below it.
    Recursive,
}

/// Whether later mounts reach a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// None of them do.
    Private,
    /// Those that the host makes.
    Slave,
}
