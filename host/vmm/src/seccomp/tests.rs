//! What each kind of thread may do and may not, tried: a process that a filter ends is another one, this test's program
//! once more.

use std::{
    collections::HashSet,
    os::unix::process::ExitStatusExt as _,
    process::{Command, Output},
    sync::{Arc, Barrier, Mutex, mpsc},
};

use super::*;
use crate::{attack::calls as attacks, thread_kind::ThreadKind, threads::ThreadSpawner};

/// What the other process is to do: the name of a kind of thread, and what that thread does.
const TASK: &str = "PERICARP_TEST_TASK";

/// Has a thread of a kind do something in another process.
fn run(kind: ThreadKind, what: &str) -> Output {
    command(kind, what).output().unwrap()
}

fn command(kind: ThreadKind, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["seccomp::tests::what_another_process_does", "--exact", "--ignored", "--nocapture"])
        // This test's program has an arena of the allocator for the test's thread already; a machine has one in all.
        .env("MALLOC_ARENA_MAX", "1")
        // A panic's backtrace is made from files. A machine has no such variable.
        .env_remove("RUST_BACKTRACE")
        .env(TASK, format!("{} {what}", kind.name()));
    command
}

/// Runs `work` on a thread of a kind until it ends.
fn on_thread(kind: ThreadKind, work: impl FnOnce() + Send + 'static) {
    report_violations().unwrap();
    let thread = match kind {
        ThreadKind::Main | ThreadKind::Spawner => std::thread::spawn(move || {
            kind.restrict().unwrap();
            work();
        }),
        _ => ThreadSpawner::start().unwrap().spawn(kind, kind.name(), work).unwrap(),
    };
    thread.join().unwrap();
}

#[test]
#[ignore = "it is run by the other tests, in a process of its own"]
fn what_another_process_does() {
    let Ok(task) = std::env::var(TASK) else { return };
    let (kind, what) = task.split_once(' ').unwrap();
    let (kind, what) =
        (ThreadKind::ALL.into_iter().find(|each| each.name() == kind).unwrap(), what.to_owned());
    crate::machine::prepare_process().unwrap();
    if what == "arenas" {
        return assert_no_new_arenas();
    }
    on_thread(kind, move || match what.as_str() {
        "work" => work(),
        "panic" => panic!("a defect"),
        "blocked" => {
            // SAFETY: the set is initialized before it is used, and outlives the calls.
            unsafe {
                let mut signals = std::mem::zeroed();
                libc::sigemptyset(&raw mut signals);
                libc::sigaddset(&raw mut signals, libc::SIGSYS);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
            }
            attacks::make("execve");
        }
        call => {
            attacks::make(call);
        }
    });
    println!("it has come to its end");
}

/// What every thread may do at any time.
fn work() {
    let lock = Arc::new(Mutex::new(HashSet::new()));
    for size in [1 << 10, 1 << 16, 1 << 20, 1 << 26] {
        let mut large = vec![1u8; size];
        large.extend_from_within(..);
        lock.lock().unwrap().insert(large.len());
    }
    // Many blocks at once, so that memory goes back to the kernel when they are freed.
    drop((0..1000).map(|_| vec![1u8; 100 << 10]).collect::<Vec<_>>());
    std::thread::yield_now();
    let (sender, receiver) = mpsc::channel();
    sender.send(std::time::Instant::now()).unwrap();
    eprintln!("worked since {:?}", receiver.recv_timeout(std::time::Duration::from_millis(1)).unwrap());
    assert!(receiver.recv_timeout(std::time::Duration::from_millis(1)).is_err());
}

/// Checks that threads which allocate at the same time get no arenas of the allocator of their own.
fn assert_no_new_arenas() {
    let before = arenas();
    let (allocated, all_have) = (Arc::new(Barrier::new(9)), Arc::new(Barrier::new(9)));
    for _ in 0..8 {
        let (allocated, all_have) = (allocated.clone(), all_have.clone());
        std::thread::spawn(move || {
            let memory = vec![1u8; 10_000];
            allocated.wait();
            all_have.wait();
            drop(memory);
        });
    }
    allocated.wait();
    assert_eq!(arenas(), before);
    all_have.wait();
}

/// The number of arenas of this process (`malloc_info(3)`).
fn arenas() -> usize {
    let (mut text, mut length) = (std::ptr::null_mut(), 0);
    // SAFETY: the stream's buffer and length outlive it, and are valid when it is closed.
    let text = unsafe {
        let stream = libc::open_memstream(&raw mut text, &raw mut length);
        assert_eq!(libc::malloc_info(0, stream), 0);
        libc::fclose(stream);
        std::ffi::CStr::from_ptr(text).to_str().unwrap()
    };
    text.matches("<heap nr=").count()
}

