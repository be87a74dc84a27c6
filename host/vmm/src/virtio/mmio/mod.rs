//! The MMIO transport (virtio 1.2, section 4.2): the registers through which the guest finds a device, sets it up and
//! activates it.
//!
//! The guest reads registers from memory ([`RegisterPage`]), into which the transport writes what they are to read.
//! Only a write of a register comes here, on the thread of the vCPU that makes it. The guest is hostile: it may write
//! any value to any offset at any time. What it sets up counts until the device is activated, is checked then, and
//! cannot be changed afterwards.

pub mod register;
pub mod status;

use std::sync::Arc;

use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use self::status::DeviceStatus;
use super::{
    ActivateError, Activation, ActiveQueue, Device, F_EVENT_IDX, F_VERSION_1, Interrupt,
    register_page::{self, RegisterPage},
};
use crate::{
    memory::{GuestMemory, to_usize},
    threads::ThreadSpawner,
};

/// The value of [`register::MAGIC_VALUE`].
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The value of [`register::VERSION`].
const VERSION: u32 = 2;
/// The value of [`register::VENDOR_ID`].
const VENDOR: u32 = u32::from_le_bytes(*b"peri");

/// The bit of `InterruptStatus` for used buffers. It is always set, acknowledged or not: a driver that is interrupted
/// looks at its queues and finds out. So the guest leaves its processor neither to ask nor to acknowledge.
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// The bit of `InterruptStatus` for a change of the device's configuration. It is set until the guest has acknowledged
/// the change. Only such an acknowledgement reaches the device.
const INTERRUPT_CONFIG_CHANGED: u32 = 2;

/// How far the guest has set a device up, and who has its queues.
enum State {
    /// The driver is setting the device up: the queues are as it has configured them. `status` is neither `DriverOk`
    /// nor `Failed`.
    Setup { status: DeviceStatus, queues: Vec<Queue> },
    /// The device is in use, and its queues belong to it ([`DeviceStatus::DriverOk`]).
    Active,
    /// The device cannot be used any more ([`DeviceStatus::Failed`]).
    Failed,
}

/// One device in its page of guest-physical memory.
pub struct MmioDevice {
    device: Box<dyn Device>,
    memory: GuestMemory,
    threads: ThreadSpawner,
    /// Where the guest reads the registers.
    page: RegisterPage,
    state: State,
    interrupt: Interrupt,
    /// One for each queue. Whoever puts the device into a slot binds them to [`register::QUEUE_NOTIFY`].
    notified: Vec<EventFd>,
    device_features_sel: u32,
    driver_features_sel: u32,
    /// The features that the driver has accepted so far.
    driver_features: u64,
    selected_queue: usize,
    config_generation: u32,
}

