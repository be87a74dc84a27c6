//! containerd's configuration files, read and merged as containerd does it (`cmd/containerd/server/config`,
//! `LoadConfig`).
//!
//! containerd reads the main file and what that imports, and nothing else. The pattern `/etc/containerd/conf.d/*.toml`
//! among the defaults of 2.2 and later is what `containerd config default` writes; it has no effect if a file does not
//! have it.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};
use thiserror::Error;
use toml::{Table, Value};

use super::release::Release;

/// The plugin with CRI's runtimes, from configuration version 3 on.
pub const CRI_RUNTIME: &str = "io.containerd.cri.v1.runtime";
/// The plugin that had CRI's runtimes in configuration version 2. It still serves CRI.
pub const CRI: &str = "io.containerd.grpc.v1.cri";
/// The name of [`CRI`] in configuration version 1, of which a file without a version is.
pub const CRI_VERSION_1: &str = "cri";

/// What matters here of the configuration.
#[derive(Debug, Default)]
pub struct Containerd {
    pub disabled_plugins: Vec<String>,
    pub proxy_plugins: BTreeMap<String, ProxyPlugin>,
    pub runtimes: BTreeMap<String, Runtime>,
}

/// A plugin that is another program.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct ProxyPlugin {
    #[serde(rename = "type")]
    pub kind: String,
    pub address: PathBuf,
}

/// A runtime of CRI's.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Runtime {
    #[serde(rename = "runtime_type")]
    pub kind: String,
    #[serde(rename = "runtime_path")]
    pub path: PathBuf,
    pub sandboxer: String,
    pub io_type: String,
    pub disable_pause_image_pull: bool,
    pub options: Table,
}

/// The configuration cannot be read.
#[derive(Debug, Error)]
pub enum LoadError {
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
    #[error("{path} is of version {version}, and {release} reads versions up to {newest}", path = path.display())]
    TooNew { path: PathBuf, version: u32, newest: u32, release: Release },
    #[error(
        "{path} is of version {version}, which is newer than version {main} of the file that imports it; {release} \
         refuses that",
        path = path.display()
    )]
    NewerImport { path: PathBuf, version: u32, main: u32, release: Release },
}

/// One configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    version: u32,
    imports: Vec<String>,
    disabled_plugins: Vec<String>,
    proxy_plugins: Table,
    plugins: Table,
}

/// Reads a configuration file and all that it imports, as `release` does; `additional` is a pattern of files that the
/// main file is taken to import too.
pub fn load(path: &Path, release: Release, additional: Option<&str>) -> Result<Containerd, LoadError> {
    let newest = release.newest_config_version();
    let mut merged = File { version: newest, ..File::default() };
    let mut main = 0;
    let mut loaded = HashSet::new();
    let mut pending = VecDeque::from([path.to_owned()]);
    while let Some(current) = pending.pop_front() {
        if !loaded.insert(current.clone()) {
            continue;
        }
        let mut file = read(&current)?;
        let version = file.version;
        if version > newest {
            return Err(LoadError::TooNew { path: current, version, newest, release });
        }
        if main == 0 {
            main = version;
        }
        if release.refuses_newer_imports() && version > main {
            return Err(LoadError::NewerImport { path: current, version, main, release });
        }
        if loaded.len() == 1 {
            file.imports.extend(additional.map(str::to_owned));
        }
        pending.extend(imports(&current, &file.imports)?);
        file.rename_plugins_of_version_1();
        if release.migrates_each_file() {
            file.migrate_runtimes(newest);
            file.version = newest;
        } else if version < 2 {
            file.version = merged.version;
        }
        merged.merge(file);
    }
    merged.migrate_runtimes(newest);
    merged.finish().map_err(|source| LoadError::Parse { path: path.into(), source: Box::new(source) })
}

fn read(path: &Path) -> Result<File, LoadError> {
    let text = fs::read_to_string(path).map_err(|source| LoadError::Read { path: path.into(), source })?;
    toml::from_str(&text).map_err(|source| LoadError::Parse { path: path.into(), source: Box::new(source) })
}

