//! What somebody who has captured a thread of the machine would try, which a test can have a thread do.
//!
//! It does so only with the feature `fault-points`, which no package of Pericarp is built with.

#[cfg(any(test, feature = "fault-points"))]
pub mod calls;
#[cfg(feature = "fault-points")]
mod requested;

#[cfg(feature = "fault-points")]
pub use requested::{allow, prepare};

use crate::thread_kind::ThreadKind;

/// The environment variable with which a test asks for an attack: a kind of thread and a system call.
#[cfg(feature = "fault-points")]
pub const VARIABLE: &str = "PERICARP_ATTACK";

/// A place to which a thread of this kind comes again and again. Attacks if a test has asked for that here.
#[cfg(feature = "fault-points")]
pub fn reached(kind: ThreadKind) {
    requested::act(kind);
}

/// Does nothing.
#[cfg(not(feature = "fault-points"))]
pub fn reached(kind: ThreadKind) {
    let _ = kind;
}

/// Does nothing.
#[cfg(not(feature = "fault-points"))]
pub fn prepare() {}

/// Does nothing.
#[cfg(not(feature = "fault-points"))]
pub fn allow() {}
