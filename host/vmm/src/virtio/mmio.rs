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
/// Offset of the `InterruptACK` register, writes to which have no effect: see [`USED_BUFFER`].
pub const INTERRUPT_ACK: u64 = 0x64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"peri");
/// Offset of the configuration space, which goes on to the end of the page.
const CONFIG_SPACE: usize = 0x100;

/// What `InterruptStatus` always reads, acknowledged or not: that used buffers are what an interrupt is about. No device
/// of ours changes its configuration, so there is nothing else that it could be about; a driver looks at its queues and
/// finds out. So the guest leaves its processor neither to ask nor to acknowledge.
const USED_BUFFER: u32 = 1;

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
        };
        device.publish_what_stays();
        device.publish();
        Ok(device)
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

    /// Puts what never changes where the guest reads it. The rest reads as zero, `ConfigGeneration` (0xfc) too: no
    /// configuration of ours changes.
    fn publish_what_stays(&self) {
        self.page.set(0x00, MAGIC);
        self.page.set(0x04, VERSION);
        self.page.set(0x08, self.device.device_type());
        self.page.set(0x0c, VENDOR);
        self.page.set(0x60, USED_BUFFER);
        let mut config = [0; page::SIZE - CONFIG_SPACE];
        self.device.read_config(0, &mut config);
        self.page.fill(CONFIG_SPACE as u64, &config);
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
            QUEUE_NOTIFY if matches!(self.state, State::Active) => self.device.notify(value as usize),
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
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use vm_memory::GuestAddress;

    use super::*;
    use crate::virtio::ActivateError;

    #[derive(Default)]
    struct Probe {
        active: Arc<AtomicU32>,
    }

    impl Device for Probe {
        fn name(&self) -> &'static str {
            "probe"
        }
        fn device_type(&self) -> u32 {
            42
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16, 16]
        }
        fn features(&self) -> u64 {
            F_EVENT_IDX
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            crate::virtio::read_config_bytes(&[1, 2, 3], offset, data);
        }
        fn activate(&mut self, active: Active) -> Result<(), ActivateError> {
            assert_eq!(active.queues.len(), 2);
            assert_eq!(active.features, F_VERSION_1);
            // The first is one that it cannot do without.
            if active.queues[0].is_none() {
                return Err(ActivateError::Queues);
            }
            let ready = active.queues.iter().flatten().count();
            self.active.store(u32::try_from(ready).unwrap(), Ordering::SeqCst);
            Ok(())
        }
        fn stop(&mut self) {
            self.active.store(0, Ordering::SeqCst);
        }
        fn counters(&self) -> Vec<(&'static str, crate::virtio::Counter)> {
            Vec::new()
        }
    }

    fn device() -> (MmioDevice, Arc<AtomicU32>) {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let probe = Probe::default();
        let active = probe.active.clone();
        let page = Page::new(page::allocate(3).unwrap(), 2);
        (MmioDevice::new(Box::new(probe), memory, page, EventFd::new(0).unwrap()).unwrap(), active)
    }

    fn get(device: &MmioDevice, offset: u64) -> u32 {
        device.page.get(offset)
    }

    fn set(device: &mut MmioDevice, offset: u64, value: u32) {
        device.write(offset, &value.to_le_bytes());
    }

    fn set_up(device: &mut MmioDevice, table: u32) {
        set_up_queues(device, table, 0..2);
    }

    fn set_up_queues(device: &mut MmioDevice, table: u32, queues: std::ops::Range<u32>) {
        set(device, 0x70, 1);
        set(device, 0x70, 3);
        set(device, 0x24, 1);
        set(device, 0x20, 1);
        set(device, 0x70, 11);
        for queue in queues {
            set(device, 0x30, queue);
            set(device, 0x38, 16);
            set(device, 0x80, table + queue * 0x1000);
            set(device, 0x90, table + queue * 0x1000 + 0x400);
            set(device, 0xa0, table + queue * 0x1000 + 0x800);
            set(device, 0x44, 1);
        }
        set(device, 0x70, 15);
    }

    #[test]
    fn a_driver_that_takes_every_step_activates_the_device() {
        let (mut device, active) = device();
        assert_eq!((get(&device, 0), get(&device, 4), get(&device, 8)), (0x7472_6976, 2, 42));
        set_up(&mut device, 0x1000);
        assert_eq!(get(&device, 0x70), 15);
        assert_eq!(active.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn the_device_decides_which_queues_the_driver_may_leave_out() {
        let (mut device, active) = self::device();
        set_up_queues(&mut device, 0x1000, 0..1);
        assert_eq!((get(&device, 0x70), active.load(Ordering::SeqCst)), (15, 1));
        let (mut device, active) = self::device();
        set_up_queues(&mut device, 0x1000, 1..2);
        assert_eq!((get(&device, 0x70), active.load(Ordering::SeqCst)), (status::FAILED, 0));
    }

    #[test]
    fn skipping_a_step_changes_nothing() {
        let (mut device, active) = device();
        set(&mut device, 0x70, 15);
        assert_eq!(get(&device, 0x70), 0);
        set(&mut device, 0x70, 1);
        set(&mut device, 0x70, 11);
        assert_eq!(get(&device, 0x70), 1);
        assert_eq!(active.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let (mut device, _) = device();
        set(&mut device, 0x70, 1);
        set(&mut device, 0x70, 3);
        set(&mut device, 0x24, 1);
        set(&mut device, 0x20, 0xff);
        set(&mut device, 0x70, 11);
        assert_eq!(get(&device, 0x70), 3);
    }

    #[test]
    fn queues_outside_memory_fail_the_device() {
        let (mut device, active) = device();
        set_up(&mut device, 0xffff_0000);
        assert_eq!(get(&device, 0x70), status::FAILED);
        assert_eq!(active.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn an_active_device_ignores_changes_to_its_queues() {
        let (mut device, _) = device();
        set_up(&mut device, 0x1000);
        set(&mut device, 0x30, 0);
        set(&mut device, 0x80, 0x8000);
        assert!(matches!(device.state, State::Active));
        assert_eq!(get(&device, 0x34), 0);
    }

    #[test]
    fn a_reset_of_an_active_device_stops_it_for_good() {
        let (mut device, active) = device();
        set_up(&mut device, 0x1000);
        set(&mut device, 0x70, 0);
        assert_eq!(active.load(Ordering::SeqCst), 0);
        set_up(&mut device, 0x1000);
        assert_eq!(get(&device, 0x70), status::FAILED);
    }

    #[test]
    fn the_configuration_is_where_the_guest_reads_and_zero_beyond_its_end() {
        let (device, _) = device();
        assert_eq!((get(&device, 0x100), get(&device, 0x104)), (0x0003_0201, 0));
        assert_eq!(get(&device, page::SIZE as u64 - 4), 0);
    }

    #[test]
    fn an_interrupt_is_always_about_used_buffers_whatever_was_acknowledged() {
        let (mut device, _) = device();
        set_up(&mut device, 0x1000);
        assert_eq!(get(&device, 0x60), 1);
        set(&mut device, INTERRUPT_ACK, 1);
        assert_eq!(get(&device, 0x60), 1);
    }

    #[test]
    fn what_depends_on_a_selection_follows_it() {
        let (mut device, _) = device();
        assert_eq!(get(&device, 0x10), 1 << 29);
        set(&mut device, 0x14, 1);
        assert_eq!(get(&device, 0x10), 1);
        set(&mut device, 0x14, 2);
        assert_eq!(get(&device, 0x10), 0);
        assert_eq!(get(&device, 0x34), 16);
        set(&mut device, 0x30, 2);
        assert_eq!(get(&device, 0x34), 0);
    }
}
