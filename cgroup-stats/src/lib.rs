//! What a cgroup of version 2 has used, in the form in which containerd's runc shim reports it:
//! `io.containerd.cgroups.v2.Metrics` (containerd/cgroups v3.1.3: `cgroup2/stats/metrics.proto`, filled by
//! `cgroup2.Manager.Stat`). The agent reads containers' cgroups in the guest, the controller pods' on the host.
//!
//! What the cgroup has no files for is left out: containerd 2.4 makes CRI's pod statistics of these numbers, and a pod
//! that has used nothing is something else than one of which nothing is known. `Metrics.network` stays empty, because
//! containerd counts network interfaces in the pod's netns.

mod files;

use std::{fs, path::Path};

pub use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, PidsStat, RdmaEntry, RdmaStat,
};

pub use self::files::Counters;
use self::files::{number, number_if_there, pressure};

/// containerd's name for [`Metrics`]. Go's `typeurl` names a message by its full name, without a prefix, and containerd
/// takes no other type (`decodeSandboxCgroupMetrics`).
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads all counters of a cgroup. A cgroup that does not exist has none.
pub fn read(cgroup: &Path) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.pids = pids(cgroup).into();
    metrics.cpu = cpu(cgroup).into();
    metrics.memory = memory(cgroup).into();
    metrics.memory_events = memory_events(cgroup).into();
    metrics.io = io(cgroup).into();
    metrics.rdma = rdma(cgroup).into();
    metrics.hugetlb = huge_pages(cgroup);
    metrics
}

/// Reads all counters as runc's shim reports a container's: a controller that the cgroup does not have is there with
/// zeros.
pub fn read_with_zeros(cgroup: &Path) -> Metrics {
    let mut metrics = read(cgroup);
    metrics.pids.mut_or_insert_default();
    metrics.cpu.mut_or_insert_default();
    metrics.memory.mut_or_insert_default();
    metrics.io.mut_or_insert_default();
    metrics.rdma.mut_or_insert_default();
    metrics
}

fn pids(cgroup: &Path) -> Option<PidsStat> {
    let mut pids = PidsStat::new();
    pids.current = number_if_there(&cgroup.join("pids.current"))?;
    pids.limit = number(&cgroup.join("pids.max"));
    Some(pids)
}

/// Reads `cpu.stat`, which every cgroup has. What is about limits is in it only if the cgroup has the controller.
fn cpu(cgroup: &Path) -> Option<CPUStat> {
    let stat = Counters::read(&cgroup.join("cpu.stat"));
    let mut cpu = CPUStat::new();
    cpu.usage_usec = stat.get("usage_usec");
    cpu.user_usec = stat.get("user_usec");
    cpu.system_usec = stat.get("system_usec");
    cpu.nr_periods = stat.get("nr_periods");
    cpu.nr_throttled = stat.get("nr_throttled");
    cpu.throttled_usec = stat.get("throttled_usec");
    cpu.nr_bursts = stat.get("nr_bursts");
    cpu.burst_usec = stat.get("burst_usec");
    cpu.psi = pressure(&cgroup.join("cpu.pressure")).into();
    (!stat.is_empty()).then_some(cpu)
}

