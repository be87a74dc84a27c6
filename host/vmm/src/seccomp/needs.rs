//! The tables: which system calls each kind of thread needs, and what for.
//!
//! A call is here because code of the machine, of one of its libraries or of glibc makes it. Whoever adds one says what
//! for, and docs/seccomp.md shows it.

use kvm_bindings::{
    kvm_cpuid2, kvm_fpu, kvm_ioeventfd, kvm_irqfd, kvm_lapic_state, kvm_msrs, kvm_regs, kvm_sregs,
};
use libc::{
    SYS_accept4, SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone,
    SYS_clone3, SYS_close, SYS_copy_file_range, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchdir, SYS_fchmod,
    SYS_fchmodat, SYS_fchmodat2, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fgetxattr, SYS_flistxattr,
    SYS_flock, SYS_fremovexattr, SYS_fsetxattr, SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex,
    SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getgroups, SYS_getpid, SYS_getrandom, SYS_getsockname,
    SYS_gettid, SYS_getxattr, SYS_ioctl, SYS_linkat, SYS_listxattr, SYS_lseek, SYS_madvise, SYS_mincore,
    SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_name_to_handle_at,
    SYS_newfstatat, SYS_openat, SYS_openat2, SYS_pipe2, SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlinkat, SYS_readv,
    SYS_recvfrom, SYS_recvmsg, SYS_removexattr, SYS_renameat, SYS_renameat2, SYS_restart_syscall, SYS_rseq,
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield,
    SYS_seccomp, SYS_sendto, SYS_set_robust_list, SYS_setfsgid, SYS_setfsuid, SYS_setgroups, SYS_setresgid,
    SYS_setresuid, SYS_setsockopt, SYS_setxattr, SYS_shutdown, SYS_sigaltstack, SYS_statx, SYS_symlinkat,
    SYS_syncfs, SYS_tgkill, SYS_umask, SYS_unlinkat, SYS_unshare, SYS_utimensat, SYS_write, SYS_writev,
    c_int, c_long,
};

use crate::thread_kind::ThreadKind;

/// What a thread has to do, and the calls that this takes.
pub struct Need {
    #[cfg_attr(not(test), expect(dead_code, reason = "it is for docs/seccomp.md, which a test makes"))]
    pub purpose: &'static str,
    pub calls: &'static [AllowedCall],
}

/// A call that may be made.
pub struct AllowedCall {
    pub number: c_long,
    /// One of these must be met; with none, the arguments may be any.
    pub when: &'static [Alternative],
}

/// What must be true of a call's arguments, all of it.
#[derive(Clone, Copy)]
pub struct Alternative(pub &'static [Check]);

/// What must be true of one argument.
pub struct Check {
    /// Its number, from 0.
    pub argument: u8,
    pub comparison: Comparison,
    /// How a reader would call it.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is for docs/seccomp.md, which a test makes"))]
    pub name: &'static str,
}

/// With what an argument is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    Equals(u64),
    /// None of these bits may be set.
    Lacks(u64),
    /// The number of this process in its own PID namespace.
    IsOwnProcess,
}

const fn any(number: c_long) -> AllowedCall {
    AllowedCall { number, when: &[] }
}

const fn checked(number: c_long, when: &'static [Alternative]) -> AllowedCall {
    AllowedCall { number, when }
}

const fn equals(argument: u8, value: u64, name: &'static str) -> Check {
    Check { argument, comparison: Comparison::Equals(value), name }
}

/// Conditions of which each is that an argument has one of the named values.
macro_rules! one_of {
    ($argument:literal: $($value:expr => $name:expr),+ $(,)?) => {
        &[$(Alternative(&[equals($argument, $value, $name)])),+]
    };
}

/// Conditions of which each is that an argument has the value of one of libc's constants.
macro_rules! one_constant_of {
    ($argument:literal: $($name:ident),+ $(,)?) => {
        one_of![$argument: $(libc::$name as u64 => stringify!($name)),+]
    };
}

const NOT_EXECUTABLE: &[Alternative] = &[Alternative(&[Check {
    argument: 2,
    comparison: Comparison::Lacks(libc::PROT_EXEC as u64),
    name: "no PROT_EXEC",
}])];

