use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestAddress;

use super::*;
use crate::virtio::{ActivateError, testing::threads};

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
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert_eq!(activation.queues.len(), 2);
        assert_eq!(activation.features, F_VERSION_1);
        // The device cannot do without its first queue.
        if activation.queues[0].is_none() {
            return Err(ActivateError::Queues);
        }
        let ready = activation.queues.iter().flatten().count();
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
    let page = RegisterPage::new(register_page::allocate(3).unwrap(), 2);
    (MmioDevice::new(Box::new(probe), memory, threads(), page, EventFd::new(0).unwrap()).unwrap(), active)
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
    set(device, register::STATUS, 1);
    set(device, register::STATUS, 3);
    set(device, register::DRIVER_FEATURES_SEL, 1);
    set(device, register::DRIVER_FEATURES, 1);
    set(device, register::STATUS, 11);
    for queue in queues {
        set(device, register::QUEUE_SEL, queue);
        set(device, register::QUEUE_NUM, 16);
        set(device, register::QUEUE_DESC_LOW, table + queue * 0x1000);
        set(device, register::QUEUE_DRIVER_LOW, table + queue * 0x1000 + 0x400);
        set(device, register::QUEUE_DEVICE_LOW, table + queue * 0x1000 + 0x800);
        set(device, register::QUEUE_READY, 1);
    }
    set(device, register::STATUS, 15);
}

#[test]
fn a_driver_that_takes_every_step_activates_the_device() {
    let (mut device, active) = device();
    assert_eq!(
        (
            get(&device, register::MAGIC_VALUE),
            get(&device, register::VERSION),
            get(&device, register::DEVICE_ID)
        ),
        (0x7472_6976, 2, 42)
    );
    set_up(&mut device, 0x1000);
    assert_eq!(get(&device, register::STATUS), 15);
    assert_eq!(active.load(Ordering::SeqCst), 2);
}

#[test]
fn the_device_decides_which_queues_the_driver_may_leave_out() {
    let (mut device, active) = self::device();
    set_up_queues(&mut device, 0x1000, 0..1);
    assert_eq!((get(&device, register::STATUS), active.load(Ordering::SeqCst)), (15, 1));
    let (mut device, active) = self::device();
    set_up_queues(&mut device, 0x1000, 1..2);
    assert_eq!((get(&device, register::STATUS), active.load(Ordering::SeqCst)), (status::bit::FAILED, 0));
}

#[test]
fn skipping_a_step_changes_nothing() {
    let (mut device, active) = device();
    set(&mut device, register::STATUS, 15);
    assert_eq!(get(&device, register::STATUS), 0);
    set(&mut device, register::STATUS, 1);
    set(&mut device, register::STATUS, 11);
    assert_eq!(get(&device, register::STATUS), 1);
    assert_eq!(active.load(Ordering::SeqCst), 0);
}

/// Sets a device up as far as `status`, with the steps that are valid.
fn device_in(status: DeviceStatus) -> (MmioDevice, Arc<AtomicU32>) {
    let (mut device, active) = device();
    let steps = [DeviceStatus::Acknowledged, DeviceStatus::DriverFound, DeviceStatus::FeaturesOk];
    for step in steps {
        if step.bits() <= status.bits() {
            set(&mut device, register::STATUS, step.bits());
        }
        if step == DeviceStatus::DriverFound {
            set(&mut device, register::DRIVER_FEATURES_SEL, 1);
            set(&mut device, register::DRIVER_FEATURES, 1);
        }
    }
    assert_eq!(device.status(), status);
    (device, active)
}

#[test]
fn no_write_of_an_invalid_status_changes_anything() {
    use DeviceStatus::{Acknowledged, DriverFound, FeaturesOk, Reset};
    for from in [Reset, Acknowledged, DriverFound, FeaturesOk] {
        let (mut device, active) = device_in(from);
        for value in (0..=u32::from(u8::MAX)).filter(|value| from.after_write(*value).is_none()) {
            set(&mut device, register::STATUS, value);
            assert_eq!(get(&device, register::STATUS), from.bits(), "{from:?}, {value:#x}");
            assert_eq!(active.load(Ordering::SeqCst), 0);
        }
    }
    let (mut device, active) = device();
    set_up(&mut device, 0x1000);
    for value in 1..=u32::from(u8::MAX) {
        set(&mut device, register::STATUS, value);
        assert_eq!((get(&device, register::STATUS), active.load(Ordering::SeqCst)), (15, 2), "{value:#x}");
    }
    set(&mut device, register::STATUS, 0);
    for value in 0..=u32::from(u8::MAX) {
        set(&mut device, register::STATUS, value);
        assert_eq!((get(&device, register::STATUS), active.load(Ordering::SeqCst)), (128, 0), "{value:#x}");
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut device, _) = device();
    set(&mut device, register::STATUS, 1);
    set(&mut device, register::STATUS, 3);
    set(&mut device, register::DRIVER_FEATURES_SEL, 1);
    set(&mut device, register::DRIVER_FEATURES, 0xff);
    set(&mut device, register::STATUS, 11);
    assert_eq!(get(&device, register::STATUS), 3);
}

