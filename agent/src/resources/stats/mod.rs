//! What a cgroup has used, as containerd's runc shim reports it: `io.containerd.cgroups.v2.Metrics`
//! (containerd/cgroups v3.1.3: `cgroup2/stats/metrics.proto`, filled by `cgroup2.Manager.Stat`).
//!
//! A counter that the guest's kernel does not have is 0. `Metrics.network` stays empty, as runc's shim leaves it:
//! network interfaces belong to the pod, and containerd counts them in the pod's netns.

mod files;

use std::{fs, path::Path};

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat, RdmaEntry,
        RdmaStat,
    },
    protobuf::MessageField,
};

use self::files::{Counters, number, pressure};
use super::cgroup::Cgroup;

impl Cgroup {
    /// Reads all counters of the cgroup.
    pub fn metrics(&self) -> Metrics {
        metrics(self.directory())
    }
}

fn metrics(directory: &Path) -> Metrics {
    let mut metrics = Metrics::new();
    metrics.pids = MessageField::some(pids(directory));
    metrics.cpu = MessageField::some(cpu(directory));
    metrics.memory = MessageField::some(memory(directory));
    metrics.memory_events = memory_events(directory).into();
    metrics.io = MessageField::some(io(directory));
    metrics.rdma = MessageField::some(rdma(directory));
    metrics.hugetlb = huge_pages(directory);
    metrics
}

fn pids(directory: &Path) -> PidsStat {
    let mut pids = PidsStat::new();
    pids.current = number(&directory.join("pids.current"));
    pids.limit = number(&directory.join("pids.max"));
    pids
}

fn cpu(directory: &Path) -> CPUStat {
    let stat = Counters::read(&directory.join("cpu.stat"));
    let mut cpu = CPUStat::new();
    cpu.usage_usec = stat.get("usage_usec");
    cpu.user_usec = stat.get("user_usec");
    cpu.system_usec = stat.get("system_usec");
    cpu.nr_periods = stat.get("nr_periods");
    cpu.nr_throttled = stat.get("nr_throttled");
    cpu.throttled_usec = stat.get("throttled_usec");
    cpu.nr_bursts = stat.get("nr_bursts");
    cpu.burst_usec = stat.get("burst_usec");
    cpu.psi = pressure(&directory.join("cpu.pressure")).into();
    cpu
}

fn memory(directory: &Path) -> MemoryStat {
    let stat = Counters::read(&directory.join("memory.stat"));
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
    // Since Linux 5.9 these two are counted apart for anonymous memory and for files.
    memory.workingset_refault = stat.get("workingset_refault_anon") + stat.get("workingset_refault_file");
    memory.workingset_activate = stat.get("workingset_activate_anon") + stat.get("workingset_activate_file");
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
    memory.usage = number(&directory.join("memory.current"));
    memory.usage_limit = number(&directory.join("memory.max"));
    memory.max_usage = number(&directory.join("memory.peak"));
    memory.swap_usage = number(&directory.join("memory.swap.current"));
    memory.swap_limit = number(&directory.join("memory.swap.max"));
    memory.swap_max_usage = number(&directory.join("memory.swap.peak"));
    memory.psi = pressure(&directory.join("memory.pressure")).into();
    memory
}

fn memory_events(directory: &Path) -> Option<MemoryEvents> {
    let counters = Counters::read(&directory.join("memory.events"));
    let mut events = MemoryEvents::new();
    events.low = counters.get("low");
    events.high = counters.get("high");
    events.max = counters.get("max");
    events.oom = counters.get("oom");
    events.oom_kill = counters.get("oom_kill");
    events.oom_group_kill = counters.get("oom_group_kill");
    (!counters.is_empty()).then_some(events)
}

fn io(directory: &Path) -> IOStat {
    let content = fs::read_to_string(directory.join("io.stat")).unwrap_or_default();
    let mut io = IOStat::new();
    io.usage = content.lines().filter_map(io_entry).collect();
    io.psi = pressure(&directory.join("io.pressure")).into();
    io
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

fn rdma(directory: &Path) -> RdmaStat {
    let entries = |file: &str| {
        let content = fs::read_to_string(directory.join(file)).unwrap_or_default();
        content.lines().filter_map(rdma_entry).collect()
    };
    let mut rdma = RdmaStat::new();
    rdma.current = entries("rdma.current");
    rdma.limit = entries("rdma.max");
    rdma
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
fn huge_pages(directory: &Path) -> Vec<HugeTlbStat> {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let size = |name: String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        // `hugetlb.2MB.rsvd.current` counts reservations.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<_> = names.filter_map(size).collect();
    sizes.sort();
    sizes.into_iter().map(|size| huge_pages_of_size(directory, size)).collect()
}

fn huge_pages_of_size(directory: &Path, size: String) -> HugeTlbStat {
    let file = |name: &str| directory.join(format!("hugetlb.{size}.{name}"));
    let mut pages = HugeTlbStat::new();
    pages.current = number(&file("current"));
    pages.max = number(&file("max"));
    pages.failcnt = Counters::read(&file("events")).get("max");
    pages.pagesize = size;
    pages
}

#[cfg(test)]
mod tests;