/// The files that a file imports. A pattern that matches none is ignored, a plain path to no file is not.
fn imports(path: &Path, patterns: &[String]) -> Result<Vec<PathBuf>, LoadError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut imports = Vec::new();
    for pattern in patterns {
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

impl File {
    /// Gives CRI's plugin its name of version 2, if this file is of version 1 (`v1Migrate`).
    fn rename_plugins_of_version_1(&mut self) {
        if self.version >= 2 {
            return;
        }
        if let Some(cri) = self.plugins.remove(CRI_VERSION_1) {
            self.plugins.insert(CRI.into(), cri);
        }
        for name in self.disabled_plugins.iter_mut().filter(|name| *name == CRI_VERSION_1) {
            CRI.clone_into(name);
        }
    }

    /// Takes over the runtimes that [`CRI`] has, unless [`CRI_RUNTIME`] has some (`plugins/cri/runtime`,
    /// `configMigration`). containerd does so for every version before its newest, although only version 2 has runtimes
    /// there.
    fn migrate_runtimes(&mut self, newest: u32) {
        if self.version >= newest {
            return;
        }
        let Some(Value::Table(cri)) = self.plugins.get(CRI) else { return };
        let Some(Value::Table(older)) = cri.get("containerd") else { return };
        let Some(Value::Table(mut runtimes)) = older.get("runtimes").cloned() else { return };
        for runtime in runtimes.iter_mut().filter_map(|(_, runtime)| runtime.as_table_mut()) {
            if let Some(sandboxer) = runtime.get("sandbox_mode").cloned() {
                runtime.entry("sandboxer").or_insert(sandboxer);
            }
        }
        let containerd = table(table(&mut self.plugins, CRI_RUNTIME), "containerd");
        containerd.entry("runtimes").or_insert(Value::Table(runtimes));
    }

    /// Puts a later file's settings over those of this one (`mergeConfig`).
    fn merge(&mut self, later: Self) {
        if later.version > 0 {
            self.version = later.version;
        }
        self.disabled_plugins.extend(later.disabled_plugins);
        // A later proxy plugin takes the place of an earlier one of its name as a whole.
        self.proxy_plugins.extend(later.proxy_plugins);
        merge(&mut self.plugins, later.plugins);
    }

    fn finish(self) -> Result<Containerd, toml::de::Error> {
        let runtimes = ["containerd", "runtimes"]
            .into_iter()
            .try_fold(self.plugins.get(CRI_RUNTIME), |value, key| Some(value?.as_table()?.get(key)))
            .flatten();
        Ok(Containerd {
            disabled_plugins: self.disabled_plugins,
            proxy_plugins: typed(self.proxy_plugins)?,
            runtimes: typed(runtimes.and_then(Value::as_table).cloned().unwrap_or_default())?,
        })
    }
}

fn typed<T: DeserializeOwned>(table: Table) -> Result<BTreeMap<String, T>, toml::de::Error> {
    table.into_iter().map(|(name, value)| Ok((name, value.try_into()?))).collect()
}

/// The table below a key. Whatever else is there, which containerd could not use either, gives way.
fn table<'a>(parent: &'a mut Table, key: &str) -> &'a mut Table {
    let value = parent.entry(key).or_insert_with(|| Value::Table(Table::new()));
    if !value.is_table() {
        *value = Value::Table(Table::new());
    }
    match value {
        Value::Table(table) => table,
        _ => unreachable!("it has just been made a table"),
    }
}

/// Merges what plugins are told. Tables are merged by their keys; anything else is replaced, lists too.
fn merge(earlier: &mut Table, later: Table) {
    for (key, value) in later {
        match (earlier.get_mut(&key), value) {
            (Some(Value::Table(earlier)), Value::Table(later)) => merge(earlier, later),
            (_, value) => {
                earlier.insert(key, value);
            }
        }
    }
}