#[test]
fn queues_outside_memory_fail_the_device() {
    let (mut device, active) = device();
    set_up(&mut device, 0xffff_0000);
    assert_eq!(get(&device, register::STATUS), status::bit::FAILED);
    assert_eq!(active.load(Ordering::SeqCst), 0);
}

#[test]
fn an_active_device_ignores_changes_to_its_queues() {
    let (mut device, _) = device();
    set_up(&mut device, 0x1000);
    set(&mut device, register::QUEUE_SEL, 0);
    set(&mut device, register::QUEUE_DESC_LOW, 0x8000);
    assert!(matches!(device.state, State::Active));
    assert_eq!(get(&device, register::QUEUE_NUM_MAX), 0);
}

#[test]
fn a_reset_of_an_active_device_stops_it_for_good() {
    let (mut device, active) = device();
    set_up(&mut device, 0x1000);
    set(&mut device, register::STATUS, 0);
    assert_eq!(active.load(Ordering::SeqCst), 0);
    set_up(&mut device, 0x1000);
    assert_eq!(get(&device, register::STATUS), status::bit::FAILED);
}

#[test]
fn the_configuration_is_where_the_guest_reads_and_zero_beyond_its_end() {
    let (device, _) = device();
    assert_eq!((get(&device, register::CONFIG), get(&device, register::CONFIG + 4)), (0x0003_0201, 0));
    assert_eq!(get(&device, register_page::SIZE as u64 - 4), 0);
}

#[test]
fn an_interrupt_is_always_about_used_buffers_whatever_was_acknowledged() {
    let (mut device, _) = device();
    set_up(&mut device, 0x1000);
    assert_eq!(get(&device, register::INTERRUPT_STATUS), 1);
    set(&mut device, register::INTERRUPT_ACK, 1);
    assert_eq!(get(&device, register::INTERRUPT_STATUS), 1);
}

#[test]
fn what_depends_on_a_selection_follows_it() {
    let (mut device, _) = device();
    assert_eq!(get(&device, register::DEVICE_FEATURES), 1 << 29);
    set(&mut device, register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(get(&device, register::DEVICE_FEATURES), 1);
    set(&mut device, register::DEVICE_FEATURES_SEL, 2);
    assert_eq!(get(&device, register::DEVICE_FEATURES), 0);
    assert_eq!(get(&device, register::QUEUE_NUM_MAX), 16);
    set(&mut device, register::QUEUE_SEL, 2);
    assert_eq!(get(&device, register::QUEUE_NUM_MAX), 0);
}

#[test]
fn a_change_of_configuration_is_told_until_it_has_been_acknowledged() {
    let (mut device, _) = device();
    set_up(&mut device, 0x1000);
    let generation = get(&device, register::CONFIG_GENERATION);
    device.announce_config_change();
    assert_eq!((get(&device, register::INTERRUPT_STATUS), device.interrupt.0.read().unwrap()), (3, 1));
    assert_ne!(get(&device, register::CONFIG_GENERATION), generation);
    set(&mut device, register::INTERRUPT_ACK, 1);
    assert_eq!(get(&device, register::INTERRUPT_STATUS), 3);
    set(&mut device, register::INTERRUPT_ACK, 3);
    assert_eq!(get(&device, register::INTERRUPT_STATUS), 1);
}

#[test]
fn a_device_that_is_not_in_use_interrupts_nobody() {
    let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let page = RegisterPage::new(register_page::allocate(1).unwrap(), 0);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut device =
        MmioDevice::new(Box::new(Probe::default()), memory, threads(), page, event.try_clone().unwrap())
            .unwrap();
    device.announce_config_change();
    assert!(event.read().is_err());
}
