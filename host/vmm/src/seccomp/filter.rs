//! The programs that the kernel runs at each system call of a thread.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use thiserror::Error;

use super::needs::{self, Alternative, Comparison};
use crate::thread_kind::ThreadKind;

/// A thread has no filter of its system calls, and so must not run.
#[derive(Debug, Error)]
pub enum FilterError {
    #[error("the filter of the thread {thread} cannot be made")]
    Compile {
        thread: &'static str,
        #[source]
        source: seccompiler::BackendError,
    },
    #[error(
        "the filter of the thread {thread} cannot be installed; the host's kernel needs CONFIG_SECCOMP_FILTER"
    )]
    Install {
        thread: &'static str,
        #[source]
        source: seccompiler::Error,
    },
}

/// Installs the filter of a kind of thread on the calling thread, for ever.
pub fn install(kind: ThreadKind) -> Result<(), FilterError> {
    let refused = |source| FilterError::Install { thread: kind.name(), source };
    if needs::starts_threads(kind) {
        apply_filter(&clone3_is_unknown(kind)?).map_err(refused)?;
    }
    apply_filter(&compile(kind)?).map_err(refused)
}

/// The calls that a kind of thread may make. Each has the conditions of which one must be met, or none: then it may be
/// made with any arguments.
pub fn allowed_calls(kind: ThreadKind) -> BTreeMap<c_long, Vec<Alternative>> {
    let mut calls: BTreeMap<c_long, Vec<Alternative>> = BTreeMap::new();
    let needed = needs::of(kind);
    for call in needed.iter().flat_map(|need| need.calls) {
        let alternatives = calls.entry(call.number).or_default();
        for alternative in call.when {
            if !needs::contains(alternatives, alternative) {
                alternatives.push(*alternative);
            }
        }
    }
    // One that is needed with any arguments somewhere has no conditions.
    for call in needed.iter().flat_map(|need| need.calls).filter(|call| call.when.is_empty()) {
        calls.insert(call.number, Vec::new());
    }
    calls
}

/// The program of a kind of thread.
pub fn compile(kind: ThreadKind) -> Result<BpfProgram, FilterError> {
    let failed = |source| FilterError::Compile { thread: kind.name(), source };
    let mut rules = BTreeMap::new();
    for (number, alternatives) in allowed_calls(kind) {
        let alternatives = alternatives.iter().map(rule).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        rules.insert(number, alternatives);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64);
    let mut program: BpfProgram = filter.map_err(failed)?.try_into().map_err(failed)?;
    name_the_thread(&mut program, kind);
    Ok(program)
}

fn rule(alternative: &Alternative) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition = |check: &needs::Check| {
        let (operator, value) = match check.comparison {
            Comparison::Equals(value) => (SeccompCmpOp::Eq, value),
            Comparison::Lacks(bits) => (SeccompCmpOp::MaskedEq(bits), 0),
            Comparison::IsOwnProcess => (SeccompCmpOp::Eq, u64::from(std::process::id())),
        };
        // The kernel looks at no more than 32 bits of any argument that is checked here.
        SeccompCondition::new(check.argument, SeccompCmpArgLen::Dword, operator, value)
    };
    SeccompRule::new(alternative.0.iter().map(condition).collect::<Result<_, _>>()?)
}

/// Makes the kernel tell the kind of thread with each call that the program does not allow (`SECCOMP_RET_DATA`,
/// seccomp(2)). Of several filters that refuse a call, it tells that of the one which was installed last.
fn name_the_thread(program: &mut BpfProgram, kind: ThreadKind) {
    /// `BPF_RET | BPF_K` in `linux/bpf_common.h`.
    const RETURN: u16 = 0x06;
    for instruction in program {
        if instruction.code == RETURN && instruction.k == libc::SECCOMP_RET_TRAP {
            instruction.k |= kind as u32;
        }
    }
}

/// A program that lets clone3(2) fail as on a kernel without it. A filter cannot see the flags that it is given,
/// because they are in memory; glibc makes its threads with clone(2) then, whose flags are an argument.
fn clone3_is_unknown(kind: ThreadKind) -> Result<BpfProgram, FilterError> {
    let failed = |source| FilterError::Compile { thread: kind.name(), source };
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, unknown, TargetArch::x86_64);
    filter.map_err(failed)?.try_into().map_err(failed)
}
