//! What critest, the validation suite of CRI (kubernetes-sigs/cri-tools, `pkg/validate`), asks of a runtime and no
//! other test here does: with requests as minimal as its own, which kubelet never sends.
//!
//! In them a PID namespace is the pod's, no cgroup, host name, log or profile is named, and the attempt is the third.
//! docs/compatibility.md says which of its specs cannot pass.

mod lifecycle;
mod mounts;
mod ports;
mod security;
