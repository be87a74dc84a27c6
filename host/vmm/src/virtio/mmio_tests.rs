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

#[test]
fn a_change_of_configuration_is_told_until_it_has_been_acknowledged() {
    let (mut device, _) = device();
    set_up(&mut device, 0x1000);
    let generation = get(&device, 0xfc);
    device.config_changed();
    assert_eq!((get(&device, 0x60), device.interrupt.0.read().unwrap()), (3, 1));
    assert_ne!(get(&device, 0xfc), generation);
    set(&mut device, INTERRUPT_ACK, 1);
    assert_eq!(get(&device, 0x60), 3);
    set(&mut device, INTERRUPT_ACK, 3);
    assert_eq!(get(&device, 0x60), 1);
}

#[test]
fn a_device_that_is_not_in_use_interrupts_nobody() {
    let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let page = Page::new(page::allocate(1).unwrap(), 0);
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let mut device =
        MmioDevice::new(Box::new(Probe::default()), memory, page, event.try_clone().unwrap()).unwrap();
    device.config_changed();
    assert!(event.read().is_err());
}
