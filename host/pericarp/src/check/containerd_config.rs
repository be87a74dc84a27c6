//! containerd's own configuration: a proxy plugin that leads to the controller, and a runtime that uses it.
//!
//! Files are read and merged as containerd 2.1 does it (`cmd/containerd/server/config.LoadConfig`).

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use pericarp_controller::chain;
use serde::Deserialize;
use thiserror::Error;
use toml::{Table, Value};

use super::Finding;
use crate::shim;

const RUNTIME_TYPE: &str = "io.containerd.pericarp.v1";
const RUNC_TYPE: &str = "io.containerd.runc.v2";
const IO_TYPE: &str = "streaming";
/// Both names that containerd knows for plugins of this type.
const SANDBOX_PLUGIN: [&str; 2] = ["sandbox", "io.containerd.sandbox.controller.v1"];
/// The plugin that serves CRI, in the names of configuration versions 3, 2 and 1.
const CRI_PLUGIN: [&str; 3] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri"];

/// What matters here of the configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Containerd {
    version: u32,
    disabled_plugins: Vec<String>,
    proxy_plugins: BTreeMap<String, ProxyPlugin>,
    plugins: Plugins,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ProxyPlugin {
    #[serde(rename = "type")]
    kind: String,
    address: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Plugins {
    #[serde(rename = "io.containerd.cri.v1.runtime")]
    cri: Cri,
    #[serde(rename = "io.containerd.grpc.v1.cri")]
    cri_version_2: Cri,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cri {
    containerd: Runtimes,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Runtimes {
    runtimes: BTreeMap<String, Runtime>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Runtime {
    #[serde(rename = "runtime_type")]
    kind: String,
    #[serde(rename = "runtime_path")]
    path: PathBuf,
    sandboxer: String,
    io_type: String,
    options: Table,
}

impl Runtime {
    /// Whether containerd takes our program for its shim: by its own type or, for the sake of what containerd 2.1 asks
    /// only runtimes of runc's type, by its path.
    fn is_ours(&self) -> bool {
        self.kind == RUNTIME_TYPE
            || self.kind == RUNC_TYPE && self.path.file_name() == Some(shim::PROGRAM.as_ref())
    }
}

impl Containerd {
    /// The runtimes that CRI has. Those of version 2 count only where the file says that it is of that version
    /// (`plugins/cri/runtime.configMigration`).
    fn runtimes(&self) -> &BTreeMap<String, Runtime> {
        let (current, old) = (&self.plugins.cri.containerd, &self.plugins.cri_version_2.containerd);
        if self.version < 3 && current.runtimes.is_empty() { &old.runtimes } else { &current.runtimes }
    }
}

/// The configuration cannot be read.
#[derive(Debug, Error)]
enum LoadError {
    #[error("{path} cannot be read", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is not valid", path = path.display())]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("{path} imports {pattern:?}, which is no valid pattern", path = path.display())]
    Pattern { path: PathBuf, pattern: String },
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
    #[error("runtime {runtime:?} has {}", if found.is_empty() { "no io_type".into() } else { format!("the io_type {found:?}") })]
    IoType { runtime: String, found: String },
    #[error("runtime {runtime:?} has options, which break the calls to a pod's containers")]
    Options { runtime: String },
}

impl Problem {
    fn to_do(&self) -> String {
        let change = match self {
            Problem::Disabled { name } => format!("take {name:?} out of disabled_plugins"),
            Problem::NoPlugin { socket, .. } => format!(
                "let a [proxy_plugins.pericarp] have type = 'sandbox' and address = '{}'",
                socket.display()
            ),
            Problem::PluginType { plugin, .. } => format!("give [proxy_plugins.{plugin}] type = 'sandbox'"),
            Problem::NoRuntime { plugin } => format!(
                "add [plugins.'{}'.containerd.runtimes.pericarp] with runtime_type = '{RUNTIME_TYPE}', \
                 sandboxer = '{plugin}' and io_type = '{IO_TYPE}'",
                CRI_PLUGIN[0]
            ),
            Problem::RuntimeType { runtime, .. } => {
                format!("give runtime {runtime:?} runtime_type = '{RUNTIME_TYPE}'")
            }
            Problem::IoType { runtime, .. } => format!("give runtime {runtime:?} io_type = '{IO_TYPE}'"),
            Problem::Options { runtime } => format!("take the options off runtime {runtime:?}"),
        };
        format!("{change}, and restart containerd")
    }
}

/// Whether containerd, configured by the file at `path`, brings pods to the controller's `socket`.
pub fn check(path: &Path, socket: &Path) -> Finding {
    let config = match load(path) {
        Ok(config) => config,
        Err(error) => {
            return Finding::failed(chain(&error), "see docs/operators.md for what containerd must be told");
        }
    };
    match judge(&config, socket) {
        Ok(runtimes) => Finding::ok(format!(
            "{}: runtime {} leads to the controller",
            path.display(),
            runtimes.join(", ")
        )),
        Err(problem) => Finding::failed(format!("{}: {problem}", path.display()), problem.to_do()),
    }
}

/// The names of the runtimes that lead to the controller.
fn judge(config: &Containerd, socket: &Path) -> Result<Vec<String>, Problem> {
    if let Some(name) = config.disabled_plugins.iter().find(|name| CRI_PLUGIN.contains(&name.as_str())) {
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
        .runtimes()
        .iter()
        .filter(|(_, runtime)| runtime.sandboxer == *plugin)
        .map(|(name, runtime)| judge_runtime(name, runtime).map(|()| name.clone()))
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
    if runtime.io_type != IO_TYPE {
        return Err(Problem::IoType { runtime: name, found: runtime.io_type.clone() });
    }
    if !runtime.options.is_empty() {
        return Err(Problem::Options { runtime: name });
    }
    Ok(())
}

/// Reads a configuration file and all that it imports.
fn load(path: &Path) -> Result<Containerd, LoadError> {
    let mut merged = Table::new();
    let mut loaded = HashSet::new();
    let mut pending = VecDeque::from([path.to_owned()]);
    while let Some(path) = pending.pop_front() {
        if !loaded.insert(path.clone()) {
            continue;
        }
        let text =
            fs::read_to_string(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
        let file: Table = toml::from_str(&text)
            .map_err(|source| LoadError::Parse { path: path.clone(), source: Box::new(source) })?;
        pending.extend(imports(&path, &file)?);
        merge_file(&mut merged, file);
    }
    merged.try_into().map_err(|source| LoadError::Parse { path: path.into(), source: Box::new(source) })
}

/// The files that a file imports. A pattern that matches none is no error, a plain path to no file is.
fn imports(path: &Path, file: &Table) -> Result<Vec<PathBuf>, LoadError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut imports = Vec::new();
    for pattern in file.get("imports").and_then(Value::as_array).into_iter().flatten() {
        let pattern = pattern.as_str().unwrap_or_default();
        let import = directory.join(pattern);
        if !pattern.contains('*') {
            imports.push(import);
            continue;
        }
        let wrong = || LoadError::Pattern { path: path.into(), pattern: pattern.into() };
        let matches = glob::glob(import.to_str().ok_or_else(wrong)?).map_err(|_| wrong())?;
        imports.extend(matches.flatten());
    }
    Ok(imports)
}

/// Puts a file's settings over those of the files before it.
fn merge_file(merged: &mut Table, mut file: Table) {
    let proxy_plugins = file.remove("proxy_plugins");
    merge(merged, file);
    match (merged.get_mut("proxy_plugins"), proxy_plugins) {
        // A later plugin takes the place of an earlier one of its name as a whole.
        (Some(Value::Table(earlier)), Some(Value::Table(later))) => earlier.extend(later),
        (_, Some(value)) => {
            merged.insert("proxy_plugins".into(), value);
        }
        (_, None) => {}
    }
}

fn merge(earlier: &mut Table, later: Table) {
    for (key, value) in later {
        match (earlier.get_mut(&key), value) {
            (Some(Value::Table(earlier)), Value::Table(later)) => merge(earlier, later),
            (Some(Value::Array(earlier)), Value::Array(later)) => earlier.extend(later),
            (_, value) => {
                earlier.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
#[path = "containerd_config_tests.rs"]
mod tests;
