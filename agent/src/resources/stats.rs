//! What a cgroup has used, as containerd's `io.containerd.cgroups.v2.Metrics`.

use std::{collections::HashMap, fs, path::Path};

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
        PidsStat, RdmaEntry, RdmaStat,
    },
    protobuf::MessageField,
};

use super::cgroup::Cgroup;

impl Cgroup {
    /// Reads the counters. A counter that this kernel does not have is 0, and a controller that it
    /// does not have is missing, as with containerd's own reader (`cgroups/v3/cgroup2`).
    pub fn metrics(&self) -> Metrics {
        let directory = self.directory();
        let mut metrics = Metrics::new();
        metrics.cpu = MessageField::some(cpu(directory));
        metrics.memory = memory(directory).into();
        metrics.memory_events = memory_events(directory).into();
        metrics.pids = pids(directory).into();
        metrics.io = io(directory).into();
        metrics.rdma = rdma(directory).into();
        metrics.hugetlb = huge_pages(directory);
        metrics
    }
}

fn cpu(directory: &Path) -> CPUStat {
    let stat = flat(&directory.join("cpu.stat"));
    let mut cpu = CPUStat::new();
    cpu.usage_usec = stat.value("usage_usec");
    cpu.user_usec = stat.value("user_usec");
    cpu.system_usec = stat.value("system_usec");
    cpu.nr_periods = stat.value("nr_periods");
    cpu.nr_throttled = stat.value("nr_throttled");
    cpu.throttled_usec = stat.value("throttled_usec");
    cpu.nr_bursts = stat.value("nr_bursts");
    cpu.burst_usec = stat.value("burst_usec");
    cpu.psi = pressure(&directory.join("cpu.pressure")).into();
    cpu
}

fn memory(directory: &Path) -> Option<MemoryStat> {
    let usage = single(&directory.join("memory.current"))?;
    let stat = flat(&directory.join("memory.stat"));
    let mut memory = MemoryStat::new();
    memory.usage = usage;
    memory.usage_limit = single(&directory.join("memory.max")).unwrap_or_default();
    memory.max_usage = single(&directory.join("memory.peak")).unwrap_or_default();
    memory.swap_usage = single(&directory.join("memory.swap.current")).unwrap_or_default();
    memory.swap_limit = single(&directory.join("memory.swap.max")).unwrap_or_default();
    memory.anon = stat.value("anon");
    memory.file = stat.value("file");
    memory.kernel_stack = stat.value("kernel_stack");
    memory.slab = stat.value("slab");
    memory.sock = stat.value("sock");
    memory.shmem = stat.value("shmem");
    memory.file_mapped = stat.value("file_mapped");
    memory.file_dirty = stat.value("file_dirty");
    memory.file_writeback = stat.value("file_writeback");
    memory.anon_thp = stat.value("anon_thp");
    memory.inactive_anon = stat.value("inactive_anon");
    memory.active_anon = stat.value("active_anon");
    memory.inactive_file = stat.value("inactive_file");
    memory.active_file = stat.value("active_file");
    memory.unevictable = stat.value("unevictable");
    memory.slab_reclaimable = stat.value("slab_reclaimable");
    memory.slab_unreclaimable = stat.value("slab_unreclaimable");
    memory.pgfault = stat.value("pgfault");
    memory.pgmajfault = stat.value("pgmajfault");
    memory.workingset_refault = stat.value("workingset_refault_file") + stat.value("workingset_refault_anon");
    memory.workingset_activate =
        stat.value("workingset_activate_file") + stat.value("workingset_activate_anon");
    memory.workingset_nodereclaim = stat.value("workingset_nodereclaim");
    memory.pgrefill = stat.value("pgrefill");
    memory.pgscan = stat.value("pgscan");
    memory.pgsteal = stat.value("pgsteal");
    memory.pgactivate = stat.value("pgactivate");
    memory.pgdeactivate = stat.value("pgdeactivate");
    memory.pglazyfree = stat.value("pglazyfree");
    memory.pglazyfreed = stat.value("pglazyfreed");
    memory.thp_fault_alloc = stat.value("thp_fault_alloc");
    memory.thp_collapse_alloc = stat.value("thp_collapse_alloc");
    memory.psi = pressure(&directory.join("memory.pressure")).into();
    Some(memory)
}

