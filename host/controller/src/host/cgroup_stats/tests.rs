use pericarp_protos::cgroups::{PsiData, PsiStats};
use prost::Message as _;

use super::*;

/// The files of a cgroup and their contents.
type Files<'a> = &'a [(&'a str, &'a str)];

/// The metrics of a cgroup with these files and no others.
fn metrics(files: Files) -> Metrics {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(directory.path().join(name), content).unwrap();
    }
    read(directory.path())
}

const PRESSURE: &str =
    "some avg10=1.50 avg60=0.75 avg300=0.25 total=42\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n";

/// What [`PRESSURE`] says.
const PSI: Option<PsiStats> = Some(PsiStats {
    some: Some(PsiData { avg10: 1.5, avg60: 0.75, avg300: 0.25, total: 42 }),
    full: Some(PsiData { avg10: 0.5, avg60: 0.0, avg300: 0.0, total: 7 }),
});

#[test]
fn a_cgroup_that_does_not_exist_or_has_no_files_has_no_counters() {
    assert_eq!(read(Path::new("/no/such/cgroup")), Metrics::default());
    assert_eq!(metrics(&[]), Metrics::default());
    assert_eq!(Metrics::default().encode_to_vec(), Vec::<u8>::new());
}

#[test]
fn a_controller_that_the_cgroup_does_not_have_is_left_out() {
    // What the kernel gives every cgroup, whatever the ones above it hand on.
    let files = [("cpu.stat", "usage_usec 3\nuser_usec 2\nsystem_usec 1\n"), ("cgroup.procs", "7\n")];
    let cpu = CpuStat { usage_usec: 3, user_usec: 2, system_usec: 1, ..CpuStat::default() };
    assert_eq!(metrics(&files), Metrics { cpu: Some(cpu), ..Metrics::default() });
    // Each of these alone means nothing without the file that says what is used.
    for name in ["pids.max", "memory.max", "memory.stat", "memory.peak", "rdma.max", "hugetlb.2MB.max"] {
        assert_eq!(metrics(&[(name, "5\n")]), Metrics::default(), "{name}");
    }
}

#[test]
fn processes_are_counted_and_limited() {
    let table: [(Files, PidsStat); 5] = [
        (&[("pids.current", "3\n"), ("pids.max", "100\n")], PidsStat { current: 3, limit: 100 }),
        (&[("pids.current", "3\n"), ("pids.max", "max\n")], PidsStat { current: 3, limit: u64::MAX }),
        (&[("pids.current", "3\n")], PidsStat { current: 3, limit: 0 }),
        (&[("pids.current", "three\n"), ("pids.max", "-1\n")], PidsStat::default()),
        (&[("pids.current", "18446744073709551616\n"), ("pids.max", "\n")], PidsStat::default()),
    ];
    for (files, expected) in table {
        assert_eq!(metrics(files), Metrics { pids: Some(expected), ..Metrics::default() }, "{files:?}");
    }
}

#[test]
fn cpu_time_is_read_with_throttling_and_pressure() {
    let stat = "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 7\nnr_throttled 2\nthrottled_usec 55\n\
                nr_bursts 4\nburst_usec 9\nsome_new_counter 1\n";
    let all = CpuStat {
        usage_usec: 300,
        user_usec: 200,
        system_usec: 100,
        nr_periods: 7,
        nr_throttled: 2,
        throttled_usec: 55,
        psi: None,
        nr_bursts: 4,
        burst_usec: 9,
    };
    let table: [(Files, Option<CpuStat>); 5] = [
        (&[("cpu.stat", stat)], Some(all)),
        (&[("cpu.stat", stat), ("cpu.pressure", PRESSURE)], Some(CpuStat { psi: PSI, ..all })),
        (
            &[("cpu.stat", "usage_usec 300\nuser_usec x\nsystem_usec\n\n")],
            Some(CpuStat { usage_usec: 300, ..CpuStat::default() }),
        ),
        (&[("cpu.stat", "")], None),
        (&[("cpu.pressure", PRESSURE)], None),
    ];
    for (files, cpu) in table {
        assert_eq!(metrics(files), Metrics { cpu, ..Metrics::default() }, "{files:?}");
    }
}

#[test]
fn pressure_that_cannot_be_read_is_missing() {
    let total = |total| Some(PsiData { total, ..PsiData::default() });
    let table = [
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n", Some(PsiStats { some: total(5), full: None })),
        ("full total=5\nother total=6\n", Some(PsiStats { some: None, full: total(5) })),
        ("", Some(PsiStats::default())),
        ("some avg10=much avg60=0.00 avg300=0.00 total=5\n", None),
        ("some avg10=0.00 total=-5\n", None),
        ("some avg10\n", None),
    ];
    for (content, expected) in table {
        let memory = metrics(&[("memory.current", "1"), ("memory.pressure", content)]).memory.unwrap();
        assert_eq!(memory.psi, expected, "{content:?}");
    }
    // With `psi=0` on the kernel's command line the file exists and cannot be read.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("io.pressure")).unwrap();
    assert_eq!(read(directory.path()), Metrics::default());
}

