//! The end-to-end tests: stock containerd on a real node, asked over CRI as kubelet asks. `scripts/test e2e` runs them.
//!
//! With `PERICARP_TEST_RUNTIME=runc` the same tests run against containerd's default runtime, which shows that what
//! they expect is containerd's behaviour.

mod controller;
mod cri;
mod machine;
mod network;
mod parity;
mod resilience;
mod validation;
