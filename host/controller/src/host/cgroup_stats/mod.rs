//! What a pod's cgroup has used on the host, in the form in which containerd's runc shim reports a container's cgroup:
//! `io.containerd.cgroups.v2.Metrics` (containerd/cgroups v3.1.3: `cgroup2/stats/metrics.proto`, filled by
//! `cgroup2.Manager.Stat`).
//!
//! A cgroup has only those controllers that the cgroups above it hand on. What a missing controller would count is left
//! out, where runc's shim would report zeros: containerd 2.4 makes CRI's pod statistics of these numbers, and a pod
//! that has used nothing is something else than one of which nothing is known. `Metrics.network` stays empty, because
//! containerd counts network interfaces in the pod's netns.

mod files;

use std::{fs, path::Path};

use pericarp_protos::cgroups::{
    CpuStat, HugeTlbStat, IoEntry, IoStat, MemoryEvents, MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat,
};

pub use self::files::Counters;
use self::files::{number, number_if_there, pressure};

/// Reads all counters of a cgroup. A cgroup that does not exist has none.
pub fn read(cgroup: &Path) -> Metrics {
    Metrics {
        pids: pids(cgroup),
        cpu: cpu(cgroup),
        memory: memory(cgroup),
        rdma: rdma(cgroup),
        io: io(cgroup),
        hugetlb: huge_pages(cgroup),
        memory_events: memory_events(cgroup),
        network: Vec::new(),
    }
}

fn pids(cgroup: &Path) -> Option<PidsStat> {
    let current = number_if_there(&cgroup.join("pids.current"))?;
    Some(PidsStat { current, limit: number(&cgroup.join("pids.max")) })
}

/// Reads `cpu.stat`, which every cgroup has. What is about limits is in it only if the cgroup has the controller.
fn cpu(cgroup: &Path) -> Option<CpuStat> {
    let stat = Counters::read(&cgroup.join("cpu.stat"));
    (!stat.is_empty()).then(|| CpuStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        psi: pressure(&cgroup.join("cpu.pressure")),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
    })
}

fn memory(cgroup: &Path) -> Option<MemoryStat> {
    let usage = number_if_there(&cgroup.join("memory.current"))?;
    let stat = Counters::read(&cgroup.join("memory.stat"));
    // Since Linux 5.9 these are counted apart for anonymous memory and for files.
    let both = |key: &str| stat.get(&format!("{key}_anon")).saturating_add(stat.get(&format!("{key}_file")));
    Some(MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        usage,
        usage_limit: memory_limit(&cgroup.join("memory.max")),
        swap_usage: number(&cgroup.join("memory.swap.current")),
        swap_limit: number(&cgroup.join("memory.swap.max")),
        max_usage: number(&cgroup.join("memory.peak")),
        swap_max_usage: number(&cgroup.join("memory.swap.peak")),
        psi: pressure(&cgroup.join("memory.pressure")),
    })
}

/// Reads a limit of memory. One that cannot be read, which the kernel writes as a positive number or as `max`, is no
/// limit: containerd subtracts what is used from it, and 0 would give an absurd number (`getAvailableBytesV2`).
fn memory_limit(file: &Path) -> u64 {
    number_if_there(file).filter(|limit| *limit > 0).unwrap_or(u64::MAX)
}

fn memory_events(cgroup: &Path) -> Option<MemoryEvents> {
    let events = Counters::read(&cgroup.join("memory.events"));
    (!events.is_empty()).then(|| MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
    })
}

/// Reads `io.stat`, which is empty for as long as nothing has been read or written.
fn io(cgroup: &Path) -> Option<IoStat> {
    let stat = fs::read_to_string(cgroup.join("io.stat")).ok();
    let psi = pressure(&cgroup.join("io.pressure"));
    if stat.is_none() && psi.is_none() {
        return None;
    }
    let usage = stat.unwrap_or_default().lines().filter_map(io_entry).collect();
    Some(IoStat { usage, psi })
}

/// Parses one line of `io.stat`: `253:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn io_entry(line: &str) -> Option<IoEntry> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let counters = Counters::parse(counters.split_whitespace().filter_map(|pair| pair.split_once('=')));
    Some(IoEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: counters.get("rbytes"),
        wbytes: counters.get("wbytes"),
        rios: counters.get("rios"),
        wios: counters.get("wios"),
    })
}

fn rdma(cgroup: &Path) -> Option<RdmaStat> {
    let entries = |content: &str| content.lines().filter_map(rdma_entry).collect();
    let current = fs::read_to_string(cgroup.join("rdma.current")).ok()?;
    let limit = fs::read_to_string(cgroup.join("rdma.max")).unwrap_or_default();
    Some(RdmaStat { current: entries(&current), limit: entries(&limit) })
}

/// Parses one line of `rdma.current` or `rdma.max`: `<device> hca_handle=<number> hca_object=<number>`, with `max` for
/// no limit, which becomes [`u32::MAX`].
fn rdma_entry(line: &str) -> Option<RdmaEntry> {
    let (device, values) = line.split_once(' ')?;
    let value = |key: &str| {
        let value = values.split_whitespace().find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        match value {
            Some("max") => u32::MAX,
            Some(number) => number.parse().unwrap_or_default(),
            None => 0,
        }
    };
    Some(RdmaEntry {
        device: device.to_owned(),
        hca_handles: value("hca_handle"),
        hca_objects: value("hca_object"),
    })
}

/// One entry for each size of huge pages that the kernel has, sorted by the sizes' names.
fn huge_pages(cgroup: &Path) -> Vec<HugeTlbStat> {
    let files = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let size = |name: String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        // `hugetlb.2MB.rsvd.current` counts reservations.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<_> = names.filter_map(size).collect();
    sizes.sort();
    sizes.into_iter().map(|size| huge_pages_of_size(cgroup, size)).collect()
}

fn huge_pages_of_size(cgroup: &Path, pagesize: String) -> HugeTlbStat {
    let file = |name: &str| cgroup.join(format!("hugetlb.{pagesize}.{name}"));
    HugeTlbStat {
        current: number(&file("current")),
        max: number(&file("max")),
        failcnt: Counters::read(&file("events")).get("max"),
        pagesize,
    }
}

#[cfg(test)]
mod tests;
