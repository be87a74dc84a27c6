//! What a test has asked for.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

use super::calls;
use crate::thread_kind::ThreadKind;

/// The kind of thread and the call.
static REQUESTED: OnceLock<(String, String)> = OnceLock::new();
/// Whether the pod has started. An attack before that would only keep it from starting.
static ALLOWED: AtomicBool = AtomicBool::new(false);

/// Reads what is asked for, before any thread may be restricted.
pub fn prepare() {
    let Ok(request) = std::env::var(super::VARIABLE) else { return };
    if let Some((kind, call)) = request.trim().split_once(' ') {
        REQUESTED.get_or_init(|| (kind.to_owned(), call.to_owned()));
    }
}

/// Lets the attack begin.
pub fn allow() {
    ALLOWED.store(true, Ordering::Release);
}

pub fn act(kind: ThreadKind) {
    let Some((thread, call)) = REQUESTED.get() else { return };
    if ALLOWED.load(Ordering::Acquire) && *thread == kind.name() {
        let returned = calls::make(call);
        tracing::error!(thread, call, returned, "a call of an attacker has returned");
    }
}
