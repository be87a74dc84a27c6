//! The bus: takes a vCPU's accesses to devices to the slots of virtio-mmio and to the I/O ports.

use std::sync::{Mutex, MutexGuard};

use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES},
    console::Console,
    lock::unpoisoned,
    virtio::{Counter, device_slot::DeviceSlot},
};

/// First port of the 8250 serial line (COM1).
const SERIAL_PORT: u16 = 0x3f8;
/// Number of ports that the serial line has.
const SERIAL_PORTS: u16 = 8;
/// The keyboard controller's command port: how a PC resets itself (`reboot=k`).
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// What a write to a port asks of the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// The vCPU goes on.
    Done,
    /// The guest resets the machine, which ends it.
    Reset,
}

/// All devices of a machine as its vCPUs reach them. An address without a device reads as ones and ignores writes, as
/// on a PC.
pub struct Bus {
    /// Slot n is at the n-th page from [`DEVICES`].
    pub slots: Vec<Mutex<DeviceSlot>>,
    /// The console behind the serial line.
    pub console: Mutex<Console>,
    pub exits: VmExitCounters,
}

/// How often vCPUs have left the guest for a device. Each exit costs microseconds, or far more where the host itself is
/// a guest.
#[derive(Clone, Debug, Default)]
pub struct VmExitCounters {
    pub mmio: Counter,
    pub port: Counter,
}

impl Bus {
    /// Handles a read from a guest-physical address that is neither memory nor a device's page.
    pub fn mmio_read(&self, data: &mut [u8]) {
        self.exits.mmio.add(1);
        data.fill(0xff);
    }

    /// Handles a write to the guest-physical `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.exits.mmio.add(1);
        let Some(distance) = address.checked_sub(DEVICES) else { return };
        // The address is the guest's: there need not be such a slot.
        let index = usize::try_from(distance / DEVICE_SIZE).ok();
        if let Some(slot) = index.and_then(|index| self.slots.get(index)) {
            unpoisoned(slot.lock()).write(distance % DEVICE_SIZE, data);
        }
    }

    /// Locks a slot. Panics if there is none with this number: the numbers come from the machine's
    /// [`SlotPlan`](crate::slot_plan::SlotPlan).
    pub fn slot(&self, index: u32) -> MutexGuard<'_, DeviceSlot> {
        unpoisoned(self.slots[index as usize].lock())
    }

    /// Handles a read from an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.exits.port.add(1);
        data.fill(0xff);
        if let (Some(register), [value]) = (serial_register(port), &mut *data) {
            *value = unpoisoned(self.console.lock()).read(register);
        } else if port == KEYBOARD_PORT {
            // The input buffer is empty: the guest need not wait before it sends the reset.
            data.fill(0);
        }
    }

    /// Handles a write to an I/O port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortWrite {
        self.exits.port.add(1);
        match (serial_register(port), data) {
            (Some(register), &[value]) => {
                unpoisoned(self.console.lock()).write(register, value);
                PortWrite::Done
            }
            (None, [KEYBOARD_RESET]) if port == KEYBOARD_PORT => PortWrite::Reset,
            _ => PortWrite::Done,
        }
    }
}

/// The register of the serial line at a port.
fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT).filter(|register| *register < SERIAL_PORTS)?;
    u8::try_from(register).ok()
}
