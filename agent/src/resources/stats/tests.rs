use std::fs;

use containerd_shim_protos::protobuf::{Message as _, text_format};

use super::*;

/// The metrics of a directory without files. runc's shim always reports these messages, and `memory_events` and
/// `hugetlb` only if there are files for them.
const NOTHING: &str = "pids {} cpu {} memory {} rdma {} io {}";

const PRESSURE: &str =
    "some avg10=1.50 avg60=0.75 avg300=0.25 total=42\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=7\n";
const PSI: &str = "psi {some {avg10: 1.5 avg60: 0.75 avg300: 0.25 total: 42} full {avg10: 0.5 total: 7}}";

/// The largest number, which stands for no limit.
const NO_LIMIT: &str = "18446744073709551615";

/// The metrics of a cgroup with these files and no others.
fn read(files: &[(&str, &str)]) -> Metrics {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(directory.path().join(name), content).unwrap();
    }
    metrics(directory.path())
}

/// The metrics that a protobuf text describes.
fn parse(text: &str) -> Metrics {
    text_format::parse_from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Checks that files give a message with these fields and otherwise [`NOTHING`].
fn check(message: &str, files: &[(&str, &str)], fields: &str) {
    let expected = NOTHING.replace(&format!("{message} {{}}"), &format!("{message} {{{fields}}}"));
    assert_eq!(read(files), parse(&expected), "{files:?}");
}

#[test]
fn a_cgroup_without_files_has_used_nothing() {
    assert_eq!(read(&[]), parse(NOTHING));
}

#[test]
fn processes_are_counted_and_limited() {
    for (files, fields) in [
        (&[("pids.current", "3\n"), ("pids.max", "100\n")][..], "current: 3 limit: 100".to_owned()),
        (&[("pids.current", "3\n"), ("pids.max", "max\n")], format!("current: 3 limit: {NO_LIMIT}")),
        (&[("pids.max", "100\n")], "limit: 100".to_owned()),
        (&[("pids.current", "three\n"), ("pids.max", "-1\n")], String::new()),
        (&[("pids.current", "18446744073709551616\n"), ("pids.max", "\n")], String::new()),
    ] {
        check("pids", files, &fields);
    }
}

#[test]
fn cpu_time_is_read_with_throttling_and_pressure() {
    let stat = "usage_usec 300\nuser_usec 200\nsystem_usec 100\nnr_periods 7\nnr_throttled 2\nthrottled_usec 55\n\
                nr_bursts 4\nburst_usec 9\nsome_new_counter 1\n";
    let fields = "usage_usec: 300 user_usec: 200 system_usec: 100 nr_periods: 7 nr_throttled: 2 throttled_usec: 55 \
                  nr_bursts: 4 burst_usec: 9";
    for (files, fields) in [
        (&[("cpu.stat", stat)][..], fields.to_owned()),
        (&[("cpu.stat", stat), ("cpu.pressure", PRESSURE)], format!("{fields} {PSI}")),
        (&[("cpu.stat", "usage_usec 300\nuser_usec x\nsystem_usec\n\n")], "usage_usec: 300".to_owned()),
    ] {
        check("cpu", files, &fields);
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
        check("cpu", &[("cpu.pressure", content)], fields);
    }
    // With `psi=0` on the kernel's command line the file exists and cannot be read.
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("cpu.pressure")).unwrap();
    assert_eq!(metrics(directory.path()), parse(NOTHING));
}

#[test]
fn memory_is_read_with_its_limits_and_pressure() {
    for (files, fields) in [
        (
            &[("memory.current", "4096\n"), ("memory.max", "8192\n")][..],
            "usage: 4096 usage_limit: 8192".to_owned(),
        ),
        (
            &[("memory.max", "max\n"), ("memory.peak", "5000\n")],
            format!("usage_limit: {NO_LIMIT} max_usage: 5000"),
        ),
        (
            &[("memory.swap.current", "1\n"), ("memory.swap.max", "2\n"), ("memory.swap.peak", "3\n")],
            "swap_usage: 1 swap_limit: 2 swap_max_usage: 3".to_owned(),
        ),
        (&[("memory.current", "1\n"), ("memory.pressure", PRESSURE)], format!("usage: 1 {PSI}")),
        (&[("memory.stat", "anon 1000\nfile many\n")], "anon: 1000".to_owned()),
        (
            &[("memory.stat", "workingset_refault_anon 3\nworkingset_refault_file 2\n")],
            "workingset_refault: 5".to_owned(),
        ),
        (
            &[("memory.stat", "workingset_activate_anon 1\nworkingset_activate_file 6\n")],
            "workingset_activate: 7".to_owned(),
        ),
    ] {
        check("memory", files, &fields);
    }
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
    check("memory", &[("memory.stat", &stat)], &fields);
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
        let expected = [NOTHING, fields].join(" ");
        assert_eq!(read(&[("memory.events", content)]), parse(&expected), "{content:?}");
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
        (&[("io.pressure", PRESSURE)], PSI.to_owned()),
    ] {
        check("io", files, &fields);
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
    check("rdma", &files, fields);
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
    assert_eq!(read(&files), parse(&[NOTHING, &sizes].join(" ")));
}

#[test]
fn fields_have_the_numbers_that_containerd_knows() {
    let encode = |file: &str, content: &str| read(&[(file, content)]).write_to_bytes().unwrap();
    let contains = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    let pressure = "some avg10=1.00 avg60=2.00 avg300=4.00 total=5\nfull total=6\n";
    let mut psi = vec![1 << 3 | 2, 29];
    for (tag, average) in [(1 << 3 | 1, 1.0_f64), (2 << 3 | 1, 2.0), (3 << 3 | 1, 4.0)] {
        psi.push(tag);
        psi.extend(average.to_le_bytes());
    }
    psi.extend([4 << 3, 5]);
    psi.extend([2 << 3 | 2, 2, 4 << 3, 6]);
    // The tag of the field of `Metrics`, and that of `psi` in its message.
    for (file, tag, psi_tag) in [
        ("cpu.pressure", 2 << 3 | 2, &[7 << 3 | 2][..]),
        ("memory.pressure", 4 << 3 | 2, &[0xb2, 0x02]),
        ("io.pressure", 6 << 3 | 2, &[2 << 3 | 2]),
    ] {
        let field = [psi_tag, &[35], &psi].concat();
        let length = u8::try_from(field.len()).unwrap();
        let bytes = encode(file, pressure);
        assert!(contains(&bytes, &[&[tag, length], &field[..]].concat()), "{file}: {bytes:x?}");
    }
    assert!(
        contains(&encode("memory.swap.peak", "3"), &[4 << 3 | 2, 3, 0xa8, 0x02, 3]),
        "swap_max_usage = 37"
    );
    assert!(contains(&encode("memory.events", "oom_group_kill 1"), &[8 << 3 | 2, 2, 6 << 3, 1]));
    assert!(contains(&encode("hugetlb.2MB.current", "7"), b"\x3a\x07\x08\x07\x1a\x032MB"), "pagesize = 3");
}