/// The memory of a cgroup that uses one byte and has no limit.
fn one_byte() -> MemoryStat {
    MemoryStat { usage: 1, usage_limit: u64::MAX, ..MemoryStat::default() }
}

#[test]
fn memory_is_read_with_its_limits_and_pressure() {
    let table: [(Files, MemoryStat); 10] = [
        (&[("memory.max", "8192\n")], MemoryStat { usage_limit: 8192, ..one_byte() }),
        (&[("memory.max", "max\n")], one_byte()),
        (&[("memory.max", "much\n")], one_byte()),
        (&[], one_byte()),
        (&[("memory.peak", "5000\n")], MemoryStat { max_usage: 5000, ..one_byte() }),
        (
            &[("memory.swap.current", "1\n"), ("memory.swap.max", "max\n"), ("memory.swap.peak", "3\n")],
            MemoryStat { swap_usage: 1, swap_limit: u64::MAX, swap_max_usage: 3, ..one_byte() },
        ),
        (&[("memory.pressure", PRESSURE)], MemoryStat { psi: PSI, ..one_byte() }),
        (&[("memory.stat", "anon 1000\nfile many\n")], MemoryStat { anon: 1000, ..one_byte() }),
        (
            &[("memory.stat", "workingset_refault_anon 3\nworkingset_refault_file 2\n")],
            MemoryStat { workingset_refault: 5, ..one_byte() },
        ),
        (
            &[("memory.stat", "workingset_activate_anon 1\nworkingset_activate_file 6\n")],
            MemoryStat { workingset_activate: 7, ..one_byte() },
        ),
    ];
    for (files, expected) in table {
        let files = [&[("memory.current", "1\n")], files].concat();
        assert_eq!(metrics(&files), Metrics { memory: Some(expected), ..Metrics::default() }, "{files:?}");
    }
    let malformed = MemoryStat { usage: 0, ..one_byte() };
    assert_eq!(metrics(&[("memory.current", "one\n")]).memory, Some(malformed));
}

#[test]
fn each_counter_of_memory_stat_has_a_field_of_its_name() {
    let names = "anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp inactive_anon \
                 active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable pgfault \
                 pgmajfault workingset_nodereclaim pgrefill pgscan pgsteal pgactivate pgdeactivate pglazyfree \
                 pglazyfreed thp_fault_alloc thp_collapse_alloc";
    for name in names.split_whitespace() {
        let stat = format!("{name} 17\n");
        let memory = metrics(&[("memory.current", "1"), ("memory.stat", &stat)]).memory.unwrap();
        // The debug form has the fields' own names.
        assert!(format!("{memory:?}").contains(&format!(" {name}: 17,")), "{name}: {memory:?}");
        assert_eq!(format!("{memory:?}").matches(": 17,").count(), 1, "{name}: {memory:?}");
    }
}

#[test]
fn events_of_memory_are_there_if_the_kernel_counts_them() {
    let all = MemoryEvents { low: 1, high: 2, max: 3, oom: 4, oom_kill: 5, oom_group_kill: 6 };
    for (content, memory_events) in [
        ("low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n", Some(all)),
        ("low 0\noom 0\n", Some(MemoryEvents::default())),
        ("low x\n", None),
        ("", None),
    ] {
        let expected = Metrics { memory_events, ..Metrics::default() };
        assert_eq!(metrics(&[("memory.events", content)]), expected, "{content:?}");
    }
}

#[test]
fn io_is_read_for_each_device() {
    let stat = "253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:0 \n8:0 rbytes=9 wios=x\n";
    let usage = vec![
        IoEntry { major: 253, minor: 16, rbytes: 1, wbytes: 2, rios: 3, wios: 4 },
        IoEntry { major: 7, ..IoEntry::default() },
        IoEntry { major: 8, rbytes: 9, ..IoEntry::default() },
    ];
    let table: [(Files, IoStat); 5] = [
        (&[("io.stat", stat)], IoStat { usage: usage.clone(), psi: None }),
        (&[("io.stat", stat), ("io.pressure", PRESSURE)], IoStat { usage, psi: PSI }),
        (&[("io.stat", "sda rbytes=1\nx:1 rbytes=1\n8:0\n")], IoStat::default()),
        (&[("io.stat", "")], IoStat::default()),
        (&[("io.pressure", PRESSURE)], IoStat { usage: Vec::new(), psi: PSI }),
    ];
    for (files, expected) in table {
        assert_eq!(metrics(files), Metrics { io: Some(expected), ..Metrics::default() }, "{files:?}");
    }
}

