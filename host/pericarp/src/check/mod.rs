//! `pericarp check`: whether this node can run Pericarp, and what to do where it cannot.
//!
//! Each check returns a [`Finding`]; none changes anything.

mod containerd_config;
mod guest;
mod host;
mod services;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use pericarp_controller::{chain, config::Config};
use serde::Serialize;

#[derive(Args)]
pub struct Arguments {
    /// Look at this only.
    what: Option<What>,
    /// Print the findings as a JSON array.
    #[arg(long)]
    json: bool,
    /// The configuration file (TOML), as for `serve`.
    #[arg(long)]
    config: Option<PathBuf>,
    /// containerd's configuration file.
    #[arg(long, default_value = "/etc/containerd/config.toml")]
    containerd_config: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// Whether KVM works: a tiny guest is run.
    Kvm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Pods may run nonetheless.
    Warning,
    /// No pod will run.
    Failed,
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    status: Status,
    found: String,
    /// What the operator should do; always there unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_do: Option<String>,
}

impl Finding {
    fn ok(found: impl Into<String>) -> Finding {
        Finding { status: Status::Ok, found: found.into(), to_do: None }
    }

    fn warning(found: impl Into<String>, to_do: impl Into<String>) -> Finding {
        Finding { status: Status::Warning, found: found.into(), to_do: Some(to_do.into()) }
    }

    fn failed(found: impl Into<String>, to_do: impl Into<String>) -> Finding {
        Finding { status: Status::Failed, found: found.into(), to_do: Some(to_do.into()) }
    }
}

/// A finding and what it is about.
#[derive(Debug, Serialize)]
struct Item {
    name: &'static str,
    #[serde(flatten)]
    finding: Finding,
}

/// Makes the checks and prints what they found; returns whether none has failed. `usual_config` is where the
/// configuration is if the arguments name none.
pub fn run(arguments: &Arguments, usual_config: &Path) -> io::Result<bool> {
    let items = match arguments.what {
        Some(What::Kvm) => vec![Item { name: "kvm", finding: host::kvm() }],
        None => everything(arguments, usual_config)?,
    };
    let mut stdout = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut stdout, &items)?;
        writeln!(stdout)?;
    } else {
        print(&mut stdout, &items)?;
    }
    Ok(items.iter().all(|item| item.finding.status != Status::Failed))
}

fn everything(arguments: &Arguments, usual_config: &Path) -> io::Result<Vec<Item>> {
    let item = |name, finding| Item { name, finding };
    let mut items = vec![
        item("kvm", host::kvm()),
        item("kernel", host::kernel()),
        item("cgroups", host::cgroups()),
        item("overlayfs", host::overlayfs()),
        item("tun", host::tun()),
        item("jail", host::jail()),
        item("port-forward", host::port_forward()),
    ];
    let path = arguments.config.as_deref().unwrap_or(usual_config);
    let config = match Config::load(path, arguments.config.is_none()) {
        Ok(config) => config,
        Err(error) => {
            let to_do = "correct it; the checks that depend on it were left out";
            items.push(item("config", Finding::failed(chain(&error), to_do)));
            return Ok(items);
        }
    };
    let socket = config.controller_socket();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (containerd, release) = runtime.block_on(services::containerd(&config.containerd_address));
    let containerd_config = containerd_config::check(&arguments.containerd_config, &socket, release);
    items.extend([
        item("config", Finding::ok(where_from(path))),
        item("guest-kernel", guest::kernel(&config.kernel)),
        item("initramfs", guest::initramfs(&config.initramfs)),
        item("containerd", containerd),
        item("containerd-config", containerd_config),
        item("controller", runtime.block_on(services::controller(&socket))),
    ]);
    Ok(items)
}

/// Where the settings come from, after they have been loaded.
fn where_from(path: &Path) -> String {
    let path_shown = path.display();
    if path.exists() {
        format!("{path_shown} is valid")
    } else {
        format!("the defaults hold; there is no {path_shown}")
    }
}

/// A line to each item, and a second one for what is to be done.
fn print(out: &mut impl Write, items: &[Item]) -> io::Result<()> {
    let width = items.iter().map(|item| item.name.len()).max().unwrap_or(0);
    for Item { name, finding } in items {
        let status = match finding.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failed => "failed",
        };
        writeln!(out, "{status:7} {name:width$}  {}", finding.found)?;
        if let Some(to_do) = &finding.to_do {
            writeln!(out, "        to do: {to_do}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items() -> Vec<Item> {
        vec![
            Item { name: "kvm", finding: Finding::ok("works") },
            Item { name: "controller", finding: Finding::warning("does not run", "start it") },
        ]
    }

    #[test]
    fn an_item_is_a_line_and_what_is_to_be_done_another() {
        let mut out = Vec::new();
        print(&mut out, &items()).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "ok      kvm         works\nwarning controller  does not run\n        to do: start it\n"
        );
    }

    #[test]
    fn json_has_something_to_do_only_where_not_all_is_well() {
        assert_eq!(
            serde_json::to_value(items()).unwrap(),
            serde_json::json!([
                { "name": "kvm", "status": "ok", "found": "works" },
                { "name": "controller", "status": "warning", "found": "does not run", "to_do": "start it" },
            ])
        );
    }

    #[test]
    fn a_configuration_that_cannot_be_read_is_a_finding() {
        let arguments = Arguments {
            what: None,
            json: false,
            config: Some("/nonexistent/pericarp.toml".into()),
            containerd_config: "/nonexistent/containerd.toml".into(),
        };
        let items = everything(&arguments, Path::new("/nonexistent")).unwrap();
        let last = items.last().unwrap();
        assert_eq!((last.name, last.finding.status), ("config", Status::Failed));
    }
}
