//! Whether this host's KVM can run a guest: found out by running one.
//!
//! A `/dev/kvm` that opens tells little. There are KVMs without a processor's support for it: they emulate a
//! kernel instruction by instruction, slowly, until one comes that they do not know.

use std::{
    io,
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    time::{Duration, Instant},
};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestAddress;

use crate::{
    ExitReason,
    arch::current::{
        self as arch,
        probe::{MEMORY_BYTES, PORT},
        registers::{self, RegisterError},
    },
    machine::{self, register_memory},
    memory::{self, GuestMemory},
    vcpu,
};

const DEVICE: &str = "/dev/kvm";
/// The one version of KVM's interface there is (Linux `Documentation/virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;
/// How long the guest may take. It needs some milliseconds, most of them its timer's.
const LIMIT: Duration = Duration::from_secs(1);

/// How far a guest came; the numbers are what it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Progress {
    /// Nothing has been heard of it.
    Nothing = 0,
    /// It runs 64-bit code in the upper half of the address space.
    Started = 1,
    /// It runs at a processor's speed.
    Computed = 2,
    /// It was woken from its halt by an interrupt. That was all.
    Woken = 3,
}

impl Progress {
    fn next(self) -> Progress {
        match self {
            Progress::Nothing => Progress::Started,
            Progress::Started => Progress::Computed,
            Progress::Computed | Progress::Woken => Progress::Woken,
        }
    }

    /// Where a guest stands that came no further.
    fn place(self) -> &'static str {
        match self {
            Progress::Nothing => "before its 64-bit code could run in the upper half of the address space",
            Progress::Started => "while it was computing",
            Progress::Computed => "while it was waiting for its timer's interrupt",
            Progress::Woken => "after all it had to do",
        }
    }
}

