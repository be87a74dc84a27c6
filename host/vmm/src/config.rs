//! What a machine is made of: the file that `pericarp vmm --config` reads.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Everything that is needed to start one machine. Written by the controller as
/// `<run>/<sandbox id>/machine.json`; complete in itself, so that a machine can be started again by
/// hand from its file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The sandbox id, for messages only.
    pub id: String,
    /// ELF `vmlinux`.
    pub kernel: PathBuf,
    /// Initial ramfs (cpio) that holds the agent as `/init`.
    pub initramfs: PathBuf,
    /// Appended to the kernel command line that the machine makes itself.
    #[serde(default)]
    pub cmdline: String,
    /// Number of virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Virtual CPUs that the machine can be given while it runs, those of its start included. 0: no more.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vcpus_max: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Memory in MiB that the machine can be given while it runs, that of its start included. 0: no more.
    #[serde(default, skip_serializing_if = "is_default")]
    pub memory_max_mib: u32,
    /// Places for disks that come while the machine runs, at most [`MachineConfig::DISK_SLOTS_MAX`]; and
    /// no more than there are interrupt lines left beside the other devices.
    #[serde(default = "disk_slots")]
    pub disk_slots: u8,
    /// Whether the guest may have virtual machines of its own, where the host has nested virtualization.
    #[serde(default, skip_serializing_if = "is_default")]
    pub nested_virtualization: bool,
    /// Where the guest's kernel messages go.
    pub console: ConsoleConfig,
    /// The guest's vsock device.
    pub vsock: VsockConfig,
    /// The directory that the guest sees through virtio-fs, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<ShareConfig>,
    /// The guest's network devices, in the order in which it finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetConfig>,
}

impl MachineConfig {
    /// What a machine has unless its configuration says otherwise.
    pub const DISK_SLOTS: u8 = 8;
    /// More would leave no interrupt lines for networks.
    pub const DISK_SLOTS_MAX: u8 = 15;

    /// Most virtual CPUs that the machine can have.
    pub fn vcpus_max(&self) -> u8 {
        self.vcpus_max.max(self.vcpus)
    }

    /// Most memory that the machine can have, in MiB.
    pub fn memory_max_mib(&self) -> u32 {
        self.memory_max_mib.max(self.memory_mib)
    }
}

fn disk_slots() -> u8 {
    MachineConfig::DISK_SLOTS
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A virtio-net device on a tap that exists already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The network namespace that the tap is in, for example `/run/netns/cni-1234`.
    pub netns: PathBuf,
    /// The tap's name.
    pub tap: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's MTU in bytes.
    pub mtu: u16,
    /// Receive and transmit queues of the guest's, of which each pair has a thread of its own: 1 to
    /// [`NetConfig::QUEUE_PAIRS_MAX`]. With more than one the tap must have been made with several
    /// queues (`IFF_MULTI_QUEUE`), and with one it must not.
    #[serde(default = "one_queue_pair")]
    pub queue_pairs: u16,
}

impl NetConfig {
    /// Each pair costs a thread on the host and some 400 KiB of the guest's memory in receive buffers.
    /// All interrupts of a device arrive at one vCPU (virtio-mmio has one line), so that what more
    /// pairs would bring gets less and less.
    pub const QUEUE_PAIRS_MAX: u16 = 4;
}

fn one_queue_pair() -> u16 {
    1
}

/// The console log: what the guest's kernel prints, bounded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// The log file; made with mode 0600.
    pub path: PathBuf,
    /// The file never grows beyond this many bytes; the newest output is kept.
    pub limit_bytes: u64,
}

/// virtio-vsock in its hybrid form: a unix socket stands for the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The socket that host programs connect to (`CONNECT <port>\n` → `OK <port>\n`). The guest's
    /// connections to host port P go to the socket `<path>_<P>`.
    pub path: PathBuf,
    /// Host ports that the guest may connect to; all others are refused.
    pub host_ports: Vec<u32>,
    /// The guest's port that takes connections to the pod's localhost, if it has one and the machine is handed a
    /// listener for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_port: Option<u32>,
}

/// A directory shared with the guest through virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The tag that the guest mounts.
    pub tag: String,
    /// Root of the shared tree; mounts that appear below it later are seen by the guest.
    pub directory: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_written_before_it_could_grow_does_not_and_has_slots() {
        let written = r#"{"id": "a", "kernel": "/k", "initramfs": "/i", "vcpus": 2, "memory_mib": 512,
            "console": {"path": "/c", "limit_bytes": 1}, "vsock": {"path": "/v", "host_ports": []}}"#;
        let config: MachineConfig = serde_json::from_str(written).unwrap();
        assert_eq!((config.vcpus_max(), config.memory_max_mib()), (2, 512));
        assert_eq!(config.disk_slots, MachineConfig::DISK_SLOTS);
        assert!(!config.nested_virtualization);
        let again: MachineConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
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