#[test]
fn rdma_is_read_for_each_device() {
    let files = [
        ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
        ("rdma.max", "mlx4_0 hca_handle=max hca_object=3000\nocrdma1 hca_handle=x\n\n"),
    ];
    let entry = |device: &str, hca_handles, hca_objects| RdmaEntry {
        device: device.to_owned(),
        hca_handles,
        hca_objects,
    };
    let current = vec![entry("mlx4_0", 2, 2000)];
    let limit = vec![entry("mlx4_0", u32::MAX, 3000), entry("ocrdma1", 0, 0)];
    let expected = RdmaStat { current: current.clone(), limit };
    assert_eq!(metrics(&files), Metrics { rdma: Some(expected), ..Metrics::default() });
    assert_eq!(metrics(&files[..1]).rdma, Some(RdmaStat { current, limit: Vec::new() }));
}

#[test]
fn huge_pages_are_read_for_each_size() {
    let files = [
        ("hugetlb.2MB.current", "4194304\n"),
        ("hugetlb.2MB.max", "max\n"),
        ("hugetlb.2MB.events", "max 5\n"),
        ("hugetlb.2MB.rsvd.current", "1\n"),
        ("hugetlb.1GB.current", "none\n"),
    ];
    let hugetlb = vec![
        HugeTlbStat { pagesize: "1GB".to_owned(), ..HugeTlbStat::default() },
        HugeTlbStat { current: 4_194_304, max: u64::MAX, pagesize: "2MB".to_owned(), failcnt: 5 },
    ];
    assert_eq!(metrics(&files), Metrics { hugetlb, ..Metrics::default() });
}

#[test]
fn fields_have_the_numbers_that_containerd_knows() {
    let contains = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let encode = |files: Files| metrics(files).encode_to_vec();
    // A tag is the field's number and its wire type; 2 is a message, 0 a number, 1 eight bytes.
    assert_eq!(encode(&[("pids.current", "3"), ("pids.max", "5")]), [1 << 3 | 2, 4, 1 << 3, 3, 2 << 3, 5]);
    let mut psi = vec![1 << 3 | 2, 29];
    for (tag, average) in [(1 << 3 | 1, 1.0_f64), (2 << 3 | 1, 2.0), (3 << 3 | 1, 4.0)] {
        psi.push(tag);
        psi.extend(average.to_le_bytes());
    }
    psi.extend([4 << 3, 5]);
    psi.extend([2 << 3 | 2, 2, 4 << 3, 6]);
    let pressure = "some avg10=1.00 avg60=2.00 avg300=4.00 total=5\nfull total=6\n";
    let io = [&[6 << 3 | 2, 37, 2 << 3 | 2, 35][..], &psi].concat();
    assert_eq!(encode(&[("io.pressure", pressure)]), io);
    let cpu = encode(&[("cpu.stat", "usage_usec 1\nnr_bursts 2\nburst_usec 3"), ("cpu.pressure", pressure)]);
    assert!(contains(&cpu, &[&[1 << 3, 1, 7 << 3 | 2, 35][..], &psi, &[8 << 3, 2, 9 << 3, 3]].concat()));
    let memory = encode(&[("memory.current", "1"), ("memory.max", "2"), ("memory.pressure", pressure)]);
    assert!(contains(&memory, &[0x80, 0x02, 1, 0x88, 0x02, 2]), "usage = 32, usage_limit = 33");
    assert!(contains(&memory, &[&[0xb2, 0x02, 35][..], &psi].concat()), "psi = 38");
    let swap = encode(&[("memory.current", "1"), ("memory.peak", "2"), ("memory.swap.peak", "3")]);
    assert!(contains(&swap, &[0xa0, 0x02, 2, 0xa8, 0x02, 3]), "max_usage = 36, swap_max_usage = 37");
    let events = encode(&[("memory.events", "oom_group_kill 1")]);
    assert_eq!(events, [8 << 3 | 2, 2, 6 << 3, 1]);
    let huge = encode(&[("hugetlb.2MB.current", "7"), ("hugetlb.2MB.events", "max 1")]);
    assert_eq!(huge, b"\x3a\x09\x08\x07\x1a\x032MB\x20\x01", "pagesize = 3, failcnt = 4");
    assert_eq!(encode(&[("rdma.current", "a hca_handle=1")]), b"\x2a\x07\x0a\x05\x0a\x01a\x10\x01");
}
