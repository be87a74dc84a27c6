//! What the host itself must have.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use pericarp_controller::chain;
use pericarp_vmm::{ExitReason, ProbeError, Progress};
use rustix::fs::statfs;

use super::Finding;

/// The oldest kernel that is supported, as major and minor version.
const KERNEL: (u32, u32) = (6, 1);
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` (Linux `include/uapi/linux/magic.h`).
const CGROUP2: i64 = 0x6367_7270;
/// The controllers that limit and account a pod.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
const TUN: &str = "/dev/net/tun";

const USE_ANOTHER_HOST: &str = "use a host whose processor's VT-x or AMD-V is on (in the firmware's setup, or as \
     nested virtualization if the host is a virtual machine itself)";

/// Whether a guest runs.
pub fn kvm() -> Finding {
    match pericarp_vmm::probe() {
        Ok(()) => Finding::ok("works: a 64-bit guest ran and took an interrupt"),
        Err(error) => Finding::failed(chain(&error), kvm_to_do(&error)),
    }
}

fn kvm_to_do(error: &ProbeError) -> String {
    match error {
        ProbeError::Missing => {
            format!("`modprobe kvm_intel` or `modprobe kvm_amd`; if that fails, {USE_ANOTHER_HOST}")
        }
        ProbeError::Permission { .. } => "run this as root, as the controller must be".to_owned(),
        ProbeError::Ended { reached: Progress::Started, reason: ExitReason::Kvm(_) }
        | ProbeError::Timeout { reached: Progress::Started } => {
            format!("this KVM emulates what the processor should run; {USE_ANOTHER_HOST}")
        }
        _ => format!("the kernel's log (`dmesg`) may tell why; otherwise {USE_ANOTHER_HOST}"),
    }
}

/// The kernel's version.
pub fn kernel() -> Finding {
    judge_kernel(&rustix::system::uname().release().to_string_lossy())
}

fn judge_kernel(release: &str) -> Finding {
    at_least("Linux", release, KERNEL)
}

/// Whether a version is new enough.
pub(super) fn at_least(what: &str, version: &str, least: (u32, u32)) -> Finding {
    let (major, minor) = least;
    let found = format!("{what} {version}");
    match numbers(version) {
        Some(numbers) if numbers >= least => Finding::ok(found),
        Some(_) => Finding::failed(found, format!("use {what} {major}.{minor} or newer")),
        None => Finding::warning(found, format!("make sure that this is {what} {major}.{minor} or newer")),
    }
}

/// The first two numbers of a version, which may begin with a `v`.
pub(super) fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts =
        version.strip_prefix('v').unwrap_or(version).split(|character: char| !character.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// cgroup v2 with the controllers that a pod is limited by.
pub fn cgroups() -> Finding {
    let hierarchy = "boot with the unified cgroup hierarchy (systemd: `systemd.unified_cgroup_hierarchy=1`)";
    match statfs(CGROUP_ROOT) {
        Ok(mounted) if mounted.f_type == CGROUP2 => {}
        Ok(_) => return Finding::failed(format!("{CGROUP_ROOT} is not cgroup v2"), hierarchy),
        Err(error) => {
            return Finding::failed(format!("{CGROUP_ROOT}: {}", io::Error::from(error)), hierarchy);
        }
    }
    match fs::read_to_string(format!("{CGROUP_ROOT}/cgroup.controllers")) {
        Ok(controllers) => judge_controllers(&controllers),
        Err(error) => Finding::failed(
            format!("the controllers of {CGROUP_ROOT} cannot be read: {error}"),
            "mount cgroup v2 there",
        ),
    }
}

fn judge_controllers(controllers: &str) -> Finding {
    let missing: Vec<_> = CONTROLLERS
        .into_iter()
        .filter(|needed| !controllers.split_whitespace().any(|controller| controller == *needed))
        .collect();
    if missing.is_empty() {
        return Finding::ok(format!("v2 with {}", CONTROLLERS.join(", ")));
    }
    Finding::failed(
        format!("v2 without {}", missing.join(", ")),
        "take `cgroup_disable` off the kernel's command line, and unmount cgroup v1's hierarchies",
    )
}

/// overlayfs, of which containers' root filesystems are made.
pub fn overlayfs() -> Finding {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let modules =
        fs::read_to_string(Path::new("/lib/modules").join(release).join("modules.dep")).unwrap_or_default();
    judge_overlayfs(&filesystems, &modules)
}

/// `filesystems` is `/proc/filesystems`, `modules` the kernel's `modules.dep`.
fn judge_overlayfs(filesystems: &str, modules: &str) -> Finding {
    if filesystems.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        Finding::ok("the kernel has it")
    } else if modules.contains("/overlay.ko") {
        Finding::warning(
            "a module of the kernel that is not loaded",
            "`modprobe overlay`, and `echo overlay > /etc/modules-load.d/pericarp.conf` for the next boot",
        )
    } else {
        Finding::failed(
            "the kernel does not have it",
            "`modprobe overlay`; if that fails, use a kernel with CONFIG_OVERLAY_FS",
        )
    }
}

/// TUN, for pods' networks.
pub fn tun() -> Finding {
    match File::options().read(true).write(true).open(TUN) {
        Ok(_) => Finding::ok(format!("{TUN} opens")),
        Err(error) => {
            let to_do = match error.kind() {
                io::ErrorKind::PermissionDenied => "run this as root, as the controller must be",
                _ => "`modprobe tun`; if that fails, use a kernel with CONFIG_TUN",
            };
            Finding::failed(format!("{TUN} does not open: {error}"), to_do)
        }
    }
}

/// What surrounds a machine's process.
pub fn jail() -> Finding {
    match pericarp_jail::probe() {
        Ok(()) => Finding::ok("a process can have a root and a user namespace of its own"),
        Err(error) => {
            let to_do = match error.raw_os_error() {
                Some(libc::ENOSPC) => "set the sysctl user.max_user_namespaces to 1 or more",
                Some(libc::EPERM) => "run this as root, as the controller must be",
                Some(libc::EINVAL) => {
                    "use a mounted root file system, not the kernel's initramfs, and a kernel with CONFIG_USER_NS"
                }
                _ => "use a kernel with CONFIG_USER_NS, and let root make namespaces",
            };
            Finding::failed(format!("no machine can be jailed: {error}"), to_do)
        }
    }
}

/// BPF, by which port-forward finds its way into a pod's machine.
pub fn port_forward() -> Finding {
    match pericarp_controller::probe_port_forward() {
        Ok(()) => Finding::ok("the kernel takes the BPF program that it needs"),
        Err(error) => Finding::warning(
            format!("will not work: {}", chain(&error)),
            "run this as root, as the controller must be; if that is not it, use a kernel with CONFIG_BPF_SYSCALL",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    #[test]
    fn kernels_are_compared_by_number() {
        for (release, status) in [
            ("6.1.0-32-amd64", Status::Ok),
            ("6.12.57+deb13-amd64", Status::Ok),
            ("7.0-rc1", Status::Ok),
            ("6.0.19", Status::Failed),
            ("5.15.0-122-generic", Status::Failed),
            ("unknown", Status::Warning),
        ] {
            assert_eq!(judge_kernel(release).status, status, "{release}");
        }
    }

    #[test]
    fn a_controller_that_is_missing_is_named() {
        assert_eq!(judge_controllers("cpuset cpu io memory hugetlb pids\n").status, Status::Ok);
        let finding = judge_controllers("cpuset io pids\n");
        assert_eq!((finding.status, finding.found.as_str()), (Status::Failed, "v2 without cpu, memory"));
    }

    #[test]
    fn a_module_that_is_not_loaded_is_a_warning() {
        let modules = "kernel/fs/overlayfs/overlay.ko.xz:\n";
        assert_eq!(judge_overlayfs("nodev\tproc\nnodev\toverlay\n", "").status, Status::Ok);
        assert_eq!(judge_overlayfs("nodev\tproc\n\text4\n", modules).status, Status::Warning);
        assert_eq!(
            judge_overlayfs("nodev\tproc\n\text4\n", "kernel/fs/fuse/fuse.ko:\n").status,
            Status::Failed
        );
    }

    #[test]
    fn what_is_to_be_done_about_kvm_depends_on_what_failed() {
        let emulated = ProbeError::Timeout { reached: Progress::Started };
        assert!(kvm_to_do(&emulated).contains("emulates"));
        assert!(kvm_to_do(&ProbeError::Missing).contains("modprobe"));
        let permission = ProbeError::Permission { user: 1000, owner: 0, group: 104, mode: 0o660 };
        assert!(kvm_to_do(&permission).contains("root"));
        assert!(kvm_to_do(&ProbeError::Version { found: 10 }).contains("dmesg"));
    }
}
