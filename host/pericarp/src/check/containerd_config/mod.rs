//! containerd's own configuration: a proxy plugin that leads to the controller, and a runtime that uses it.

mod files;
mod release;

use std::{
    io,
    path::{Path, PathBuf},
};

use pericarp_controller::chain;
use thiserror::Error;

use self::files::{CRI, CRI_RUNTIME, CRI_VERSION_1, Containerd, LoadError, Runtime, load};
pub use self::release::Release;
use super::Finding;
use crate::shim;

const RUNTIME_TYPE: &str = "io.containerd.pericarp.v1";
const RUNC_TYPE: &str = "io.containerd.runc.v2";
const IO_TYPE: &str = "streaming";
/// Both names that containerd knows for plugins of this type.
const SANDBOX_PLUGIN: [&str; 2] = ["sandbox", "io.containerd.sandbox.controller.v1"];
/// The plugins without any of which there is no CRI, in the names of all configuration versions.
const CRI_PLUGINS: [&str; 3] = [CRI_RUNTIME, CRI, CRI_VERSION_1];
/// The files beside the main one that `containerd config default` imports from 2.2 on.
const DROP_INS: &str = "conf.d/*.toml";
const GUIDE: &str = "see docs/operators.md for what containerd must be told";

impl Runtime {
    /// Whether containerd takes our program for its shim: by its own type or, for the sake of what some releases of
    /// containerd ask only runtimes of runc's type, by its path.
    fn is_ours(&self) -> bool {
        self.kind == RUNTIME_TYPE || self.kind == RUNC_TYPE && self.has_our_path()
    }

    fn has_our_path(&self) -> bool {
        self.path.is_absolute() && self.path.file_name() == Some(shim::PROGRAM.as_ref())
    }
}

/// Why containerd's pods would not come to the controller. The text says what was found.
#[derive(Debug, PartialEq, Eq, Error)]
enum Problem {
    #[error("the CRI plugin is disabled")]
    Disabled { name: String },
    #[error("no proxy plugin has the controller's address {socket}{others}", socket = socket.display())]
    NoPlugin { socket: PathBuf, others: String },
    #[error("proxy plugin {plugin:?} has the type {found:?}")]
    PluginType { plugin: String, found: String },
    #[error("no runtime has the sandboxer {plugin:?}")]
    NoRuntime { plugin: String },
    #[error("runtime {runtime:?} has the runtime_type {found:?}")]
    RuntimeType { runtime: String, found: String },
    #[error("runtime {runtime:?} has the runtime_path {found}, which is not our program's", found = found.display())]
    RuntimePath { runtime: String, found: PathBuf },
    #[error("runtime {runtime:?} has no io_type")]
    NoIoType { runtime: String },
    #[error("runtime {runtime:?} has the io_type {found:?}")]
    IoType { runtime: String, found: String },
    #[error("runtime {runtime:?} has options, which break the calls to a pod's containers")]
    Options { runtime: String },
    #[error("a runtime leads to the controller in {pattern}, which no file imports", pattern = pattern.display())]
    NotImported { pattern: PathBuf },
}

impl Problem {
    fn to_do(&self) -> String {
        let change = match self {
            Self::Disabled { name } => format!("take {name:?} out of disabled_plugins"),
            Self::NoPlugin { socket, .. } => format!(
                "let a [proxy_plugins.pericarp] have type = 'sandbox' and address = '{}'",
                socket.display()
            ),
            Self::PluginType { plugin, .. } => format!("give [proxy_plugins.{plugin}] type = 'sandbox'"),
            Self::NoRuntime { plugin } => format!(
                "add [plugins.'{CRI_RUNTIME}'.containerd.runtimes.pericarp] with runtime_type = '{RUNTIME_TYPE}', \
                 sandboxer = '{plugin}' and io_type = '{IO_TYPE}'",
            ),
            Self::RuntimeType { runtime, .. } => {
                format!("give runtime {runtime:?} runtime_type = '{RUNTIME_TYPE}'")
            }
            Self::RuntimePath { runtime, .. } => format!(
                "take the runtime_path off runtime {runtime:?}, or let it be the absolute path of {}",
                shim::PROGRAM
            ),
            Self::NoIoType { runtime } | Self::IoType { runtime, .. } => {
                format!("give runtime {runtime:?} io_type = '{IO_TYPE}'")
            }
            Self::Options { runtime } => format!("take the options off runtime {runtime:?}"),
            Self::NotImported { pattern } => {
                format!("add imports = ['{}'] to the top of the main file", pattern.display())
            }
        };
        format!("{change}, and restart containerd")
    }
}

