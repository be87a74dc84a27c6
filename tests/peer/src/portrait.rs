//! What a container can tell of itself: its process, limits, devices, mounts and cgroup.
//!
//! Left out is what differs between any two hosts: types and sources of file systems that come from the host, which are
//! overlay or a disk's under runc and virtio-fs in a machine; numbers of processes and mounts; files of the kernel that
//! only some kernels have; the host's own limits of descriptors and processes; whether a mount maps ids, which a guest
//! does not see, and how the host has mounted its /dev; and memory.oom.group, which Pericarp always sets.

use std::{
    env, fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
};

/// Lines of `/proc/self/status`.
const STATUS: [&str; 14] = [
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "SigBlk",
    "SigIgn",
    "SigCgt",
];

/// Limits that follow from the host's size or its service manager.
const HOST_LIMITS: [&str; 3] = ["Max processes", "Max open files", "Max pending signals"];

/// Only some kernels have these.
const OPTIONAL: [&str; 7] = [
    "/dev/core",
    "/proc/kcore",
    "/proc/acpi",
    "/proc/sysrq-trigger",
    "/proc/scsi",
    "/proc/latency_stats",
    "/proc/asound",
];

/// Every one of these that exists is shown, with how much can be read of it.
const HIDDEN: [&str; 2] = ["/proc/keys", "/proc/timer_list"];

/// Nobody but a privileged container may write these.
const GUARDED: [&str; 2] = ["/proc/sys/kernel/domainname", "/proc/irq/default_smp_affinity"];

const LIMITS: [&str; 7] =
    ["memory.max", "memory.swap.max", "memory.low", "memory.high", "cpu.max", "cpu.weight", "pids.max"];

const PLACES: [&str; 12] = [
    "/",
    "/dev",
    "/dev/shm",
    "/dev/pts",
    "/dev/mqueue",
    "/proc",
    "/sys",
    "/sys/fs/cgroup",
    "/tmp",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/hostname",
];

const LINKS: [&str; 5] = ["/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/ptmx"];

/// Options of mounts that are left out: the kernel's default, which virtio-fs knows no other of, and mapped ids.
const OF_HOST: [&str; 2] = ["relatime", "idmapped"];

/// Options that are left out of a mount of devices, which is the host's own /dev.
const OF_HOSTS_DEV: [&str; 4] = ["relatime", "idmapped", "nosuid", "noexec"];

/// Prints the portrait.
pub fn print() {
    process();
    devices();
    mounts();
    walls();
    for file in LIMITS {
        println!("{file} {:?}", limit(file));
    }
    println!("cgroup {:?}", read("/proc/self/cgroup"));
    for place in PLACES {
        println!("{}", describe(Path::new(place)));
    }
    println!("root writable: {}", fs::write("/.written", "").is_ok());
}

/// More processes than any test starts are as good as no limit: a machine has one anyway.
const MANY: u32 = 1000;

fn limit(file: &str) -> String {
    let limit = read(&format!("/sys/fs/cgroup/{file}"));
    let is_none = file == "pids.max" && limit.trim().parse().is_ok_and(|limit: u32| limit > MANY);
    if is_none { "max\n".to_owned() } else { limit }
}

fn process() {
    println!("directory {}", env::current_dir().unwrap_or_default().display());
    let mut variables: Vec<_> = env::vars_os().collect();
    variables.sort();
    for (name, value) in variables {
        println!("env {}={}.", name.display(), value.display());
    }
    for line in read("/proc/self/status").lines() {
        if line.split_once(':').is_some_and(|(name, _)| STATUS.contains(&name)) {
            println!("{line}");
        }
    }
    println!("oom_score_adj {}", read("/proc/self/oom_score_adj").trim());
    for line in
        read("/proc/self/limits").lines().filter(|line| !HOST_LIMITS.iter().any(|limit| line.contains(limit)))
    {
        println!("{line}");
    }
}

fn devices() {
    let mut paths: Vec<_> =
        fs::read_dir("/dev").into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths.into_iter().filter(|path| !OPTIONAL.iter().any(|optional| path == Path::new(optional)))
    {
        println!("{}", describe(&path));
    }
    for link in LINKS {
        if let Ok(target) = fs::read_link(link) {
            println!("{link} -> {}", target.display());
        }
    }
}

/// Place, options, type and propagation of each mount (`proc_pid_mountinfo(5)`).
fn mounts() {
    let mut lines = Vec::new();
    for line in read("/proc/self/mountinfo").lines() {
        let Some((mount, system)) = line.split_once(" - ") else { continue };
        let fields: Vec<_> = mount.split(' ').collect();
        let [_, _, _, _, place, options, propagation @ ..] = &fields[..] else { continue };
        let of_kernel = ["/dev", "/proc", "/sys"].iter().any(|root| Path::new(place).starts_with(root));
        let kind = system.split(' ').next().filter(|_| of_kernel).unwrap_or("from-host");
        if OPTIONAL.contains(place) {
            continue;
        }
        let hidden = if kind == "devtmpfs" { &OF_HOSTS_DEV[..] } else { &OF_HOST };
        let options: Vec<_> = options.split(',').filter(|option| !hidden.contains(option)).collect();
        let propagation: Vec<_> = propagation.iter().filter_map(|field| field.split(':').next()).collect();
        lines.push(format!("mount {place} {} {kind} {}", options.join(","), propagation.join(",")));
    }
    lines.sort();
    for line in lines {
        println!("{line}");
    }
}

fn walls() {
    for path in HIDDEN {
        let Ok(metadata) = fs::metadata(path) else { continue };
        let visible = match fs::read_dir(path) {
            Ok(entries) => entries.count(),
            Err(_) if metadata.is_file() => 1,
            Err(_) => 0,
        };
        println!("hidden {path}: {}, {visible} visible", kind(&metadata));
    }
    for path in GUARDED {
        if Path::new(path).exists() {
            println!("{path} writable: {}", fs::OpenOptions::new().write(true).open(path).is_ok());
        }
    }
}

fn describe(path: &Path) -> String {
    match fs::symlink_metadata(path) {
        Ok(metadata) => format!(
            "{} {} {:o} {}:{} {:x}",
            path.display(),
            kind(&metadata),
            metadata.mode() & 0o7777,
            metadata.uid(),
            metadata.gid(),
            metadata.rdev()
        ),
        Err(error) => format!("{} {error}", path.display()),
    }
}

fn kind(metadata: &fs::Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_file() => "file",
        () if kind.is_symlink() => "link",
        () if kind.is_char_device() => "character device",
        () if kind.is_block_device() => "block device",
        () => "other",
    }
}

fn read(path: &str) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("{error}\n"),
    }
}
