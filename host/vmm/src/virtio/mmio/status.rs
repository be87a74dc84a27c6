//! The device status field (virtio 1.2, section 2.1), and the transitions by which a driver sets a device up (section
//! 3.1.1).
//!
//! ```text
//!  Reset ──ACKNOWLEDGE──▶ Acknowledged ──DRIVER──▶ DriverFound ──FEATURES_OK──▶ FeaturesOk ──DRIVER_OK──▶ DriverOk
//!                                                                                                            │ 0
//!  From each of the first four: 0 ──▶ Reset, FAILED ──▶ Failed                                               ▼
//!                                                                                                         Failed
//! ```
//!
//! A device that was in use cannot be used again (`Failed`), because its worker owns the queues.

use self::DeviceStatus::{Acknowledged, DriverFound, DriverOk, Failed, FeaturesOk, Reset};

/// Bits of the field.
pub mod bit {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const FAILED: u32 = 128;
}

/// How far a driver has set a device up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceStatus {
    /// The driver has not begun.
    Reset,
    /// The guest has noticed the device.
    Acknowledged,
    /// The guest has a driver for it, which may now accept features.
    DriverFound,
    /// Driver and device agree on the features. The driver may now set up the queues.
    FeaturesOk,
    /// The device is in use.
    DriverOk,
    /// The driver has given up, the device could not be activated, or it was reset after it was in use.
    Failed,
}

/// What a driver's write of the field can do: in which status, by which bits that were not set before, to which status.
/// A write that sets no such bit, or any other, changes nothing.
const FORWARD_TRANSITIONS: [(DeviceStatus, u32, DeviceStatus); 8] = [
    (Reset, bit::ACKNOWLEDGE, Acknowledged),
    (Acknowledged, bit::DRIVER, DriverFound),
    (DriverFound, bit::FEATURES_OK, FeaturesOk),
    (FeaturesOk, bit::DRIVER_OK, DriverOk),
    // With FAILED, other bits do not matter: see `DeviceStatus::after_write`.
    (Reset, bit::FAILED, Failed),
    (Acknowledged, bit::FAILED, Failed),
    (DriverFound, bit::FAILED, Failed),
    (FeaturesOk, bit::FAILED, Failed),
];

/// What a write of 0, which resets the device, leads to.
const RESET_TRANSITIONS: [(DeviceStatus, DeviceStatus); 6] = [
    (Reset, Reset),
    (Acknowledged, Reset),
    (DriverFound, Reset),
    (FeaturesOk, Reset),
    (DriverOk, Failed),
    (Failed, Failed),
];

impl DeviceStatus {
    /// The field as the driver reads it.
    pub fn bits(self) -> u32 {
        match self {
            Reset => 0,
            Acknowledged => bit::ACKNOWLEDGE,
            DriverFound => bit::ACKNOWLEDGE | bit::DRIVER,
            FeaturesOk => bit::ACKNOWLEDGE | bit::DRIVER | bit::FEATURES_OK,
            DriverOk => bit::ACKNOWLEDGE | bit::DRIVER | bit::FEATURES_OK | bit::DRIVER_OK,
            Failed => bit::FAILED,
        }
    }

    /// The status that a driver's write of `value` leads to, or `None` if the driver may not write that.
    ///
    /// A driver may only set the next bit, or reset the device, or give up. Bits that it has set before it need not
    /// repeat.
    pub fn after_write(self, value: u32) -> Option<Self> {
        if value == 0 {
            return RESET_TRANSITIONS.into_iter().find(|(from, _)| *from == self).map(|(_, to)| to);
        }
        let new_bits = value & !self.bits();
        let requested = if new_bits & bit::FAILED != 0 { bit::FAILED } else { new_bits };
        let matches = |(from, bits, _): &(Self, u32, Self)| *from == self && *bits == requested;
        FORWARD_TRANSITIONS.into_iter().find(matches).map(|(_, _, to)| to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [DeviceStatus; 6] = [Reset, Acknowledged, DriverFound, FeaturesOk, DriverOk, Failed];

    #[test]
    fn a_driver_takes_the_steps_one_by_one() {
        let mut status = Reset;
        for (value, next) in [(1, Acknowledged), (3, DriverFound), (11, FeaturesOk), (15, DriverOk)] {
            status = status.after_write(value).unwrap();
            assert_eq!((status, status.bits()), (next, value));
        }
    }

    #[test]
    fn a_step_need_not_repeat_the_bits_of_those_before_it() {
        for (from, bit, to) in FORWARD_TRANSITIONS {
            assert_eq!(from.after_write(bit), Some(to));
            assert_eq!(from.after_write(from.bits() | bit), Some(to));
        }
    }

    #[test]
    fn a_device_that_was_in_use_cannot_be_reset_to_its_start() {
        for status in ALL {
            let expected = if matches!(status, DriverOk | Failed) { Failed } else { Reset };
            assert_eq!(status.after_write(0), Some(expected), "{status:?}");
        }
    }

    #[test]
    fn every_write_that_is_no_step_is_invalid() {
        for from in ALL {
            for value in (1..=u32::from(u8::MAX)).chain([1 << 8, u32::MAX]) {
                let new_bits = value & !from.bits();
                let gives_up = new_bits & bit::FAILED != 0 && !matches!(from, DriverOk | Failed);
                let is_step = match from {
                    Reset => new_bits == bit::ACKNOWLEDGE,
                    Acknowledged => new_bits == bit::DRIVER,
                    DriverFound => new_bits == bit::FEATURES_OK,
                    FeaturesOk => new_bits == bit::DRIVER_OK,
                    DriverOk | Failed => false,
                };
                assert_eq!(from.after_write(value).is_some(), gives_up || is_step, "{from:?}, {value:#x}");
            }
        }
    }
}
