//! A pod's numbers, as containerd's own runtimes give them for a cgroup v2.

use std::{fs, path::Path};

use prost::{Message as _, Name};

/// `io.containerd.cgroups.v2.Metrics` of containerd's cgroups module (`cgroup2/stats/metrics.proto`),
/// those fields that mean something for a machine.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metrics {
    /// Threads of the machine.
    #[prost(message, optional, tag = "1")]
    pub pids: Option<Pids>,
    /// CPU time of the machine, the guest's included.
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<Cpu>,
    /// Host memory of the machine, the guest's included.
    #[prost(message, optional, tag = "4")]
    pub memory: Option<Memory>,
}

impl Name for Metrics {
    const NAME: &'static str = "Metrics";
    const PACKAGE: &'static str = "io.containerd.cgroups.v2";
}

/// `PidsStat`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Pids {
    /// pids.current
    #[prost(uint64, tag = "1")]
    pub current: u64,
    /// pids.max, 0 for none
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

/// `CPUStat`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Cpu {
    /// In microseconds.
    #[prost(uint64, tag = "1")]
    pub usage_usec: u64,
    /// In microseconds.
    #[prost(uint64, tag = "2")]
    pub user_usec: u64,
    /// In microseconds.
    #[prost(uint64, tag = "3")]
    pub system_usec: u64,
    /// Periods with a limit.
    #[prost(uint64, tag = "4")]
    pub nr_periods: u64,
    /// Those in which the limit was hit.
    #[prost(uint64, tag = "5")]
    pub nr_throttled: u64,
    /// In microseconds.
    #[prost(uint64, tag = "6")]
    pub throttled_usec: u64,
}

/// `MemoryStat`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Memory {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub anon: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub file: u64,
    /// Bytes.
    #[prost(uint64, tag = "6")]
    pub shmem: u64,
    /// Bytes; what kubelet subtracts from the usage for the working set.
    #[prost(uint64, tag = "13")]
    pub inactive_file: u64,
    /// Number of page faults.
    #[prost(uint64, tag = "18")]
    pub pgfault: u64,
    /// Number of major page faults.
    #[prost(uint64, tag = "19")]
    pub pgmajfault: u64,
    /// memory.current, bytes.
    #[prost(uint64, tag = "32")]
    pub usage: u64,
    /// memory.max, bytes; the greatest number for none.
    #[prost(uint64, tag = "33")]
    pub usage_limit: u64,
    /// memory.swap.current, bytes.
    #[prost(uint64, tag = "34")]
    pub swap_usage: u64,
}

impl Metrics {
    /// Reads a cgroup's files. A controller that is not enabled is left out.
    pub fn read(cgroup: &Path) -> Metrics {
        let file = |name: &str| fs::read_to_string(cgroup.join(name)).ok();
        let number = |name: &str| file(name)?.trim().parse::<u64>().ok();
        let pids =
            number("pids.current").map(|current| Pids { current, limit: number("pids.max").unwrap_or(0) });
        let cpu = file("cpu.stat").map(|stat| {
            let get = |key: &str| field(&stat, key);
            Cpu {
                usage_usec: get("usage_usec"),
                user_usec: get("user_usec"),
                system_usec: get("system_usec"),
                nr_periods: get("nr_periods"),
                nr_throttled: get("nr_throttled"),
                throttled_usec: get("throttled_usec"),
            }
        });
        let memory = number("memory.current").map(|usage| {
            let stat = file("memory.stat").unwrap_or_default();
            let get = |key: &str| field(&stat, key);
            Memory {
                anon: get("anon"),
                file: get("file"),
                shmem: get("shmem"),
                inactive_file: get("inactive_file"),
                pgfault: get("pgfault"),
                pgmajfault: get("pgmajfault"),
                usage,
                usage_limit: number("memory.max").unwrap_or(u64::MAX),
                swap_usage: number("memory.swap.current").unwrap_or(0),
            }
        });
        Metrics { pids, cpu, memory }
    }

    /// As Go's `typeurl` names it: the full name without a prefix.
    pub fn to_any(&self) -> prost_types::Any {
        prost_types::Any { type_url: Metrics::full_name(), value: self.encode_to_vec() }
    }
}

/// A number in one of a cgroup's files of keys and values; 0 if it is not there.
pub fn field(stat: &str, key: &str) -> u64 {
    stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroups_files_are_read_and_missing_controllers_left_out() {
        let cgroup = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(cgroup.path().join(name), text).unwrap();
        write("cpu.stat", "usage_usec 120\nuser_usec 100\nsystem_usec 20\n");
        write("memory.current", "4096\n");
        write("memory.max", "max\n");
        write("memory.stat", "anon 100\nfile 7\nfile_mapped 9\ninactive_file 5\n");
        let metrics = Metrics::read(cgroup.path());
        assert_eq!(metrics.cpu.as_ref().map(|cpu| (cpu.usage_usec, cpu.system_usec)), Some((120, 20)));
        let memory = metrics.memory.clone().unwrap();
        assert_eq!(
            (memory.usage, memory.usage_limit, memory.file, memory.inactive_file),
            (4096, u64::MAX, 7, 5)
        );
        assert_eq!(metrics.pids, None);
        assert_eq!(metrics.to_any().type_url, "io.containerd.cgroups.v2.Metrics");
    }
}