/// Why this host cannot run a guest.
#[derive(Debug, Error)]
pub enum ProbeError {
    #[error("{DEVICE} does not exist")]
    Missing,
    /// `mode`, `owner` and `group` are the device's.
    #[error(
        "user {user} may not open {DEVICE}, which is user {owner}'s and group {group}'s (mode {mode:03o})"
    )]
    Permission { user: u32, owner: u32, group: u32, mode: u32 },
    #[error("{DEVICE} cannot be opened")]
    Open(#[source] io::Error),
    #[error("{DEVICE} speaks version {found} of KVM's interface; {API_VERSION} is needed")]
    Version { found: i32 },
    #[error("no virtual machine can be made")]
    Make(#[from] machine::Error),
    #[error("the test guest cannot be put into a virtual machine")]
    Load(#[from] RegisterError),
    #[error("no thread can be started for the test guest")]
    Thread(#[source] io::Error),
    #[error("the test guest was given up after {} s, {}", LIMIT.as_secs(), reached.place())]
    Timeout { reached: Progress },
    #[error("the test guest ended {}", reached.place())]
    Ended {
        reached: Progress,
        #[source]
        reason: ExitReason,
    },
    #[error("the test guest told {value} {}", reached.place())]
    Nonsense { reached: Progress, value: u8 },
}

/// Runs a tiny guest in this host's KVM: 64-bit code in the upper half of the address space that computes a
/// little, halts, and is woken by its local APIC's timer. Takes at most a second.
///
/// A guest that does not finish keeps its thread, because nothing is certain to get a vCPU out of a KVM that
/// does not work; both end with the process, which should not go on for long after such an answer.
pub fn probe() -> Result<(), ProbeError> {
    let guest = Guest::new(&open()?)?;
    let (reports, received) = mpsc::channel();
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || guest.run(&reports))
        .map_err(ProbeError::Thread)?;
    judge(&received, Instant::now() + LIMIT)
}

fn open() -> Result<Kvm, ProbeError> {
    let kvm = Kvm::new().map_err(|error| open_error(io::Error::from_raw_os_error(error.errno())))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        found => Err(ProbeError::Version { found }),
    }
}

fn open_error(error: io::Error) -> ProbeError {
    match (error.kind(), std::fs::metadata(DEVICE)) {
        (io::ErrorKind::NotFound, _) => ProbeError::Missing,
        (io::ErrorKind::PermissionDenied, Ok(device)) => ProbeError::Permission {
            user: rustix::process::geteuid().as_raw(),
            owner: device.uid(),
            group: device.gid(),
            mode: device.mode() & 0o777,
        },
        _ => ProbeError::Open(error),
    }
}

/// What the guest's thread tells.
enum Report {
    Reached(u8),
    Ended(ExitReason),
}

/// One vCPU and all that it needs. In the order in which it is undone.
struct Guest {
    vcpu: VcpuFd,
    _vm: Arc<VmFd>,
    _memory: GuestMemory,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Guest, ProbeError> {
        let vm = Arc::new(kvm.create_vm().map_err(machine::refused("create a virtual machine"))?);
        arch::set_up_vm(&vm).map_err(machine::refused("give the machine interrupt controllers"))?;
        let memory = memory::allocate(&[(GuestAddress(0), MEMORY_BYTES)]).map_err(machine::Error::Memory)?;
        register_memory(&vm, &memory)?;
        let vcpu = vcpu::Maker::new(kvm, vm.clone(), 1, false)?.make(0)?;
        registers::enter_kernel(&vcpu, arch::probe::load(&memory)?)?;
        Ok(Guest { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs until the guest ends or has told its last. Nobody may listen any more: the time is up then.
    fn run(mut self, reports: &Sender<Report>) {
        loop {
            let report = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[value])) => Report::Reached(value),
                Ok(VcpuExit::Shutdown) => Report::Ended(ExitReason::TripleFault(vcpu::place(&self.vcpu))),
                Ok(VcpuExit::Intr) => continue,
                Ok(exit) => Report::Ended(vcpu::unexpected(&exit)),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => Report::Ended(ExitReason::Kvm(format!("KVM_RUN failed: {error}"))),
            };
            let goes_on = matches!(report, Report::Reached(value) if value != Progress::Woken as u8);
            if reports.send(report).is_err() || !goes_on {
                return;
            }
        }
    }
}

fn judge(reports: &Receiver<Report>, deadline: Instant) -> Result<(), ProbeError> {
    let mut reached = Progress::Nothing;
    while reached != Progress::Woken {
        match reports.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Report::Reached(value)) if value == reached.next() as u8 => reached = reached.next(),
            Ok(Report::Reached(value)) => return Err(ProbeError::Nonsense { reached, value }),
            Ok(Report::Ended(reason)) => return Err(ProbeError::Ended { reached, reason }),
            Err(_) => return Err(ProbeError::Timeout { reached }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of a guest that tells of `told` and then, if it ends, ends for `reason`.
    fn judged(told: &[Progress], reason: Option<ExitReason>) -> Result<(), ProbeError> {
        let (sender, receiver) = mpsc::channel();
        for progress in told {
            sender.send(Report::Reached(*progress as u8)).unwrap();
        }
        if let Some(reason) = reason {
            sender.send(Report::Ended(reason)).unwrap();
        }
        judge(&receiver, Instant::now())
    }

    #[test]
    fn a_guest_that_computes_and_is_woken_is_good() {
        judged(&[Progress::Started, Progress::Computed, Progress::Woken], None).unwrap();
    }

    #[test]
    fn a_guest_that_comes_no_further_is_given_up_where_it_stands() {
        let told = [Progress::Started, Progress::Computed];
        for (count, expected) in [Progress::Nothing, Progress::Started, Progress::Computed].iter().enumerate()
        {
            let result = judged(&told[..count], None);
            assert!(
                matches!(result, Err(ProbeError::Timeout { reached }) if reached == *expected),
                "{result:?}"
            );
        }
    }

    #[test]
    fn a_guest_that_wakes_without_its_interrupt_has_gone_wrong() {
        let result = judged(&[Progress::Started, Progress::Computed, Progress::Computed], None);
        assert!(
            matches!(result, Err(ProbeError::Nonsense { reached: Progress::Computed, value: 2 })),
            "{result:?}"
        );
    }

    #[test]
    fn a_step_that_was_left_out_is_noticed() {
        let result = judged(&[Progress::Started, Progress::Woken], None);
        assert!(matches!(result, Err(ProbeError::Nonsense { .. })), "{result:?}");
    }

    #[test]
    fn the_step_at_which_a_guest_ended_is_told() {
        let error = judged(&[Progress::Started], Some(ExitReason::GuestReset)).unwrap_err();
        assert_eq!(error.to_string(), "the test guest ended while it was computing");
    }

    #[test]
    fn a_missing_device_is_told_from_one_that_cannot_be_opened() {
        let error = |errno| open_error(io::Error::from_raw_os_error(errno));
        assert!(matches!(error(libc::ENOENT), ProbeError::Missing));
        assert!(matches!(error(libc::ENXIO), ProbeError::Open(_)));
    }

    #[test]
    fn this_hosts_kvm_is_judged_in_time_whatever_it_is() {
        let start = Instant::now();
        let result = probe();
        assert!(start.elapsed() < LIMIT * 3, "{:?}", start.elapsed());
        if let Err(error) = result {
            // Never for a reason that is this code's own.
            assert!(!matches!(error, ProbeError::Load(_) | ProbeError::Thread(_)), "{error:?}");
        }
    }
}
