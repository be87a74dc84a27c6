//! What the machine's threads are for.

/// What a thread is for, which decides what it may do: see [`threads`](crate::threads) and
/// [`seccomp`](crate::seccomp).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadKind {
    /// Has put the machine together, and waits for its end.
    Main,
    /// Starts the others.
    Spawner,
    /// Runs a vCPU, and the devices that have no thread of their own.
    Vcpu,
    /// Moves the streams of the vsock device.
    Vsock,
    /// Moves the frames of a pair of a network device's queues, or serves such a device's control queue.
    Net,
    /// Serves a disk.
    Blk,
    /// Serves the share: it reads and writes files whoever owns them.
    Fs,
    /// Takes the files of disks that are inserted later.
    Descriptors,
    /// Takes a disk out and closes its files.
    DiskRemoval,
    /// Serves the controller's calls, with threads that it starts itself.
    Control,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Main,
        Self::Spawner,
        Self::Vcpu,
        Self::Vsock,
        Self::Net,
        Self::Blk,
        Self::Fs,
        Self::Descriptors,
        Self::DiskRemoval,
        Self::Control,
    ];

    /// Its name for messages and pages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Spawner => "spawner",
            Self::Vcpu => "vcpu",
            Self::Vsock => "vsock",
            Self::Net => "net",
            Self::Blk => "blk",
            Self::Fs => "fs",
            Self::Descriptors => "descriptors",
            Self::DiskRemoval => "disk-removal",
            Self::Control => "control",
        }
    }
}