impl LoadError {
    fn to_do(&self, main: &Path) -> String {
        match self {
            Self::Read { path, source } if path == main && source.kind() == io::ErrorKind::NotFound => {
                format!(
                    "make the file, without which containerd reads no other (`containerd config default` prints one); \
                     {GUIDE}"
                )
            }
            Self::TooNew { newest, .. } => {
                format!("write the file for version {newest}, or use a newer containerd; {GUIDE}")
            }
            Self::NewerImport { main, .. } => {
                format!("set version = {main} in the imported file, and restart containerd")
            }
            _ => GUIDE.to_owned(),
        }
    }
}

/// Whether containerd of this release, configured by the file at `path`, brings pods to the controller's `socket`. If
/// the release is not known, the file is read as the newest one does it.
pub fn check(path: &Path, socket: &Path, release: Option<Release>) -> Finding {
    let rules = release.unwrap_or(Release::NEWEST_KNOWN);
    let config = match load(path, rules, None) {
        Ok(config) => config,
        Err(error) => return Finding::failed(chain(&error), error.to_do(path)),
    };
    match judge(&config, socket) {
        Ok(runtimes) => {
            let pulling = runtimes.iter().find(|name| !config.runtimes[**name].disable_pause_image_pull);
            match pulling {
                Some(name) if release.is_some_and(Release::has_disable_pause_image_pull) => Finding::warning(
                    format!(
                        "{}: runtime {name:?} leads to the controller, but containerd pulls the image of a pause \
                         container before it starts a pod, which then fails without that image",
                        path.display()
                    ),
                    format!("give runtime {name:?} disable_pause_image_pull = true, and restart containerd"),
                ),
                _ => Finding::ok(format!(
                    "{}: runtime {} leads to the controller",
                    path.display(),
                    runtimes.join(", ")
                )),
            }
        }
        Err(problem) => {
            let problem = not_imported(path, rules, socket).unwrap_or(problem);
            Finding::failed(format!("{}: {problem}", path.display()), problem.to_do())
        }
    }
}

/// Whether all would be well if the drop-in files were imported.
fn not_imported(path: &Path, release: Release, socket: &Path) -> Option<Problem> {
    let config = load(path, release, Some(DROP_INS)).ok()?;
    judge(&config, socket).ok()?;
    Some(Problem::NotImported { pattern: path.with_file_name(DROP_INS) })
}

/// The names of the runtimes that lead to the controller.
fn judge<'a>(config: &'a Containerd, socket: &Path) -> Result<Vec<&'a str>, Problem> {
    if let Some(name) = config.disabled_plugins.iter().find(|name| CRI_PLUGINS.contains(&name.as_str())) {
        return Err(Problem::Disabled { name: name.clone() });
    }
    let plugins = &config.proxy_plugins;
    let (plugin, proxy) = plugins.iter().find(|(_, proxy)| proxy.address == socket).ok_or_else(|| {
        let others = plugins
            .iter()
            .filter(|(_, proxy)| SANDBOX_PLUGIN.contains(&proxy.kind.as_str()))
            .map(|(name, proxy)| format!("; {name:?} has {}", proxy.address.display()))
            .collect::<Vec<_>>()
            .concat();
        Problem::NoPlugin { socket: socket.into(), others }
    })?;
    if !SANDBOX_PLUGIN.contains(&proxy.kind.as_str()) {
        return Err(Problem::PluginType { plugin: plugin.clone(), found: proxy.kind.clone() });
    }
    let runtimes = config
        .runtimes
        .iter()
        .filter(|(_, runtime)| runtime.sandboxer == *plugin)
        .map(|(name, runtime)| judge_runtime(name, runtime).map(|()| name.as_str()))
        .collect::<Result<Vec<_>, _>>()?;
    if runtimes.is_empty() {
        return Err(Problem::NoRuntime { plugin: plugin.clone() });
    }
    Ok(runtimes)
}

fn judge_runtime(name: &str, runtime: &Runtime) -> Result<(), Problem> {
    let name = name.to_owned();
    if !runtime.is_ours() {
        return Err(Problem::RuntimeType { runtime: name, found: runtime.kind.clone() });
    }
    if !runtime.path.as_os_str().is_empty() && !runtime.has_our_path() {
        return Err(Problem::RuntimePath { runtime: name, found: runtime.path.clone() });
    }
    if runtime.io_type.is_empty() {
        return Err(Problem::NoIoType { runtime: name });
    }
    if runtime.io_type != IO_TYPE {
        return Err(Problem::IoType { runtime: name, found: runtime.io_type.clone() });
    }
    if !runtime.options.is_empty() {
        return Err(Problem::Options { runtime: name });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
