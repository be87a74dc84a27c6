//! What the controller tells those who run it.

pub mod counters;
pub mod error_chain;
pub mod log_limit;
pub mod rate;
pub mod systemd;
pub mod timeline;
