//! Where a vCPU's device accesses go: virtio-mmio pages and the two ports that the guest uses.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES},
    console::Console,
    virtio::{Counter, slot::Slot},
};

/// First port of the 8250 serial line, and how many it has.
const SERIAL_PORT: u16 = 0x3f8;
const SERIAL_PORTS: u16 = 8;
/// The keyboard controller's command port: how a PC resets itself (`reboot=k`).
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// What a port access asks of the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// Go on.
    Done,
    /// The guest wants the machine reset, which ends it.
    Reset,
}

/// All devices of a machine as its vCPUs reach them. What nothing answers to reads as ones and
/// swallows writes, as on a PC.
pub struct Bus {
    /// Slot n answers in the n-th page from [`DEVICES`].
    pub slots: Vec<Mutex<Slot>>,
    /// The console behind the serial line.
    pub console: Mutex<Console>,
    pub exits: Exits,
}

/// How often the vCPUs had to leave the guest for a device. Each time costs microseconds, or far
/// more where the host itself is a guest.
#[derive(Clone, Debug, Default)]
pub struct Exits {
    pub mmio: Counter,
    pub port: Counter,
}

impl Bus {
    /// A vCPU reads from a guest-physical address that is neither memory nor a device's page.
    pub fn mmio_read(&self, data: &mut [u8]) {
        self.exits.mmio.add(1);
        data.fill(0xff);
    }

    /// A vCPU writes to guest-physical `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        self.exits.mmio.add(1);
        let Some(distance) = address.checked_sub(DEVICES) else { return };
        if let Some(mut slot) = u32::try_from(distance / DEVICE_SIZE).ok().and_then(|index| self.slot(index))
        {
            slot.write(distance % DEVICE_SIZE, data);
        }
    }

    /// One of the slots, for as long as nobody else needs it.
    pub fn slot(&self, index: u32) -> Option<MutexGuard<'_, Slot>> {
        let slot = self.slots.get(usize::try_from(index).ok()?)?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A vCPU reads from an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        self.exits.port.add(1);
        data.fill(0xff);
        if let (Some(register), [value]) = (serial_register(port), &mut *data) {
            *value = self.console.lock().unwrap_or_else(PoisonError::into_inner).read(register);
        } else if port == KEYBOARD_PORT {
            // Input buffer empty: the guest need not wait before it sends the reset.
            data.fill(0);
        }
    }

    /// A vCPU writes to an I/O port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortWrite {
        self.exits.port.add(1);
        match (serial_register(port), data) {
            (Some(register), &[value]) => {
                self.console.lock().unwrap_or_else(PoisonError::into_inner).write(register, value);
                PortWrite::Done
            }
            (None, [KEYBOARD_RESET]) if port == KEYBOARD_PORT => PortWrite::Reset,
            _ => PortWrite::Done,
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT).filter(|register| *register < SERIAL_PORTS)?;
    u8::try_from(register).ok()
}
