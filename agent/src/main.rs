//! `pericarp-agent`: PID 1 of a pod's guest.
//!
//! Serves containerd's Task API and stdio streams over vsock, and runs containers. The same binary
//! is also the short-lived process that makes a container (see [`runtime`]) and the first process
//! of a pod's shared PID namespace (see [`runtime::pause`]).

mod boot;
mod cgroup;
mod devices;
mod events;
mod forward;
mod host;
mod huge_pages;
mod network;
mod pod;
mod runtime;
mod server;
mod service;
mod stdio;
mod task;
mod volumes;

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> =
        env::args_os().skip(1).filter_map(|argument| argument.into_string().ok()).collect();
    match arguments.first().map(String::as_str) {
        Some(runtime::HELPER_ARGUMENT) => runtime::helper::main(&arguments[1..]),
        Some(runtime::PAUSE_ARGUMENT) => runtime::pause::main(),
        Some(runtime::HOLD_ARGUMENT) => runtime::pause::hold(),
        Some("serve-on-sockets") => service::serve_on_sockets(&arguments[1..]),
        _ if std::process::id() == 1 => service::serve_as_init(),
        _ => {
            eprintln!("pericarp-agent is PID 1 of a Pericarp guest; it cannot be run by hand.");
            ExitCode::FAILURE
        }
    }
}