fn memory_events(directory: &Path) -> Option<MemoryEvents> {
    let file = directory.join("memory.events");
    let stat = flat(&file);
    let mut events = MemoryEvents::new();
    events.low = stat.value("low");
    events.high = stat.value("high");
    events.max = stat.value("max");
    events.oom = stat.value("oom");
    events.oom_kill = stat.value("oom_kill");
    events.oom_group_kill = stat.value("oom_group_kill");
    file.exists().then_some(events)
}

fn pids(directory: &Path) -> Option<PidsStat> {
    let mut pids = PidsStat::new();
    pids.current = single(&directory.join("pids.current"))?;
    // 0 stands for "no limit" here, unlike for memory.
    pids.limit = single(&directory.join("pids.max")).filter(|limit| *limit != u64::MAX).unwrap_or(0);
    Some(pids)
}

fn io(directory: &Path) -> Option<IOStat> {
    let content = fs::read_to_string(directory.join("io.stat")).ok()?;
    let mut io = IOStat::new();
    io.usage = content.lines().filter_map(io_entry).collect();
    io.psi = pressure(&directory.join("io.pressure")).into();
    Some(io)
}

/// One line of `io.stat`: `253:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
fn io_entry(line: &str) -> Option<IOEntry> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let counters = Flat::of(counters.split_whitespace().filter_map(|pair| pair.split_once('=')));
    let mut entry = IOEntry::new();
    entry.major = major.parse().ok()?;
    entry.minor = minor.parse().ok()?;
    entry.rbytes = counters.value("rbytes");
    entry.wbytes = counters.value("wbytes");
    entry.rios = counters.value("rios");
    entry.wios = counters.value("wios");
    Some(entry)
}

/// `rdma.current` and `rdma.max`: one `<device> hca_handle=<number> hca_object=<number>` per line.
fn rdma(directory: &Path) -> Option<RdmaStat> {
    let entries = |file: &str| -> Option<Vec<RdmaEntry>> {
        let content = fs::read_to_string(directory.join(file)).ok()?;
        Some(content.lines().filter_map(rdma_entry).collect())
    };
    let mut rdma = RdmaStat::new();
    rdma.current = entries("rdma.current")?;
    rdma.limit = entries("rdma.max").unwrap_or_default();
    Some(rdma)
}

fn rdma_entry(line: &str) -> Option<RdmaEntry> {
    let (device, values) = line.split_once(' ')?;
    let value = |key: &str| {
        let value = values.split_whitespace().find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        // "max" stands for no limit.
        value.map_or(0, |value| value.parse().unwrap_or(u32::MAX))
    };
    let mut entry = RdmaEntry::new();
    device.clone_into(&mut entry.device);
    entry.hca_handles = value("hca_handle");
    entry.hca_objects = value("hca_object");
    Some(entry)
}

/// One entry for each size of huge pages that the kernel has, in the order of their names.
fn huge_pages(directory: &Path) -> Vec<HugeTlbStat> {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    let size = |name: String| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        // "2MB.rsvd" counts reservations.
        (!size.contains('.')).then(|| size.to_owned())
    };
    let mut sizes: Vec<_> = names.filter_map(size).collect();
    sizes.sort();
    sizes.into_iter().map(|size| huge_pages_of(directory, size)).collect()
}

fn huge_pages_of(directory: &Path, size: String) -> HugeTlbStat {
    let file = |name: &str| directory.join(format!("hugetlb.{size}.{name}"));
    let mut pages = HugeTlbStat::new();
    pages.current = single(&file("current")).unwrap_or_default();
    pages.max = single(&file("max")).unwrap_or_default();
    pages.failcnt = flat(&file("events")).value("max");
    pages.pagesize = size;
    pages
}

