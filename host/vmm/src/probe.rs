//! Finds out whether this host's KVM can run a guest, by running one.
//!
//! That `/dev/kvm` can be opened tells little. There are KVMs without a processor's support for virtualization: they
//! emulate a kernel instruction by instruction, slowly, until one comes that they do not know.

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
    arch::current::{
        self as arch,
        probe::{MEMORY_BYTES, PORT, Progress},
        registers::{self, RegisterError},
    },
    error::{self, ExitReason, refused},
    machine::register_memory,
    memory::{self, GuestMemory},
    vcpu,
};

const DEVICE: &str = "/dev/kvm";
/// The only version of KVM's interface (Linux `Documentation/virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;
/// How long the guest may take. It needs some milliseconds, most of which it waits for its timer.
const LIMIT: Duration = Duration::from_secs(1);

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
    Make(#[from] error::Error),
    #[error("the test guest cannot be put into a virtual machine")]
    Load(#[from] RegisterError),
    #[error("no thread can be started for the test guest")]
    Thread(#[source] io::Error),
    #[error("the test guest was given up after {} s, {}", LIMIT.as_secs(), reached.when_stopped())]
    Timeout { reached: Progress },
    #[error("the test guest ended {}", reached.when_stopped())]
    Ended {
        reached: Progress,
        #[source]
        reason: ExitReason,
    },
    #[error("the test guest reported {value} {}", reached.when_stopped())]
    UnexpectedReport { reached: Progress, value: u8 },
}

/// Runs a tiny guest in this host's KVM: 64-bit code in the upper half of the address space that computes a
/// little, halts, and is woken by its local APIC's timer. Takes at most a second.
///
/// A guest that does not finish keeps its thread, because nothing is certain to get a vCPU out of a KVM that does not
/// work. Both end with the process, which should not go on for long after an error.
pub fn probe() -> Result<(), ProbeError> {
    let guest = Guest::new(&open()?)?;
    let (reports, received) = mpsc::channel();
    std::thread::Builder::new()
        .name("probe".into())
        .spawn(move || guest.run(&reports))
        .map_err(ProbeError::Thread)?;
    await_last_step(&received, Instant::now() + LIMIT)
}

/// Opens KVM and checks its version.
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

/// What the guest's thread reports.
enum Report {
    Reached(u8),
    Ended(ExitReason),
}

/// One vCPU and what it needs, in the order in which they are dropped.
struct Guest {
    vcpu: VcpuFd,
    _vm: Arc<VmFd>,
    _memory: GuestMemory,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, ProbeError> {
        let vm = Arc::new(kvm.create_vm().map_err(refused("create a virtual machine"))?);
        arch::set_up_vm(&vm).map_err(refused("give the machine interrupt controllers"))?;
        let memory = memory::allocate(&[(GuestAddress(0), MEMORY_BYTES)]).map_err(error::Error::Memory)?;
        register_memory(&vm, &memory)?;
        let vcpu = vcpu::VcpuFactory::new(kvm, vm.clone(), 1, false)?.create(0)?;
        registers::enter_kernel(&vcpu, arch::probe::load(&memory)?)?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    /// Runs until the guest has ended or reported its last step, or nobody receives the reports any more because the
    /// time is up.
    fn run(mut self, reports: &Sender<Report>) {
        loop {
            let report = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, &[value])) => Report::Reached(value),
                Ok(VcpuExit::Shutdown) => {
                    Report::Ended(ExitReason::TripleFault(vcpu::describe_registers(&self.vcpu)))
                }
                Ok(VcpuExit::Intr) => continue,
                Ok(exit) => Report::Ended(vcpu::unexpected_exit(&exit)),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => Report::Ended(ExitReason::Kvm(format!("KVM_RUN failed: {error}"))),
            };
            let continues = matches!(report, Report::Reached(value) if value != Progress::Woken as u8);
            if reports.send(report).is_err() || !continues {
                return;
            }
        }
    }
}

fn await_last_step(reports: &Receiver<Report>, deadline: Instant) -> Result<(), ProbeError> {
    let mut reached = Progress::Nothing;
    while reached != Progress::Woken {
        match reports.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Report::Reached(value)) if value == reached.next() as u8 => reached = reached.next(),
            Ok(Report::Reached(value)) => return Err(ProbeError::UnexpectedReport { reached, value }),
            Ok(Report::Ended(reason)) => return Err(ProbeError::Ended { reached, reason }),
            Err(_) => return Err(ProbeError::Timeout { reached }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome for a guest that makes these reports and then, if there is a reason, ends.
    fn outcome(reports: &[Progress], reason: Option<ExitReason>) -> Result<(), ProbeError> {
        let (sender, receiver) = mpsc::channel();
        for progress in reports {
            sender.send(Report::Reached(*progress as u8)).unwrap();
        }
        if let Some(reason) = reason {
            sender.send(Report::Ended(reason)).unwrap();
        }
        await_last_step(&receiver, Instant::now())
    }

    #[test]
    fn a_guest_that_computes_and_is_woken_is_good() {
        outcome(&[Progress::Started, Progress::Computed, Progress::Woken], None).unwrap();
    }

    #[test]
    fn a_guest_that_comes_no_further_is_given_up_where_it_stands() {
        let reports = [Progress::Started, Progress::Computed];
        for (count, expected) in [Progress::Nothing, Progress::Started, Progress::Computed].iter().enumerate()
        {
            let result = outcome(&reports[..count], None);
            assert!(
                matches!(result, Err(ProbeError::Timeout { reached }) if reached == *expected),
                "{result:?}"
            );
        }
    }

    #[test]
    fn a_guest_that_wakes_without_its_interrupt_has_gone_wrong() {
        let result = outcome(&[Progress::Started, Progress::Computed, Progress::Computed], None);
        assert!(
            matches!(result, Err(ProbeError::UnexpectedReport { reached: Progress::Computed, value: 2 })),
            "{result:?}"
        );
    }

    #[test]
    fn a_step_that_was_left_out_is_noticed() {
        let result = outcome(&[Progress::Started, Progress::Woken], None);
        assert!(matches!(result, Err(ProbeError::UnexpectedReport { .. })), "{result:?}");
    }

    #[test]
    fn the_step_at_which_a_guest_ended_is_told() {
        let error = outcome(&[Progress::Started], Some(ExitReason::GuestReset)).unwrap_err();
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
