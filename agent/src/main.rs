//! `pericarp-agent`: PID 1 of a pod's guest.
//!
//! The agent serves containerd's Task API and stdio streams over vsock, and runs containers. The same binary is also
//! the short-lived process that creates another one (see [`launch`]), and the first process of a PID namespace that a
//! pod's containers share (see [`launch::pause`]).
//!
//! A module uses only modules that come before it in this list:
//!
//! 1. [`ttrpc`]: the server, its connections and listeners.
//! 2. [`resources`]: cgroups, their limits and counters.
//! 3. [`init`]: the guest's boot.
//! 4. [`stdio`]: the streams of processes.
//! 5. [`launch`]: creates and reaps processes.
//! 6. [`pod`]: the pod's configuration, namespaces, network, volumes and devices.
//! 7. [`container`]: containers and their processes.
//! 8. [`controller`]: the conversation with the controller.
//! 9. [`task`]: containerd's Task API.
//! 10. [`serve`]: connects all of them.

mod container;
mod controller;
mod init;
mod launch;
mod pod;
mod resources;
mod serve;
mod stdio;
mod task;
mod ttrpc;

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> =
        env::args_os().skip(1).filter_map(|argument| argument.into_string().ok()).collect();
    match arguments.first().map(String::as_str) {
        Some(launch::HELPER_ARGUMENT) => launch::helper::main(&arguments[1..], pod::namespaces::create),
        Some(launch::PAUSE_ARGUMENT) => launch::pause::main(),
        Some(launch::HOLD_ARGUMENT) => launch::pause::reap_until_killed(),
        Some("serve-on-sockets") => serve::serve_on_sockets(&arguments[1..]),
        _ if std::process::id() == 1 => serve::serve_as_init(),
        _ => {
            eprintln!("pericarp-agent is PID 1 of a Pericarp guest; it cannot be run by hand.");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
    };

    /// The modules in the order that this file's documentation demands.
    fn order() -> Vec<String> {
        let documentation = fs::read_to_string(source().join("main.rs")).unwrap();
        let module =
            |line: &str| Some(line.strip_prefix("//! ")?.split_once(". [`")?.1.split_once('`')?.0.to_owned());
        documentation.lines().filter_map(module).collect()
    }

    fn source() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
    }

    /// Every source file at or below a path.
    fn files(path: PathBuf) -> Vec<PathBuf> {
        if path.is_file() {
            return vec![path];
        }
        fs::read_dir(path).unwrap().flat_map(|entry| files(entry.unwrap().path())).collect()
    }

    /// The modules that a source text uses, by `crate::name` and by `crate::{name::…, name::…}`.
    fn used<'a>(text: &str, modules: &'a [String]) -> Vec<&'a String> {
        let uses: Vec<&str> = text.split("crate::").skip(1).collect();
        let first = |rest: &str, module: &str| {
            let ends = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
            match rest.strip_prefix('{') {
                None => rest.strip_prefix(module).is_some_and(ends),
                Some(list) => list
                    .split_once("};\n")
                    .map_or(list, |(list, _)| list)
                    .split([',', '{', '}', '\n'])
                    .any(|item| item.trim().strip_prefix(module).is_some_and(ends)),
            }
        };
        modules.iter().filter(|module| uses.iter().any(|rest| first(rest, module))).collect()
    }

    #[test]
    fn a_module_uses_only_modules_that_come_before_it() {
        let order = order();
        assert_eq!(order.len(), 10, "{order:?}");
        for (position, module) in order.iter().enumerate() {
            let path = source().join(module);
            let path = if path.is_dir() { path } else { path.with_extension("rs") };
            for file in files(path) {
                for other in used(&fs::read_to_string(&file).unwrap(), &order) {
                    let before = order.iter().position(|name| name == other).unwrap() <= position;
                    assert!(before, "{} uses crate::{other}, which comes after {module}", file.display());
                }
            }
        }
    }
}
