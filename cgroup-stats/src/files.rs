//! The formats of a cgroup's files (kernel: `Documentation/admin-guide/cgroup-v2.rst`, "Interface Files").
//!
//! Like containerd's reader (containerd/cgroups v3.1.3, `cgroup2/utils.go`), these functions read a number that cannot
//! be parsed as 0, so that one file that a kernel writes differently does not hide all others.

use std::{collections::HashMap, fs, path::Path};

use containerd_shim_protos::{
    cgroups_v2::metrics::{PSIData, PSIStats},
    protobuf::MessageField,
};

/// Reads a file with a single number, or with `max`, which stands for no limit and is returned as [`u64::MAX`]. Returns
/// `None` if there is no such file: the cgroup does not have that controller, or the kernel not that counter.
pub fn number_if_there(file: &Path) -> Option<u64> {
    let content = fs::read_to_string(file).ok()?;
    Some(match content.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or_default(),
    })
}

/// Like [`number_if_there`]; 0 if there is no such file.
pub fn number(file: &Path) -> u64 {
    number_if_there(file).unwrap_or_default()
}

/// Numbers by their keys.
#[derive(Debug, Default)]
pub struct Counters(HashMap<String, u64>);

impl Counters {
    /// Reads a "flat keyed" file, which has one `key value` per line. There are no numbers in a file that cannot be
    /// read.
    pub fn read(file: &Path) -> Self {
        let content = fs::read_to_string(file).unwrap_or_default();
        Self::parse(content.lines().filter_map(|line| line.split_once(' ')))
    }

    /// Parses pairs of keys and numbers. Pairs whose number cannot be parsed are left out.
    pub fn parse<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Self {
        Self(pairs.filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?))).collect())
    }

    /// Whether there are no numbers at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number for a key; 0 if there is none.
    pub fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or_default()
    }
}

/// Reads a pressure file (kernel: `Documentation/accounting/psi.rst`), which has a line
/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and one like it that begins with `full`.
///
/// Returns `None` for a kernel without PSI (`CONFIG_PSI=n`: there is no file), for one whose PSI is disabled (`psi=0`:
/// the file cannot be read), and for a value that cannot be parsed.
pub fn pressure(file: &Path) -> Option<PSIStats> {
    let content = fs::read_to_string(file).ok()?;
    let mut stats = PSIStats::new();
    for line in content.lines() {
        match line.split_once(' ') {
            Some(("some", values)) => stats.some = MessageField::some(pressure_line(values)?),
            Some(("full", values)) => stats.full = MessageField::some(pressure_line(values)?),
            _ => {}
        }
    }
    Some(stats)
}

/// Parses `avg10=0.00 avg60=0.00 avg300=0.00 total=0`: percentages of time, and microseconds.
fn pressure_line(values: &str) -> Option<PSIData> {
    let mut data = PSIData::new();
    for pair in values.split_whitespace() {
        let (key, value) = pair.split_once('=')?;
        match key {
            "avg10" => data.avg10 = value.parse().ok()?,
            "avg60" => data.avg60 = value.parse().ok()?,
            "avg300" => data.avg300 = value.parse().ok()?,
            "total" => data.total = value.parse().ok()?,
            _ => {}
        }
    }
    Some(data)
}