#[test]
fn the_allocator_of_a_machine_makes_no_arenas_for_which_it_would_open_files() {
    let output = command(ThreadKind::Main, "arenas").env_remove("MALLOC_ARENA_MAX").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn assert_ended_by_filter(kind: ThreadKind, what: &str, call: &str) {
    let output = run(kind, what);
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(FILTER_EXIT_STATUS), "{kind:?} {what}: {log}");
    let lines: Vec<_> = log.lines().filter(|line| line.contains(FILTER_VIOLATION)).collect();
    let [line] = lines[..] else { panic!("{kind:?} {what}: one line is expected: {log}") };
    assert!(line.starts_with(&format!("error: thread {} made system call ", kind.name())), "{line}");
    assert!(line.contains(&format!(" ({call}), ")), "{line}");
}

#[test]
fn what_only_an_attacker_would_do_ends_the_process_on_every_thread_and_is_told() {
    for kind in ThreadKind::ALL {
        for call in attacks::OF_NO_THREAD {
            assert_ended_by_filter(kind, call, call);
        }
    }
}

#[test]
fn no_thread_opens_files_or_takes_another_users_ids_but_the_one_that_serves_them() {
    for kind in ThreadKind::ALL {
        if matches!(kind, ThreadKind::Fs | ThreadKind::Spawner) {
            continue;
        }
        assert_ended_by_filter(kind, "openat", "openat");
        assert_ended_by_filter(kind, "setfsuid", "setfsuid");
    }
}

#[test]
fn the_kernel_ends_a_process_that_has_blocked_the_handlers_signal() {
    let output = run(ThreadKind::Vcpu, "blocked");
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn only_a_vcpus_thread_runs_a_vcpu() {
    for kind in ThreadKind::ALL {
        if matches!(kind, ThreadKind::Vcpu | ThreadKind::Spawner) {
            assert!(run(kind, "KVM_RUN").status.success(), "{kind:?}");
        } else {
            assert_ended_by_filter(kind, "KVM_RUN", "ioctl");
        }
    }
}

#[test]
fn every_thread_can_allocate_lock_wait_log_and_end() {
    for kind in ThreadKind::ALL {
        let output = run(kind, "work");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind:?}: {:?} {log}", output.status);
        assert!(log.contains("worked since"), "{kind:?}: {log}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("it has come to its end"), "{kind:?}");
    }
}

#[test]
fn a_panic_on_any_thread_is_logged_and_ends_the_process_by_itself() {
    for kind in ThreadKind::ALL {
        let output = run(kind, "panic");
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{kind:?}: {log}");
        assert!(log.contains("a defect") && !log.contains(FILTER_VIOLATION), "{kind:?}: {log}");
    }
}

#[test]
fn a_thread_whose_filter_cannot_be_installed_does_not_run() {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch, apply_filter};
    let without_filters = || {
        let refused = SeccompAction::Errno(libc::EACCES.unsigned_abs());
        let rules = [(libc::SYS_seccomp, Vec::new())].into();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, TargetArch::x86_64).unwrap();
        apply_filter(&filter.try_into().unwrap() as &seccompiler::BpfProgram).unwrap();
        let error = ThreadSpawner::start().unwrap_err().to_string();
        assert!(error.contains("the filter of the thread spawner cannot be installed"), "{error}");
        let error = ThreadKind::Vcpu.restrict().unwrap_err().to_string();
        assert!(error.contains("the filter of the thread vcpu cannot be installed"), "{error}");
    };
    std::thread::spawn(without_filters).join().unwrap();
}

#[test]
fn only_the_threads_that_start_others_may_make_threads_and_none_makes_processes() {
    for kind in ThreadKind::ALL {
        let calls = filter::allowed_calls(kind);
        let starts = needs::starts_threads(kind);
        assert_eq!(calls.contains_key(&libc::SYS_clone), starts, "{kind:?}");
        assert_eq!(calls.contains_key(&libc::SYS_clone3), starts, "{kind:?}");
        for never in [libc::SYS_fork, libc::SYS_vfork, libc::SYS_execveat, libc::SYS_setns] {
            assert!(!calls.contains_key(&never), "{kind:?} {never}");
        }
    }
}

#[test]
fn the_spawner_may_do_what_the_threads_that_it_starts_may_do() {
    let of_spawner = filter::allowed_calls(ThreadKind::Spawner);
    for kind in ThreadKind::ALL {
        for (number, alternatives) in filter::allowed_calls(kind) {
            let allowed = of_spawner.get(&number).unwrap_or_else(|| panic!("{kind:?} {number}"));
            let is_allowed = |each| allowed.is_empty() || needs::contains(allowed, each);
            assert!(!alternatives.is_empty() || allowed.is_empty(), "{kind:?} {number}");
            assert!(alternatives.iter().all(is_allowed), "{kind:?} {number}");
        }
    }
}
