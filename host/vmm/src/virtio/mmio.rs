//! The MMIO transport (virtio 1.2, section 4.2): the registers through which the guest finds a
//! device, sets it up and activates it.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Active, ActiveQueue, Device, F_EVENT_IDX, F_VERSION_1, Interrupt,
    page::{self, Page},
};
use crate::memory::GuestMemory;

/// Offset of the `QueueNotify` register, which KVM watches by itself.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of the `InterruptACK` register: see [`USED_BUFFER`].
pub const INTERRUPT_ACK: u64 = 0x64;
const INTERRUPT_STATUS: u64 = 0x60;
const DEVICE_ID: u64 = 0x08;
const CONFIG_GENERATION: u64 = 0xfc;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"peri");
/// Offset of the configuration space, which goes on to the end of the page.
const CONFIG_SPACE: usize = 0x100;

/// What `InterruptStatus` always reads, acknowledged or not: that used buffers are what an interrupt is about. A driver
/// looks at its queues and finds out. So the guest leaves its processor neither to ask nor to acknowledge.
pub const USED_BUFFER: u32 = 1;
/// What `InterruptStatus` reads as well from when the device's configuration has changed until the guest has
/// acknowledged that. Only such an acknowledgement reaches the device.
const CONFIG_CHANGED: u32 = 2;

/// Bits of the status register (virtio 1.2, section 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const FAILED: u32 = 128;
}

/// How far the guest has come with a device. Only `Setup` lets it change anything.
enum State {
    /// Status as the guest has written it; queues as it has configured them.
    Setup { status: u32, queues: Vec<Queue> },
    /// `DRIVER_OK`: the queues belong to the device.
    Active,
    /// Reset after it was active, or refused to start: the device is gone for good.
    Failed,
}

/// One device in its page of guest-physical memory.
pub struct MmioDevice {
    device: Box<dyn Device>,
    memory: GuestMemory,
    /// Where the guest reads.
    page: Page,
    state: State,
    interrupt: Interrupt,
    /// One for each queue; bound to the notify register by whoever builds the machine.
    notified: Vec<EventFd>,
    features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    selected_queue: usize,
    config_generation: u32,
}

