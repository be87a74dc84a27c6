//! Which of the machine's slots is for which device.
//!
//! A slot is a page of registers and an interrupt ([`device_slot`](crate::virtio::device_slot)); its number decides the
//! addresses of both. In this order, the slots are for
//!
//! 1. the devices that the machine starts with (see `make_boot_devices` in `machine.rs`),
//! 2. the device through which memory is plugged, if any can be,
//! 3. disks, as many as are configured or as there are interrupts left.

use std::ops::Range;

use crate::{arch::current::layout::DEVICES_MAX, config::MachineConfig, error::Error};

/// The devices that every machine has: vsock and rng.
const DEVICES_OF_EVERY_MACHINE: usize = 2;

/// The numbers of the slots by what they are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotPlan {
    /// The slots of the devices that the machine starts with.
    pub boot_devices: Range<u32>,
    /// The slot of the device through which memory is plugged.
    pub memory_hotplug: Option<u32>,
    /// The slots of disks.
    pub disks: Range<u32>,
}

impl SlotPlan {
    /// Plans the slots of a machine. `memory_hotplug`: whether memory can be plugged while it runs. Fails if there are
    /// more devices, disks not counted, than interrupts.
    pub fn new(config: &MachineConfig, memory_hotplug: bool) -> Result<Self, Error> {
        let boot_devices = DEVICES_OF_EVERY_MACHINE + usize::from(config.share.is_some()) + config.nets.len();
        let without_disks = boot_devices + usize::from(memory_hotplug);
        let last = (without_disks + usize::from(config.disk_slots)).min(DEVICES_MAX);
        let (Ok(boot_end), Ok(first_disk), Ok(last)) =
            (u32::try_from(boot_devices), u32::try_from(without_disks), u32::try_from(last))
        else {
            return Err(Error::TooManyDevices { count: without_disks });
        };
        if without_disks > DEVICES_MAX {
            return Err(Error::TooManyDevices { count: without_disks });
        }
        Ok(Self {
            boot_devices: 0..boot_end,
            memory_hotplug: memory_hotplug.then_some(boot_end),
            disks: first_disk..last,
        })
    }

    /// All slots, whatever they are for.
    pub fn all(&self) -> Range<u32> {
        0..self.disks.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConsoleConfig, NetConfig, RateLimits, ShareConfig, VsockConfig};

    fn config(share: bool, nets: usize, disk_slots: u8) -> MachineConfig {
        let net = NetConfig {
            netns: "/n".into(),
            tap: "tap0".into(),
            mac: [2, 0, 0, 0, 0, 7],
            mtu: 1500,
            queue_pairs: 1,
        };
        MachineConfig {
            id: "a".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cmdline: String::new(),
            vcpus: 1,
            vcpus_max: 0,
            memory_mib: 512,
            memory_max_mib: 0,
            disk_slots,
            nested_virtualization: false,
            console: ConsoleConfig { path: "/c".into(), limit_bytes: 1 },
            vsock: VsockConfig::default(),
            share: share.then(|| ShareConfig { tag: "s".into(), directory: None }),
            nets: vec![net; nets],
            rate_limits: RateLimits::default(),
        }
    }

    #[test]
    fn the_slots_of_later_devices_follow_those_of_the_first() {
        let plan = SlotPlan::new(&config(true, 1, 8), true).unwrap();
        assert_eq!(plan, SlotPlan { boot_devices: 0..4, memory_hotplug: Some(4), disks: 5..13 });
        assert_eq!(plan.all(), 0..13);
        let plan = SlotPlan::new(&config(false, 0, 0), false).unwrap();
        assert_eq!(plan, SlotPlan { boot_devices: 0..2, memory_hotplug: None, disks: 2..2 });
    }

    #[test]
    fn there_are_as_many_slots_for_disks_as_interrupts_are_left() {
        let plan = SlotPlan::new(&config(true, 10, 15), true).unwrap();
        assert_eq!(plan.disks, 14..19);
    }

    #[test]
    fn more_devices_than_interrupts_are_refused() {
        assert_eq!(SlotPlan::new(&config(true, 15, 8), true).unwrap().disks, 19..19);
        for (nets, memory_hotplug) in [(16, true), (17, false), (100, false)] {
            let error = SlotPlan::new(&config(true, nets, 8), memory_hotplug).unwrap_err();
            assert!(matches!(error, Error::TooManyDevices { .. }), "{error}");
        }
    }
}