fn memory(cgroup: &Path) -> Option<MemoryStat> {
    let usage = number_if_there(&cgroup.join("memory.current"))?;
    let stat = Counters::read(&cgroup.join("memory.stat"));
    // Since Linux 5.9 some are counted apart for anonymous memory and for files.
    let both = |key: &str| stat.get(&format!("{key}_anon")).saturating_add(stat.get(&format!("{key}_file")));
    let mut memory = MemoryStat::new();
    memory.anon = stat.get("anon");
    memory.file = stat.get("file");
    memory.kernel_stack = stat.get("kernel_stack");
    memory.slab = stat.get("slab");
    memory.sock = stat.get("sock");
    memory.shmem = stat.get("shmem");
    memory.file_mapped = stat.get("file_mapped");
    memory.file_dirty = stat.get("file_dirty");
    memory.file_writeback = stat.get("file_writeback");
    memory.anon_thp = stat.get("anon_thp");
    memory.inactive_anon = stat.get("inactive_anon");
    memory.active_anon = stat.get("active_anon");
    memory.inactive_file = stat.get("inactive_file");
    memory.active_file = stat.get("active_file");
    memory.unevictable = stat.get("unevictable");
    memory.slab_reclaimable = stat.get("slab_reclaimable");
    memory.slab_unreclaimable = stat.get("slab_unreclaimable");
    memory.pgfault = stat.get("pgfault");
    memory.pgmajfault = stat.get("pgmajfault");
    memory.workingset_refault = both("workingset_refault");
    memory.workingset_activate = both("workingset_activate");
    memory.workingset_nodereclaim = stat.get("workingset_nodereclaim");
    memory.pgrefill = stat.get("pgrefill");
    memory.pgscan = stat.get("pgscan");
    memory.pgsteal = stat.get("pgsteal");
    memory.pgactivate = stat.get("pgactivate");
    memory.pgdeactivate = stat.get("pgdeactivate");
    memory.pglazyfree = stat.get("pglazyfree");
    memory.pglazyfreed = stat.get("pglazyfreed");
    memory.thp_fault_alloc = stat.get("thp_fault_alloc");
    memory.thp_collapse_alloc = stat.get("thp_collapse_alloc");
    memory.usage = usage;
    memory.usage_limit = memory_limit(&cgroup.join("memory.max"));
    memory.max_usage = number(&cgroup.join("memory.peak"));
    memory.swap_usage = number(&cgroup.join("memory.swap.current"));
    memory.swap_limit = number(&cgroup.join("memory.swap.max"));
    memory.swap_max_usage = number(&cgroup.join("memory.swap.peak"));
    memory.psi = pressure(&cgroup.join("memory.pressure")).into();
    Some(memory)
}

/// Reads a limit of memory. One that cannot be read, which the kernel writes as a positive number or as `max`, is no
/// limit: containerd subtracts what is used from it, and 0 would give an absurd number (`getAvailableBytesV2`).
fn memory_limit(file: &Path) -> u64 {
    number_if_there(file).filter(|limit| *limit > 0).unwrap_or(u64::MAX)
}

fn memory_events(cgroup: &Path) -> Option<MemoryEvents> {
    let counters = Counters::read(&cgroup.join("memory.events"));
    let mut events = MemoryEvents::new();
    events.low = counters.get("low");
    events.high = counters.get("high");
    events.max = counters.get("max");
    events.oom = counters.get("oom");
    events.oom_kill = counters.get("oom_kill");
    events.oom_group_kill = counters.get("oom_group_kill");
    (!counters.is_empty()).then_some(events)
}

/// Reads `io.stat`, which is empty for as long as nothing has been read or written.
fn io(cgroup: &Path) -> Option<IOStat> {
    let stat = fs::read_to_string(cgroup.join("io.stat")).ok();
    let psi = pressure(&cgroup.join("io.pressure"));
    if stat.is_none() && psi.is_none() {
        return None;
    }
    let mut io = IOStat::new();
    io.usage = stat.unwrap_or_default().lines().filter_map(io_entry).collect();
    io.psi = psi.into();
    Some(io)
}

/// Parses one line of `io.stat`: `253:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let counters = Counters::parse(counters.split_whitespace().filter_map(|pair| pair.split_once('=')));
    let mut entry = IOEntry::new();
    entry.major = major.parse().ok()?;
    entry.minor = minor.parse().ok()?;
    entry.rbytes = counters.get("rbytes");
    entry.wbytes = counters.get("wbytes");
    entry.rios = counters.get("rios");
    entry.wios = counters.get("wios");
    Some(entry)
}

fn rdma(cgroup: &Path) -> Option<RdmaStat> {
    let entries = |content: &str| content.lines().filter_map(rdma_entry).collect();
    let current = fs::read_to_string(cgroup.join("rdma.current")).ok()?;
    let mut rdma = RdmaStat::new();
    rdma.current = entries(&current);
    rdma.limit = entries(&fs::read_to_string(cgroup.join("rdma.max")).unwrap_or_default());
    Some(rdma)
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
    let mut entry = RdmaEntry::new();
    device.clone_into(&mut entry.device);
    entry.hca_handles = value("hca_handle");
    entry.hca_objects = value("hca_object");
    Some(entry)
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

fn huge_pages_of_size(cgroup: &Path, size: String) -> HugeTlbStat {
    let file = |name: &str| cgroup.join(format!("hugetlb.{size}.{name}"));
    let mut pages = HugeTlbStat::new();
    pages.current = number(&file("current"));
    pages.max = number(&file("max"));
    pages.failcnt = Counters::read(&file("events")).get("max");
    pages.pagesize = size;
    pages
}

#[cfg(test)]
mod tests;