/// The number of an ioctl(2) of KVM (`linux/ioctl.h`). `direction`: 0 if it has no data, 1 if the kernel reads them, 2
/// if it writes them.
const fn kvm(direction: u64, number: u64, size: usize) -> u64 {
    assert!(size < 1 << 14);
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

const KVM_RUN: u64 = kvm(0, 0x80, 0);
const KVM_GET_REGS: u64 = kvm(2, 0x81, size_of::<kvm_regs>());
const KVM_GET_SREGS: u64 = kvm(2, 0x83, size_of::<kvm_sregs>());
const KVM_CREATE_VCPU: u64 = kvm(0, 0x41, 0);
const KVM_SET_CPUID2: u64 = kvm(1, 0x90, size_of::<kvm_cpuid2>());
const KVM_SET_FPU: u64 = kvm(1, 0x8d, size_of::<kvm_fpu>());
const KVM_SET_MSRS: u64 = kvm(1, 0x89, size_of::<kvm_msrs>());
const KVM_GET_LAPIC: u64 = kvm(2, 0x8e, size_of::<kvm_lapic_state>());
const KVM_SET_LAPIC: u64 = kvm(1, 0x8f, size_of::<kvm_lapic_state>());
const KVM_IRQFD: u64 = kvm(1, 0x76, size_of::<kvm_irqfd>());
const KVM_IOEVENTFD: u64 = kvm(1, 0x79, size_of::<kvm_ioeventfd>());
/// `_IO(0x12, 104)` in `linux/fs.h`.
const BLKSSZGET: u64 = 0x1268;
/// Linux 6.13 and later; glibc 2.42 guards stacks with them. The crate libc has no names for them.
const MADV_GUARD_INSTALL: u64 = 102;
const MADV_GUARD_REMOVE: u64 = 103;
/// Times as 64-bit numbers, whatever the kernel's own are (`asm-generic/socket.h`).
const SO_RCVTIMEO_NEW: u64 = 66;
const SO_SNDTIMEO_NEW: u64 = 67;

/// The flags of clone(2) with which glibc makes a thread, and no others: none makes a process or a namespace.
const OF_A_THREAD: c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

const MEMORY: Need = Need {
    purpose: "memory: the allocator's, which is never executable",
    calls: &[
        any(SYS_brk),
        checked(SYS_mmap, NOT_EXECUTABLE),
        checked(SYS_mprotect, NOT_EXECUTABLE),
        any(SYS_mremap),
        any(SYS_munmap),
        checked(SYS_madvise, one_constant_of![2: MADV_DONTNEED]),
    ],
};

const WAITING: Need = Need {
    purpose: "locks, and waiting for other threads",
    calls: &[any(SYS_futex), any(SYS_sched_yield), any(SYS_restart_syscall)],
};

const LOGGING: Need = Need {
    purpose: "the machine's log and the console's, whose older half is dropped when they are full",
    calls: &[any(SYS_write), any(SYS_read), any(SYS_lseek), any(SYS_ftruncate), any(SYS_clock_gettime)],
};

const DESCRIPTORS_IN_GENERAL: Need = Need {
    purpose: "eventfds (read, write), and closing what is no longer used; builds with assertions look first \
              whether it is open",
    calls: &[any(SYS_read), any(SYS_write), any(SYS_close), checked(SYS_fcntl, one_constant_of![1: F_GETFD])],
};

const RANDOM: Need =
    Need { purpose: "keys of hash tables, and the guest's random numbers", calls: &[any(SYS_getrandom)] };

const ENDING: Need = Need {
    purpose: "the end of the thread or of the process: by itself, by a signal, by a panic",
    calls: &[
        any(SYS_exit),
        any(SYS_exit_group),
        any(SYS_rt_sigreturn),
        any(SYS_rt_sigprocmask),
        checked(SYS_rt_sigaction, one_constant_of![0: SIGABRT, SIGSEGV, SIGBUS]),
        any(SYS_sigaltstack),
        // glibc's last words about its own memory.
        any(SYS_writev),
        any(SYS_getpid),
        any(SYS_gettid),
        checked(
            SYS_tgkill,
            &[Alternative(&[
                Check { argument: 0, comparison: Comparison::IsOwnProcess, name: "own process" },
                equals(2, libc::SIGABRT as u64, "SIGABRT"),
            ])],
        ),
    ],
};

/// What every thread needs.
pub static EVERY_THREAD: [&Need; 6] =
    [&MEMORY, &WAITING, &LOGGING, &DESCRIPTORS_IN_GENERAL, &RANDOM, &ENDING];

const STARTING_THREADS: Need = Need {
    purpose: "starting threads, and what a thread does first",
    calls: &[
        checked(SYS_clone, one_of![0: OF_A_THREAD as u64 => "those of a thread"]),
        // It fails, so that clone(2) is used instead: see clone3_is_unknown.
        any(SYS_clone3),
        any(SYS_set_robust_list),
        any(SYS_rseq),
        any(SYS_sched_getaffinity),
        checked(SYS_prctl, one_constant_of![0: PR_SET_NAME]),
        checked(
            SYS_madvise,
            one_of![2: MADV_GUARD_INSTALL => "MADV_GUARD_INSTALL", MADV_GUARD_REMOVE => "MADV_GUARD_REMOVE"],
        ),
    ],
};

const RESTRICTING_THREADS: Need = Need {
    purpose: "dropping a new thread's capabilities, and installing its filter",
    calls: &[
        any(SYS_capget),
        any(SYS_capset),
        checked(SYS_prctl, one_constant_of![0: PR_SET_NO_NEW_PRIVS, PR_GET_SECUREBITS, PR_SET_SECUREBITS]),
        checked(
            SYS_seccomp,
            &[Alternative(&[
                equals(0, libc::SECCOMP_SET_MODE_FILTER as u64, "SECCOMP_SET_MODE_FILTER"),
                equals(1, 0, "no flags"),
            ])],
        ),
    ],
};

const RUNNING_A_VCPU: Need = Need {
    purpose: "running a vCPU, and saying where it has stopped",
    calls: &[checked(
        SYS_ioctl,
        one_of![1: KVM_RUN => "KVM_RUN", KVM_GET_REGS => "KVM_GET_REGS", KVM_GET_SREGS => "KVM_GET_SREGS"],
    )],
};

const ACTIVATING_DEVICES: Need = Need {
    purpose: "activating a device when the guest's driver asks for it: its thread's events, its tap's offloads, memory \
              for copies of requests",
    calls: &[
        checked(SYS_madvise, one_constant_of![2: MADV_HUGEPAGE]),
        any(SYS_eventfd2),
        any(SYS_epoll_create1),
        any(SYS_epoll_ctl),
        checked(SYS_fcntl, one_constant_of![1: F_DUPFD_CLOEXEC]),
        checked(SYS_ioctl, one_constant_of![1: TUNSETOFFLOAD]),
    ],
};

const WAITING_FOR_EVENTS: Need = Need {
    purpose: "waiting for events of the device",
    calls: &[any(SYS_epoll_wait), any(SYS_epoll_pwait), any(SYS_epoll_ctl)],
};

const STREAMS: Need = Need {
    purpose: "the streams of host programs, of forwarded ports and to the host, which are all accepted or inherited",
    calls: &[
        any(SYS_accept4),
        any(SYS_recvfrom),
        any(SYS_sendto),
        any(SYS_shutdown),
        any(SYS_getsockname),
        checked(SYS_ioctl, one_constant_of![1: FIONBIO]),
        checked(
            SYS_setsockopt,
            &[
                Alternative(&[
                    equals(1, libc::SOL_SOCKET as u64, "SOL_SOCKET"),
                    equals(2, libc::SO_LINGER as u64, "SO_LINGER"),
                ]),
                Alternative(&[
                    equals(1, libc::IPPROTO_TCP as u64, "IPPROTO_TCP"),
                    equals(2, libc::TCP_NODELAY as u64, "TCP_NODELAY"),
                ]),
            ],
        ),
    ],
};

const FRAMES: Need = Need {
    purpose: "frames of a tap, whose queues are attached and detached",
    calls: &[any(SYS_readv), any(SYS_writev), checked(SYS_ioctl, one_constant_of![1: TUNSETQUEUE])],
};

const DISK_DATA: Need =
    Need { purpose: "the data of a disk", calls: &[any(SYS_preadv), any(SYS_pwritev), any(SYS_fdatasync)] };

const RECEIVING_DESCRIPTORS: Need = Need {
    purpose: "descriptors that the controller sends",
    calls: &[
        any(SYS_poll),
        any(SYS_ppoll),
        any(SYS_accept4),
        any(SYS_recvmsg),
        any(SYS_sendto),
        any(SYS_clock_nanosleep),
        checked(
            SYS_setsockopt,
            &[
                Alternative(&[
                    equals(1, libc::SOL_SOCKET as u64, "SOL_SOCKET"),
                    equals(2, libc::SO_RCVTIMEO as u64, "SO_RCVTIMEO"),
                ]),
                Alternative(&[
                    equals(1, libc::SOL_SOCKET as u64, "SOL_SOCKET"),
                    equals(2, libc::SO_SNDTIMEO as u64, "SO_SNDTIMEO"),
                ]),
                Alternative(&[
                    equals(1, libc::SOL_SOCKET as u64, "SOL_SOCKET"),
                    equals(2, SO_RCVTIMEO_NEW, "SO_RCVTIMEO_NEW"),
                ]),
                Alternative(&[
                    equals(1, libc::SOL_SOCKET as u64, "SOL_SOCKET"),
                    equals(2, SO_SNDTIMEO_NEW, "SO_SNDTIMEO_NEW"),
                ]),
            ],
        ),
    ],
};

const CHANGING_DEVICES: Need = Need {
    purpose: "connecting a device with KVM, or disconnecting it",
    calls: &[checked(SYS_ioctl, one_of![1: KVM_IRQFD => "KVM_IRQFD", KVM_IOEVENTFD => "KVM_IOEVENTFD"])],
};

const CONTROL_CALLS: Need = Need {
    purpose: "the controller's calls, and the memory that the guest uses",
    calls: &[
        any(SYS_poll),
        any(SYS_pipe2),
        any(SYS_accept4),
        any(SYS_recvfrom),
        any(SYS_sendto),
        any(SYS_clock_nanosleep),
        any(SYS_mincore),
    ],
};

const INSERTING_DISKS: Need = Need {
    purpose: "inserting a disk",
    calls: &[
        any(SYS_statx),
        any(SYS_fstat),
        any(SYS_eventfd2),
        checked(SYS_fcntl, one_constant_of![1: F_DUPFD_CLOEXEC]),
        checked(SYS_ioctl, one_of![1: BLKSSZGET => "BLKSSZGET"]),
    ],
};

const ADDING_VCPUS: Need = Need {
    purpose: "adding vCPUs",
    calls: &[checked(
        SYS_ioctl,
        one_of![
            1: KVM_CREATE_VCPU => "KVM_CREATE_VCPU",
            KVM_SET_CPUID2 => "KVM_SET_CPUID2",
            KVM_SET_FPU => "KVM_SET_FPU",
            KVM_SET_MSRS => "KVM_SET_MSRS",
            KVM_GET_LAPIC => "KVM_GET_LAPIC",
            KVM_SET_LAPIC => "KVM_SET_LAPIC",
        ],
    )],
};

const FILES: Need = Need {
    purpose: "the guest's files below the share",
    calls: &[
        any(SYS_copy_file_range),
        any(SYS_dup),
        any(SYS_fallocate),
        any(SYS_fchdir),
        any(SYS_fchmod),
        any(SYS_fchmodat),
        // glibc 2.39 and later make it for a mode with flags.
        any(SYS_fchmodat2),
        any(SYS_fchownat),
        any(SYS_fdatasync),
        any(SYS_fgetxattr),
        any(SYS_flistxattr),
        any(SYS_flock),
        any(SYS_fremovexattr),
        any(SYS_fsetxattr),
        any(SYS_fstat),
        any(SYS_fstatfs),
        any(SYS_fsync),
        any(SYS_getdents64),
        any(SYS_getxattr),
        any(SYS_linkat),
        any(SYS_listxattr),
        any(SYS_mkdirat),
        any(SYS_mknodat),
        any(SYS_name_to_handle_at),
        any(SYS_newfstatat),
        any(SYS_openat),
        any(SYS_openat2),
        any(SYS_pread64),
        any(SYS_preadv),
        any(SYS_preadv2),
        any(SYS_pwrite64),
        any(SYS_pwritev),
        any(SYS_pwritev2),
        any(SYS_readlinkat),
        any(SYS_readv),
        any(SYS_removexattr),
        any(SYS_renameat),
        any(SYS_renameat2),
        any(SYS_setxattr),
        any(SYS_statx),
        any(SYS_symlinkat),
        any(SYS_syncfs),
        any(SYS_unlinkat),
        any(SYS_utimensat),
        any(SYS_writev),
        checked(SYS_fcntl, one_constant_of![1: F_DUPFD_CLOEXEC]),
    ],
};

const USERS_OF_FILES: Need = Need {
    purpose: "doing what the guest's users ask for as these users, with a working directory and umask of its own",
    calls: &[
        any(SYS_capget),
        any(SYS_capset),
        any(SYS_getegid),
        any(SYS_geteuid),
        any(SYS_getgroups),
        any(SYS_setfsgid),
        any(SYS_setfsuid),
        any(SYS_setgroups),
        any(SYS_setresgid),
        any(SYS_setresuid),
        any(SYS_umask),
        checked(SYS_prctl, one_constant_of![0: PR_CAPBSET_READ, PR_CAP_AMBIENT]),
        checked(SYS_unshare, one_constant_of![0: CLONE_FS]),
    ],
};

/// The kinds of threads that the spawner starts. The vCPUs' filter is first, because the kernel compares in this order,
/// and they make the most calls.
const STARTED: [ThreadKind; 8] = [
    ThreadKind::Vcpu,
    ThreadKind::Vsock,
    ThreadKind::Net,
    ThreadKind::Blk,
    ThreadKind::Fs,
    ThreadKind::Descriptors,
    ThreadKind::DiskRemoval,
    ThreadKind::Control,
];

/// Whether threads of this kind start others.
pub fn starts_threads(kind: ThreadKind) -> bool {
    // Both have the need STARTING_THREADS.
    matches!(kind, ThreadKind::Spawner | ThreadKind::Control)
}

/// All that a kind of thread needs, and of the spawner, all that those need which it starts.
pub fn of(kind: ThreadKind) -> Vec<&'static Need> {
    let started: &[ThreadKind] = if kind == ThreadKind::Spawner { &STARTED } else { &[] };
    let of_started = started.iter().flat_map(|kind| own(*kind));
    EVERY_THREAD.into_iter().chain(own(kind).iter().copied()).chain(of_started.copied()).collect()
}

