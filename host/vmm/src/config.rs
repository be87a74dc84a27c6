//! The configuration of a machine: the file that `pericarp vmm --config` reads.

use std::{num::NonZeroU64, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Everything that is needed to start one machine. The controller writes it to `<run>/<sandbox id>/machine.json`. It is
/// complete, so that a machine can be started again by hand from its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The sandbox id. It is used in messages only.
    pub id: String,
    /// The guest's kernel: an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The initial ramfs (cpio), which contains the agent as `/init`.
    pub initramfs: PathBuf,
    /// Parameters that are appended to the kernel command line of every machine.
    #[serde(default)]
    pub cmdline: String,
    /// Number of virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Most virtual CPUs that the machine can have while it runs, including those of its start. 0: no more than those.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vcpus_max: u8,
    /// Memory that the guest is started with, in MiB.
    pub memory_mib: u32,
    /// Most memory in MiB that the machine can have while it runs, including that of its start. 0: no more than that.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory_max_mib: u32,
    /// Slots for disks that are inserted while the machine runs, at most [`MachineConfig::DISK_SLOTS_MAX`]. The machine
    /// has fewer if its other devices leave fewer interrupts.
    #[serde(default = "disk_slots")]
    pub disk_slots: u8,
    /// Whether the guest may run virtual machines itself, on a host that supports nested virtualization.
    #[serde(default, skip_serializing_if = "is_default")]
    pub nested_virtualization: bool,
    /// The log of the guest's kernel messages.
    pub console: ConsoleConfig,
    /// The guest's vsock device.
    pub vsock: VsockConfig,
    /// The directory that the guest sees through virtio-fs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareConfig>,
    /// The guest's network devices, in the order in which it finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
    /// How much the guest's devices may do in a second. There are no limits unless they are set.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rate_limits: RateLimits,
}

impl MachineConfig {
    /// Memory in MiB of the smallest guest in which the kernel and the agent start.
    pub const MEMORY_MIB_MIN: u32 = 64;
    /// Number of slots for disks unless the configuration says otherwise.
    pub const DISK_SLOTS: u8 = 8;
    /// Most slots for disks. More would leave no interrupts for networks.
    pub const DISK_SLOTS_MAX: u8 = 15;

    /// Most virtual CPUs that the machine can have.
    pub fn vcpus_max(&self) -> u8 {
        self.vcpus_max.max(self.vcpus)
    }

    /// Most memory that the machine can have, in MiB.
    pub fn memory_max_mib(&self) -> u32 {
        self.memory_max_mib.max(self.memory_mib)
    }

    /// The memory that the machine starts with, in bytes.
    pub(crate) fn boot_memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Most memory that the machine can have, in bytes.
    pub(crate) fn memory_max_bytes(&self) -> u64 {
        u64::from(self.memory_max_mib()) << 20
    }
}

fn disk_slots() -> u8 {
    MachineConfig::DISK_SLOTS
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A virtio-net device on a tap, which must exist before the machine starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The network namespace in which the tap is, for example `/run/netns/cni-1234`.
    pub netns: PathBuf,
    /// The tap's name.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's MTU in bytes.
    pub mtu: u16,
    /// Pairs of a receive and a transmit queue, each with a thread of its own: 1 to [`NetConfig::QUEUE_PAIRS_MAX`]. For
    /// more than one, the tap must have been made with several queues (`IFF_MULTI_QUEUE`); for one, it must not.
    #[serde(default = "one_queue_pair")]
    pub queue_pairs: u16,
}

impl NetConfig {
    /// Most pairs of queues. Each costs a thread on the host and some 400 KiB of the guest's memory in receive buffers.
    /// All interrupts of a device arrive at one vCPU (virtio-mmio has one line), so that more pairs would gain little.
    pub const QUEUE_PAIRS_MAX: u16 = 4;
}

fn one_queue_pair() -> u16 {
    1
}

/// The console log: what the guest's kernel prints, limited in size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// The log file, which is made with mode 0600.
    pub path: PathBuf,
    /// Bytes beyond which the file never grows. The newest output is kept.
    pub limit_bytes: u64,
}

/// The ports of virtio-vsock. The sockets behind them are opened by whoever starts the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The host's port that the guest may connect to, once. Without it, or without a stream that the machine inherits,
    /// it may connect to none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_port: Option<u32>,
    /// The guest's port that takes connections to the pod's localhost. Without it, or without a listener that the
    /// machine inherits, there are no such connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_port: Option<u32>,
}

/// A directory shared with the guest through virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag that the guest mounts.
    pub tag: String,
    /// The host's directory that is shared, with what is mounted below it later. Without one, the machine shares a
    /// directory of its own ([`pericarp_jail::SHARE`]), in a mount namespace of its own in which there is nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
}

/// How much a machine's devices may do in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimits {
    /// Frames that the guest receives, on each network device. A frame is as large as it crosses the tap: up to 64 KiB,
    /// where the guest's driver takes segments that large.
    #[serde(skip_serializing_if = "is_default")]
    pub net_receive: RateLimit,
    /// Frames that the guest sends, on each network device.
    #[serde(skip_serializing_if = "is_default")]
    pub net_transmit: RateLimit,
    /// Requests to each disk, and the bytes that are read and written.
    #[serde(skip_serializing_if = "is_default")]
    pub disk: RateLimit,
    /// Requests to the share, and the bytes of files that are read, written and copied.
    #[serde(skip_serializing_if = "is_default")]
    pub fs: RateLimit,
    /// Bytes that the guest prints to its console. There are no operations.
    #[serde(skip_serializing_if = "is_default")]
    pub console: RateLimit,
}

/// A limit of operations and of bytes: see [`rate_limiter`](crate::rate_limiter) for what exactly it allows. A burst
/// without a rate means nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateLimit {
    /// `None`: without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<NonZeroU64>,
    /// Bytes beyond the limit, once, from the device's start on. `None`: no bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<u64>,
    /// `None`: without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_per_second: Option<NonZeroU64>,
    /// Operations beyond the limit, once, from the device's start on. `None`: no operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations_burst: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_written_before_it_could_grow_does_not_and_has_slots() {
        let written = r#"{"id": "a", "kernel": "/k", "initramfs": "/i", "vcpus": 2, "memory_mib": 512,
            "console": {"path": "/c", "limit_bytes": 1}, "vsock": {}}"#;
        let config: MachineConfig = serde_json::from_str(written).unwrap();
        assert_eq!((config.vcpus_max(), config.memory_max_mib()), (2, 512));
        assert_eq!(config.disk_slots, MachineConfig::DISK_SLOTS);
        assert!(!config.nested_virtualization);
        assert_eq!(config.rate_limits, RateLimits::default());
        let again: MachineConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn a_share_is_the_machines_own_unless_a_directory_is_given() {
        let share: ShareConfig = serde_json::from_str(r#"{"tag": "share"}"#).unwrap();
        assert_eq!(share.directory, None);
        let share: ShareConfig = serde_json::from_str(r#"{"tag": "share", "directory": "/s"}"#).unwrap();
        assert_eq!(share.directory, Some("/s".into()));
    }

    #[test]
    fn a_network_device_written_before_there_were_queue_pairs_has_one() {
        let written = r#"{"netns": "/run/netns/pod", "tap": "tap0", "mac": [2, 0, 0, 0, 0, 7], "mtu": 1500}"#;
        let config: NetConfig = serde_json::from_str(written).unwrap();
        assert_eq!(config.queue_pairs, 1);
        let again: NetConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }
}