impl MmioDevice {
    /// Puts a device behind the transport. `threads` starts its threads; `irqfd` raises its interrupt; in `page` the
    /// guest reads its registers. Fails if the process has no file descriptors left for the queues.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        threads: ThreadSpawner,
        page: RegisterPage,
        irqfd: EventFd,
    ) -> std::io::Result<Self> {
        let notified = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))
            .collect::<Result<_, _>>()?;
        let interrupt = Interrupt(Arc::new(irqfd));
        let state = State::Setup { status: DeviceStatus::Reset, queues: new_queues(device.as_ref()) };
        let device = Self {
            device,
            memory,
            threads,
            page,
            state,
            interrupt,
            notified,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            selected_queue: 0,
            config_generation: 0,
        };
        device.publish_variable_registers();
        device.publish_constant_registers();
        Ok(device)
    }

    /// Makes a page read as a placeholder: a device of type 0 (virtio 1.2, section 4.2.3.1.1).
    pub fn publish_placeholder(page: &RegisterPage) {
        /// Bytes behind [`register::VENDOR_ID`].
        const REST_SIZE: usize = register_page::SIZE - to_usize(register::DEVICE_FEATURES);
        page.set(register::DEVICE_ID, 0);
        page.set(register::MAGIC_VALUE, MAGIC);
        page.set(register::VERSION, VERSION);
        page.set(register::VENDOR_ID, VENDOR);
        page.fill(register::DEVICE_FEATURES, &[0; REST_SIZE]);
    }

    /// Stops the device for good, whatever the guest is doing with it. It must not be given to a guest again.
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

    /// The eventfds that KVM is to write when the guest notifies a queue, by queue; none if the device handles
    /// notifications on the vCPU's thread.
    pub fn notify_events(&self) -> &[EventFd] {
        if self.device.notified_inline() { &[] } else { &self.notified }
    }

    /// Writes the registers that do not depend on the guest into the page. The device's type is last: a guest that
    /// reads the page meanwhile finds a placeholder.
    fn publish_constant_registers(&self) {
        self.page.set(register::MAGIC_VALUE, MAGIC);
        self.page.set(register::VERSION, VERSION);
        self.page.set(register::VENDOR_ID, VENDOR);
        self.page.set(register::INTERRUPT_STATUS, INTERRUPT_USED_BUFFER);
        self.publish_config();
        self.page.set(register::DEVICE_ID, self.device.device_type());
    }

    fn publish_config(&self) {
        let mut config = [0; register_page::SIZE - to_usize(register::CONFIG)];
        self.device.read_config(0, &mut config);
        self.page.fill(register::CONFIG, &config);
    }

    /// Writes the device's configuration as it is now into the page. The generation changes before and after, so that a
    /// driver that reads meanwhile sees that it has to read again.
    fn refresh_config(&mut self) {
        self.increment_generation();
        self.publish_config();
        self.increment_generation();
    }

    fn increment_generation(&mut self) {
        self.config_generation = self.config_generation.wrapping_add(1);
        self.page.set(register::CONFIG_GENERATION, self.config_generation);
    }

    /// Shows the guest that the device's configuration has changed, and interrupts it if the device is in use.
    pub fn announce_config_change(&mut self) {
        self.refresh_config();
        self.page.set(register::INTERRUPT_STATUS, INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGED);
        // A driver that is not ready yet reads the configuration anyway.
        if matches!(self.state, State::Active) {
            self.interrupt.raise();
        }
    }

    fn notify(&mut self, queue: usize) {
        self.device.notify(queue);
        if self.device.has_changing_config() {
            self.refresh_config();
        }
    }

    /// Writes the registers that depend on what the guest has written into the page.
    fn publish_variable_registers(&self) {
        let queue = self.queue();
        let features = selected_half(self.offered_features(), self.device_features_sel);
        self.page.set(register::DEVICE_FEATURES, features);
        self.page.set(register::QUEUE_NUM_MAX, queue.map_or(0, |queue| u32::from(queue.max_size())));
        self.page.set(register::QUEUE_READY, queue.map_or(0, |queue| u32::from(queue.ready())));
        self.page.set(register::STATUS, self.status().bits());
    }

    /// Handles the guest's write of `data` at `offset` of the device's page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // A driver writes registers as a whole. The configuration spaces of all devices here are read-only.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else { return };
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::QUEUE_SEL => self.selected_queue = value as usize,
            register::QUEUE_NOTIFY if matches!(self.state, State::Active) => self.notify(value as usize),
            // KVM lets through only what devices with a changing configuration have to see.
            register::INTERRUPT_ACK if value & INTERRUPT_CONFIG_CHANGED != 0 => {
                self.page.set(register::INTERRUPT_STATUS, INTERRUPT_USED_BUFFER);
            }
            register::STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
        self.publish_variable_registers();
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | F_VERSION_1
    }

    fn status(&self) -> DeviceStatus {
        match &self.state {
            State::Setup { status, .. } => *status,
            State::Active => DeviceStatus::DriverOk,
            State::Failed => DeviceStatus::Failed,
        }
    }

    /// The selected queue, as long as the driver may set it up.
    fn queue(&self) -> Option<&Queue> {
        match &self.state {
            State::Setup { queues, .. } => queues.get(self.selected_queue),
            State::Active | State::Failed => None,
        }
    }

    /// Takes features that the driver accepts, which it may only say before the features are agreed on.
    fn write_driver_features(&mut self, value: u32) {
        if self.status() != DeviceStatus::DriverFound {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    /// Takes a register of the selected queue, which the driver may only write once the features are agreed on.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let State::Setup { status: DeviceStatus::FeaturesOk, queues } = &mut self.state else { return };
        let Some(queue) = queues.get_mut(self.selected_queue) else { return };
        match offset {
            // The queue ignores a size that is invalid, as 0 is, and keeps the one that it has.
            register::QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            register::QUEUE_READY => queue.set_ready(value == 1),
            register::QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            register::QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            register::QUEUE_DRIVER_LOW => queue.set_avail_ring_address(Some(value), None),
            register::QUEUE_DRIVER_HIGH => queue.set_avail_ring_address(None, Some(value)),
            register::QUEUE_DEVICE_LOW => queue.set_used_ring_address(Some(value), None),
            register::QUEUE_DEVICE_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        let from = self.status();
        match from.after_write(value) {
            Some(DeviceStatus::Reset) => self.restart_setup(),
            Some(DeviceStatus::FeaturesOk) if !self.are_features_acceptable() => {
                tracing::warn!(
                    device = self.device.name(),
                    "the guest accepts features that were not offered"
                );
            }
            Some(DeviceStatus::DriverOk) => self.activate(),
            Some(DeviceStatus::Failed) => self.fail(),
            Some(to) => {
                if let State::Setup { status, .. } = &mut self.state {
                    *status = to;
                }
            }
            // A device that is in use, or has failed, cannot be set up any further.
            None if matches!(from, DeviceStatus::DriverOk | DeviceStatus::Failed) => {}
            None => {
                tracing::warn!(
                    device = self.device.name(),
                    from = from.bits(),
                    to = value,
                    "the guest skips a step of setting up a device"
                );
            }
        }
    }

    fn are_features_acceptable(&self) -> bool {
        let accepted = self.driver_features;
        accepted & !self.offered_features() == 0 && accepted & F_VERSION_1 != 0
    }

    /// Forgets everything that the driver has set up.
    fn restart_setup(&mut self) {
        self.state = State::Setup { status: DeviceStatus::Reset, queues: new_queues(self.device.as_ref()) };
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.selected_queue = 0;
    }

    /// Ends the device's use for good. One that is in use is stopped.
    fn fail(&mut self) {
        if matches!(self.state, State::Active) {
            self.device.stop();
        }
        self.state = State::Failed;
    }

    /// Gives the queues to the device.
    fn activate(&mut self) {
        let State::Setup { queues, .. } = std::mem::replace(&mut self.state, State::Failed) else { return };
        match self.start(queues) {
            Ok(()) => self.state = State::Active,
            Err(error) => {
                tracing::warn!(device = self.device.name(), %error, "the guest cannot activate a device");
            }
        }
    }

    fn start(&mut self, queues: Vec<Queue>) -> Result<(), ActivateError> {
        let mut active = Vec::with_capacity(queues.len());
        for (mut queue, notified) in queues.into_iter().zip(&self.notified) {
            if !queue.ready() {
                // The device decides whether it can do without this queue.
                active.push(None);
                continue;
            }
            queue.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
            // Checks, once, that the rings are aligned and lie in memory as a whole.
            if !queue.is_valid(&self.memory) {
                return Err(ActivateError::Queues);
            }
            let notified = notified.try_clone().map_err(ActivateError::Worker)?;
            active.push(Some(ActiveQueue::new(queue, notified, self.interrupt.clone())));
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues: active,
            threads: self.threads.clone(),
        })
    }
}

/// The 32 features that a selector register selects: the lower ones (0), the upper ones (1), or none.
fn selected_half(features: u64, selector: u32) -> u32 {
    match selector {
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is what is selected")]
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// The device's queues as they are before the driver sets them up.
fn new_queues(device: &dyn Device) -> Vec<Queue> {
    let new_queue = |size: &u16| {
        Queue::new(*size).unwrap_or_else(|error| {
            unreachable!("the size of a queue of {} is no power of two: {error}", device.name())
        })
    };
    device.queue_sizes().iter().map(new_queue).collect()
}

#[cfg(test)]
mod tests;