/// What only some kinds of threads need.
pub fn own(kind: ThreadKind) -> &'static [&'static Need] {
    match kind {
        ThreadKind::Main => &[],
        ThreadKind::Spawner => &[&STARTING_THREADS, &RESTRICTING_THREADS],
        ThreadKind::Vcpu => &[&RUNNING_A_VCPU, &ACTIVATING_DEVICES],
        ThreadKind::Vsock => &[&WAITING_FOR_EVENTS, &STREAMS],
        ThreadKind::Net => &[&WAITING_FOR_EVENTS, &FRAMES],
        ThreadKind::Blk => &[&WAITING_FOR_EVENTS, &DISK_DATA],
        ThreadKind::Fs => &[&WAITING_FOR_EVENTS, &FILES, &USERS_OF_FILES],
        ThreadKind::Descriptors => &[&RECEIVING_DESCRIPTORS],
        ThreadKind::DiskRemoval => &[&CHANGING_DEVICES],
        ThreadKind::Control => {
            &[&STARTING_THREADS, &CONTROL_CALLS, &INSERTING_DISKS, &CHANGING_DEVICES, &ADDING_VCPUS]
        }
    }
}

/// Whether a condition is among others.
pub fn contains(alternatives: &[Alternative], other: &Alternative) -> bool {
    let same = |one: &Alternative| {
        let pairs = one.0.iter().zip(other.0);
        one.0.len() == other.0.len()
            && pairs.fold(true, |same, (one, other)| {
                same && (one.argument, one.comparison) == (other.argument, other.comparison)
            })
    };
    alternatives.iter().any(same)
}
