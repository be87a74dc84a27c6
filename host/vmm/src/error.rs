//! Why a machine cannot be started, and why one has ended.

use std::io;

use pericarp_protos::ttrpc;
use thiserror::Error;

use crate::{
    arch::current::{boot::BootError, layout::DEVICES_MAX, registers::RegisterError},
    config::MachineConfig,
    memory::MemoryError,
    threads::RestrictError,
    virtio::{device_slot::SlotError, fs::FsError, net::NetError, vsock::VsockError},
};

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ExitReason {
    /// The guest has reset itself: it was shut down from inside, or its kernel has panicked. The console log tells
    /// which.
    #[error("the guest shut itself down")]
    GuestReset,
    /// A vCPU could run none of the guest's exception handlers. Contains its registers.
    #[error("the guest's processor has stopped on a triple fault ({0})")]
    TripleFault(String),
    /// `Machine.Shutdown` was called.
    #[error("the machine was asked to end")]
    Shutdown,
    /// KVM could not run the guest any further. Contains the reason.
    #[error("KVM cannot run the guest any further: {0}")]
    Kvm(String),
}

/// A machine cannot be started.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot open /dev/kvm; `pericarp check kvm` says what is wrong")]
    OpenKvm(#[source] io::Error),
    #[error("KVM refuses to {what}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("{vcpus} vCPUs are asked for; this host's KVM allows 1 to {max}")]
    Vcpus { vcpus: u8, max: usize },
    #[error("{slots} slots for disks are asked for; a machine has {max} at most")]
    DiskSlots { slots: u8, max: u8 },
    #[error("{mib} MiB of memory are asked for; a guest needs {}", MachineConfig::MEMORY_MIB_MIN)]
    TooLittleMemory { mib: u32 },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("cannot set up a vCPU")]
    Registers(#[from] RegisterError),
    #[error("cannot write the console log {path}")]
    Console {
        path: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Net(#[from] NetError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("{count} devices are asked for; there are interrupts for {DEVICES_MAX}, so use fewer networks")]
    TooManyDevices { count: usize },
    #[error("cannot make the machine's {what}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Restrict(#[from] RestrictError),
    #[error("cannot serve the control socket")]
    Control(#[source] ttrpc::Error),
}

/// The error for KVM's refusal to do something, which completes "KVM refuses to".
pub fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { what, source }
}
