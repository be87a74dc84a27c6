//! Runs real containers through the agent's Task API, on this machine instead of in a guest: the
//! agent serves on a unix socket, in namespaces of its own. Needs root and a static busybox.

mod harness;
mod lifecycle;
mod streams;