/// A pressure file: `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same with `full`.
fn pressure(file: &Path) -> Option<PSIStats> {
    let content = fs::read_to_string(file).ok()?;
    let mut stats = PSIStats::new();
    for line in content.lines() {
        match line.split_once(' ') {
            Some(("some", values)) => stats.some = MessageField::some(pressure_values(values)),
            Some(("full", values)) => stats.full = MessageField::some(pressure_values(values)),
            _ => {}
        }
    }
    Some(stats)
}

fn pressure_values(values: &str) -> PSIData {
    let mut data = PSIData::new();
    for (key, value) in values.split_whitespace().filter_map(|pair| pair.split_once('=')) {
        let average = value.parse().unwrap_or_default();
        match key {
            "avg10" => data.avg10 = average,
            "avg60" => data.avg60 = average,
            "avg300" => data.avg300 = average,
            "total" => data.total = value.parse().unwrap_or_default(),
            _ => {}
        }
    }
    data
}

/// Numbers by their names.
struct Flat(HashMap<String, u64>);

impl Flat {
    fn of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Flat {
        Flat(pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?))).collect())
    }

    fn value(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or_default()
    }
}

/// A "flat keyed" file: one `name value` per line.
fn flat(file: &Path) -> Flat {
    let content = fs::read_to_string(file).unwrap_or_default();
    Flat::of(content.lines().filter_map(|line| line.split_once(' ')))
}

/// A file with one number, or `max` for no limit.
fn single(file: &Path) -> Option<u64> {
    match fs::read_to_string(file).ok()?.trim() {
        "max" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_the_files_of_a_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        for (name, content) in [
            ("cpu.stat", "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 7\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            (
                "memory.stat",
                "anon 1000\ninactive_file 24\nworkingset_refault_file 2\nworkingset_refault_anon 3\n",
            ),
            ("memory.events", "low 0\noom 2\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("io.stat", "253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:0 \n"),
            ("hugetlb.2MB.current", "4194304\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 5\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=max hca_object=3000\n"),
            ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\n"),
        ] {
            fs::write(directory.path().join(name), content).unwrap();
        }
        let path = directory.path();
        let (cpu, memory) = (cpu(path), memory(path).unwrap());
        assert_eq!((cpu.usage_usec, cpu.user_usec, cpu.system_usec, cpu.nr_periods), (300, 200, 100, 7));
        assert_eq!(cpu.psi.some.total, 42);
        assert!((cpu.psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!((memory.usage, memory.usage_limit, memory.anon), (4096, u64::MAX, 1000));
        assert_eq!((memory.inactive_file, memory.workingset_refault), (24, 5));
        assert_eq!(memory_events(path).unwrap().oom_kill, 1);
        let pids = pids(path).unwrap();
        assert_eq!((pids.current, pids.limit), (3, 0));
        let io = io(path).unwrap();
        assert_eq!((io.usage[0].major, io.usage[0].minor, io.usage[0].wios), (253, 16, 4));
        let pages = huge_pages(path);
        assert_eq!(pages.len(), 1, "{pages:?}");
        assert_eq!((pages[0].pagesize.as_str(), pages[0].current, pages[0].max), ("2MB", 4 << 20, u64::MAX));
        assert_eq!(pages[0].failcnt, 5);
        let rdma = rdma(path).unwrap();
        assert_eq!((rdma.current[0].device.as_str(), rdma.current[0].hca_objects), ("mlx4_0", 2000));
        assert_eq!((rdma.limit[0].hca_handles, rdma.limit[0].hca_objects), (u32::MAX, 3000));
    }

    #[test]
    fn a_missing_controller_is_left_out() {
        let directory = tempfile::tempdir().unwrap();
        assert!(memory(directory.path()).is_none());
        assert!(pids(directory.path()).is_none());
        assert!(io(directory.path()).is_none());
        assert!(memory_events(directory.path()).is_none());
        assert!(rdma(directory.path()).is_none());
        assert!(huge_pages(directory.path()).is_empty());
    }
}