impl MmioDevice {
    /// Puts a device behind the transport. `irqfd` is its interrupt line, `page` where the guest reads its registers.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        page: Page,
        irqfd: EventFd,
    ) -> std::io::Result<MmioDevice> {
        let notified = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let interrupt = Interrupt(Arc::new(irqfd));
        let state = State::Setup { status: 0, queues: new_queues(device.as_ref()) };
        let device = MmioDevice {
            device,
            memory,
            page,
            state,
            interrupt,
            notified,
            features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            selected_queue: 0,
            config_generation: 0,
        };
        device.publish();
        device.publish_what_stays();
        Ok(device)
    }

    /// Makes a page read as a device of no type.
    pub fn publish_placeholder(page: &Page) {
        page.set(DEVICE_ID, 0);
        page.set(0x00, MAGIC);
        page.set(0x04, VERSION);
        page.set(0x0c, VENDOR);
        page.fill(0x10, &[0; page::SIZE - 0x10]);
    }

    /// Stops the device for good, whatever the guest is doing with it.
    pub fn stop(&mut self) {
        self.device.stop();
        self.state = State::Failed;
    }

    /// Takes the device out from behind the transport.
    pub fn into_device(self) -> Box<dyn Device> {
        self.device
    }

    /// The device behind the transport.
    pub fn device(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// The eventfds that KVM should write on notification, by queue; none if the device handles
    /// notifications on the vCPU's thread.
    pub fn notify_events(&self) -> &[EventFd] {
        if self.device.notified_inline() { &[] } else { &self.notified }
    }

    /// Puts what the guest does not choose where it reads it, the device's type last. The rest reads as zero.
    fn publish_what_stays(&self) {
        self.page.set(0x00, MAGIC);
        self.page.set(0x04, VERSION);
        self.page.set(0x0c, VENDOR);
        self.page.set(INTERRUPT_STATUS, USED_BUFFER);
        self.publish_config();
        self.page.set(DEVICE_ID, self.device.device_type());
    }

    fn publish_config(&self) {
        let mut config = [0; page::SIZE - CONFIG_SPACE];
        self.device.read_config(0, &mut config);
        self.page.fill(CONFIG_SPACE as u64, &config);
    }

    /// Shows the guest its device's configuration as it is now. The generation changes before and after, so that a
    /// driver that reads meanwhile sees that it has to read again.
    fn refresh_config(&mut self) {
        self.next_generation();
        self.publish_config();
        self.next_generation();
    }

    fn next_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        self.page.set(CONFIG_GENERATION, self.config_generation);
    }

    /// The device's configuration has changed, and the guest should know.
    pub fn config_changed(&mut self) {
        self.refresh_config();
        self.page.set(INTERRUPT_STATUS, USED_BUFFER | CONFIG_CHANGED);
        // Until its driver is ready it reads the configuration anyway.
        if matches!(self.state, State::Active) {
            self.interrupt.raise();
        }
    }

    fn notify(&mut self, queue: usize) {
        self.device.notify(queue);
        if self.device.config_changes() {
            self.refresh_config();
        }
    }

    /// Puts the registers that depend on others where the guest reads them.
    fn publish(&self) {
        let queue = self.queue();
        self.page.set(0x10, page_of(self.offered_features(), self.features_page));
        self.page.set(0x34, queue.map_or(0, |queue| u32::from(queue.max_size())));
        self.page.set(0x44, queue.map_or(0, |queue| u32::from(queue.ready())));
        self.page.set(0x70, self.status());
    }

    /// The guest writes `data` at `offset` of the device's page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // Configuration spaces are read-only, and registers are written whole.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x14 => self.features_page = value,
            0x20 => self.write_features(value),
            0x24 => self.driver_features_page = value,
            0x30 => self.selected_queue = value as usize,
            QUEUE_NOTIFY if matches!(self.state, State::Active) => self.notify(value as usize),
            // Only for devices whose configuration changes; all else is swallowed on its way.
            INTERRUPT_ACK if value & CONFIG_CHANGED != 0 => self.page.set(INTERRUPT_STATUS, USED_BUFFER),
            0x70 => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
        self.publish();
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn status(&self) -> u32 {
        match &self.state {
            State::Setup { status, .. } => *status,
            State::Active => status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK,
            State::Failed => status::FAILED,
        }
    }

    fn queue(&self) -> Option<&Queue> {
        match &self.state {
            State::Setup { queues, .. } => queues.get(self.selected_queue),
            State::Active | State::Failed => None,
        }
    }

    fn write_features(&mut self, value: u32) {
        let negotiating = matches!(
            &self.state,
            State::Setup { status, .. } if status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER
        );
        if negotiating {
            let shift = match self.driver_features_page {
                0 => 0,
                1 => 32,
                _ => return,
            };
            self.driver_features &= !(u64::from(u32::MAX) << shift);
            self.driver_features |= u64::from(value) << shift;
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let State::Setup { status, queues } = &mut self.state else { return };
        if *status & status::FEATURES_OK == 0 {
            return;
        }
        let Some(queue) = queues.get_mut(self.selected_queue) else { return };
        match offset {
            // Too large a size is ignored by the queue, which then keeps its maximum.
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// The guest may only go forward one step at a time, or reset.
    fn write_status(&mut self, value: u32) {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
        if value == 0 {
            self.reset();
            return;
        }
        let offered = self.offered_features();
        let accepted = self.driver_features;
        let State::Setup { status, .. } = &mut self.state else { return };
        match (*status, value & !*status) {
            (_, new) if new & FAILED != 0 => self.state = State::Failed,
            (0, ACKNOWLEDGE) => *status |= ACKNOWLEDGE,
            (ACKNOWLEDGE, DRIVER) => *status |= DRIVER,
            (3, FEATURES_OK) if accepted & !offered == 0 && accepted & F_VERSION_1 != 0 => {
                *status |= FEATURES_OK;
            }
            (11, DRIVER_OK) => self.activate(),
            (from, _) => {
                tracing::warn!(
                    device = self.device.name(),
                    from,
                    to = value,
                    "guest skips a step of setting up a device"
                );
            }
        }
    }

    fn reset(&mut self) {
        match self.state {
            State::Setup { .. } => {
                self.state = State::Setup { status: 0, queues: new_queues(self.device.as_ref()) };
                self.driver_features = 0;
                self.features_page = 0;
                self.driver_features_page = 0;
                self.selected_queue = 0;
            }
            State::Active => {
                self.device.stop();
                self.state = State::Failed;
            }
            State::Failed => {}
        }
    }

    fn activate(&mut self) {
        let State::Setup { queues, .. } = std::mem::replace(&mut self.state, State::Failed) else { return };
        match self.start(queues) {
            Ok(()) => self.state = State::Active,
            Err(error) => {
                tracing::warn!(device = self.device.name(), %error, "guest cannot activate a device");
            }
        }
    }

    fn start(&mut self, queues: Vec<Queue>) -> Result<(), super::ActivateError> {
        let mut active = Vec::with_capacity(queues.len());
        for (mut queue, notified) in queues.into_iter().zip(&self.notified) {
            if !queue.ready() {
                // The device knows whether it can do without.
                active.push(None);
                continue;
            }
            queue.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
            // Checked here once: aligned, and wholly inside memory.
            if !queue.is_valid(&self.memory) {
                return Err(super::ActivateError::Queues);
            }
            let notified = notified.try_clone().map_err(super::ActivateError::Worker)?;
            active.push(Some(ActiveQueue::new(queue, notified, self.interrupt.clone())));
        }
        self.device.activate(Active {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues: active,
        })
    }
}

fn page_of(features: u64, page: u32) -> u32 {
    match page {
        0 => u32::try_from(features & u64::from(u32::MAX)).unwrap_or(0),
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn new_queues(device: &dyn Device) -> Vec<Queue> {
    // A queue refuses only sizes that are no power of two, which no device of ours has; see the test.
    device.queue_sizes().iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
