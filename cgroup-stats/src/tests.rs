use std::fs;

use containerd_shim_protos::protobuf::{Message as _, text_format};

use super::*;

/// The files of a cgroup and their contents.
type Files<'a> = &'a [(&'a str, &'a str)];

const PRESSURE: &str =
    "some avg10=1.50 avg60=0.75 avg300=0.25 total=42\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n";
const PSI: &str = "psi {some {avg10: 1.5 avg60: 0.75 avg300: 0.25 total: 42} full {avg10: 0.5 total: 7}}";

/// The largest number, which stands for no limit.
const NO_LIMIT: &str = "18446744073709551615";

/// The metrics of a cgroup with these files and no others.
fn metrics(files: Files) -> Metrics {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(directory.path().join(name), content).unwrap();
    }
    read(directory.path())
}

/// The metrics that a protobuf text describes.
fn parse(text: &str) -> Metrics {
    text_format::parse_from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Checks that files give these metrics and no others.
fn check(files: Files, expected: &str) {
    assert_eq!(metrics(files), parse(expected), "{files:?}");
}

#[test]
fn a_cgroup_that_does_not_exist_or_has_no_files_has_no_counters() {
    assert_eq!(read(Path::new("/no/such/cgroup")), Metrics::new());
    check(&[], "");
    assert_eq!(Metrics::new().write_to_bytes().unwrap(), Vec::<u8>::new());
}

#[test]
fn a_controller_that_the_cgroup_does_not_have_is_left_out_or_has_zeros() {
    // What the kernel gives every cgroup, whatever the ones above it hand on.
    let files = [("cpu.stat", "usage_usec 3\nuser_usec 2\nsystem_usec 1\n"), ("cgroup.procs", "7\n")];
    let cpu = "cpu {usage_usec: 3 user_usec: 2 system_usec: 1}";
    check(&files, cpu);
    // Each of these alone means nothing without the file that says what is used.
    for name in ["pids.max", "memory.max", "memory.stat", "memory.peak", "rdma.max", "hugetlb.2MB.max"] {
        check(&[(name, "5\n")], "");
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(files[0].0), files[0].1).unwrap();
    let expected = [cpu, "pids {} memory {} rdma {} io {}"].join(" ");
    assert_eq!(read_with_zeros(directory.path()), parse(&expected));
}

#[test]
fn processes_are_counted_and_limited() {
    for (files, fields) in [
        (&[("pids.current", "3\n"), ("pids.max", "100\n")][..], "current: 3 limit: 100".to_owned()),
        (&[("pids.current", "3\n"), ("pids.max", "max\n")], format!("current: 3 limit: {NO_LIMIT}")),
        (&[("pids.current", "3\n")], "current: 3".to_owned()),
        (&[("pids.current", "three\n"), ("pids.max", "-1\n")], String::new()),
        (&[("pids.current", "18446744073709551616\n"), ("pids.max", "\n")], String::new()),
    ] {
        check(files, &format!("pids {{{fields}}}"));
    }
}

#[test]
fn cpu_time_is_read_with_throttling_and_pressure() {
    let stat = "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 7\nnr_throttled 2\nthrottled_usec 55\n\
                nr_bursts 4\nburst_usec 9\nsome_new_counter 1\n";
    let fields = "usage_usec: 300 user_usec: 200 system_usec: 100 nr_periods: 7 nr_throttled: 2 throttled_usec: 55 \
                  nr_bursts: 4 burst_usec: 9";
    for (files, fields) in [
        (&[("cpu.stat", stat)][..], format!("cpu {{{fields}}}")),
        (&[("cpu.stat", stat), ("cpu.pressure", PRESSURE)], format!("cpu {{{fields} {PSI}}}")),
        (&[("cpu.stat", "usage_usec 300\nuser_usec x\nsystem_usec\n\n")], "cpu {usage_usec: 300}".to_owned()),
        (&[("cpu.stat", "")], String::new()),
        (&[("cpu.pressure", PRESSURE)], String::new()),
    ] {
        check(files, &fields);
    }
}

#[test]
fn pressure_that_cannot_be_read_is_missing() {
    for (content, fields) in [
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=5\n", "psi {some {total: 5}}"),
        ("full total=5\nother total=6\n", "psi {full {total: 5}}"),
        ("", "psi {}"),
        ("some avg10=much avg60=0.00 avg300=0.00 total=5\n", ""),
        ("some avg10=0.00 total=-5\n", ""),
        ("some avg10\n", ""),
    ] {
        let expected = format!("memory {{usage: 1 usage_limit: {NO_LIMIT} {fields}}}");
        check(&[("memory.current", "1"), ("memory.pressure", content)], &expected);
    }
    // With `psi=0` on the kernel's command line the file exists and cannot be read.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("io.pressure")).unwrap();
    assert_eq!(read(directory.path()), Metrics::new());
}

#[test]
fn memory_is_read_with_its_limits_and_pressure() {
    let no_limit = format!("usage_limit: {NO_LIMIT}");
    for (files, fields) in [
        (&[("memory.max", "8192\n")][..], "usage_limit: 8192".to_owned()),
        (&[("memory.max", "max\n")], no_limit.clone()),
        (&[("memory.max", "much\n")], no_limit.clone()),
        (&[], no_limit.clone()),
        (&[("memory.peak", "5000\n")], format!("{no_limit} max_usage: 5000")),
        (
            &[("memory.swap.current", "1\n"), ("memory.swap.max", "max\n"), ("memory.swap.peak", "3\n")],
            format!("{no_limit} swap_usage: 1 swap_limit: {NO_LIMIT} swap_max_usage: 3"),
        ),
        (&[("memory.pressure", PRESSURE)], format!("{no_limit} {PSI}")),
        (&[("memory.stat", "anon 1000\nfile many\n")], format!("{no_limit} anon: 1000")),
        (
            &[("memory.stat", "workingset_refault_anon 3\nworkingset_refault_file 2\n")],
            format!("{no_limit} workingset_refault: 5"),
        ),
        (
            &[("memory.stat", "workingset_activate_anon 1\nworkingset_activate_file 6\n")],
            format!("{no_limit} workingset_activate: 7"),
        ),
    ] {
        let files = [&[("memory.current", "1\n")], files].concat();
        check(&files, &format!("memory {{usage: 1 {fields}}}"));
    }
    check(&[("memory.current", "one\n")], &format!("memory {{{no_limit}}}"));
}

#[test]
fn each_counter_of_memory_stat_has_a_field_of_its_name() {
    let names = "anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp inactive_anon \
                 active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable pgfault \
                 pgmajfault workingset_nodereclaim pgrefill pgscan pgsteal pgactivate pgdeactivate pglazyfree \
                 pglazyfreed thp_fault_alloc thp_collapse_alloc";
    let (mut stat, mut fields) = (String::new(), String::new());
    for (number, name) in (1..).zip(names.split_whitespace()) {
        let number = u32::to_string(&number);
        stat += &[name, " ", &number, "\n"].concat();
        fields += &[name, ": ", &number, " "].concat();
    }
    let expected = format!("memory {{usage_limit: {NO_LIMIT} {fields}}}");
    check(&[("memory.current", "0"), ("memory.stat", &stat)], &expected);
}

#[test]
fn events_of_memory_are_there_if_the_kernel_counts_them() {
    for (content, fields) in [
        (
            "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n",
            "memory_events {low: 1 high: 2 max: 3 oom: 4 oom_kill: 5 oom_group_kill: 6}",
        ),
        ("low 0\noom 0\n", "memory_events {}"),
        ("low x\n", ""),
        ("", ""),
    ] {
        check(&[("memory.events", content)], fields);
    }
}

#[test]
fn io_is_read_for_each_device() {
    let stat = "253:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:0 \n8:0 rbytes=9 wios=x\n";
    let usage = "usage {major: 253 minor: 16 rbytes: 1 wbytes: 2 rios: 3 wios: 4} usage {major: 7} \
                 usage {major: 8 rbytes: 9}";
    for (files, fields) in [
        (&[("io.stat", stat)][..], usage.to_owned()),
        (&[("io.stat", stat), ("io.pressure", PRESSURE)], format!("{usage} {PSI}")),
        (&[("io.stat", "sda rbytes=1\nx:1 rbytes=1\n8:0\n")], String::new()),
        (&[("io.stat", "")], String::new()),
        (&[("io.pressure", PRESSURE)], PSI.to_owned()),
    ] {
        check(files, &format!("io {{{fields}}}"));
    }
}

#[test]
fn rdma_is_read_for_each_device() {
    let files = [
        ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
        ("rdma.max", "mlx4_0 hca_handle=max hca_object=3000\nocrdma1 hca_handle=x\n\n"),
    ];
    let fields = "current {device: \"mlx4_0\" hca_handles: 2 hca_objects: 2000} \
                  limit {device: \"mlx4_0\" hca_handles: 4294967295 hca_objects: 3000} limit {device: \"ocrdma1\"}";
    check(&files, &format!("rdma {{{fields}}}"));
    check(&files[..1], "rdma {current {device: \"mlx4_0\" hca_handles: 2 hca_objects: 2000}}");
}

#[test]
fn huge_pages_are_read_for_each_size() {
    let files = [
        ("hugetlb.2MB.current", "4194304\n"),
        ("hugetlb.2MB.max", "max\n"),
        ("hugetlb.2MB.events", "max 5\n"),
        ("hugetlb.2MB.rsvd.current", "1\n"),
        ("hugetlb.1GB.current", "0\n"),
    ];
    let sizes = format!(
        "hugetlb {{pagesize: \"1GB\"}} hugetlb {{current: 4194304 max: {NO_LIMIT} pagesize: \"2MB\" failcnt: 5}}"
    );
    check(&files, &sizes);
}

#[test]
fn fields_have_the_numbers_that_containerd_knows() {
    let contains = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let encode = |files: Files| metrics(files).write_to_bytes().unwrap();
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
