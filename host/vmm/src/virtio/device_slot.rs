//! Slots for devices: each is a page of registers and an interrupt line. A slot is filled with a device when the
//! machine starts or while it runs, and can be emptied again.
//!
//! An empty slot reads as a device of type 0, a placeholder: a driver ignores it and reports no error (virtio 1.2,
//! section 4.2.3.1.1). KVM knows nothing of the slot except its page, so it costs the start next to nothing. Once the
//! slot has been filled, the guest has to probe it again: its agent binds the slot's platform device,
//! "virtio-mmio.<n>" for slot n.

use std::{io, sync::Arc};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Device,
    mmio::{INTERRUPT_USED_BUFFER, MmioDevice, register},
    register_page::RegisterPage,
};
use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES, FIRST_IRQ},
    memory::GuestMemory,
    threads::ThreadSpawner,
};

/// A device cannot be put into its slot.
#[derive(Debug, Error)]
pub enum SlotError {
    #[error("there is a device in slot {0}")]
    Occupied(u32),
    #[error("cannot make eventfds for a device")]
    Events(#[source] io::Error),
    #[error("KVM refuses to {what}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Connects a device's eventfds with the guest: KVM, except in tests.
pub trait DeviceEventRegistrar: Send + Sync {
    /// Lets the device in `slot` interrupt the guest and receive its notifications.
    fn register(&self, slot: u32, events: &DeviceEvents<'_>) -> Result<(), SlotError>;
    /// Reverses [`register`](Self::register), also when that has failed halfway.
    fn unregister(&self, slot: u32, events: &DeviceEvents<'_>);
}

/// The eventfds of one device.
pub struct DeviceEvents<'a> {
    /// Raises the device's interrupt.
    pub interrupt: &'a EventFd,
    /// Takes the acknowledgements of interrupts that the device need not see.
    pub acknowledged: &'a EventFd,
    /// Whether the device has to see acknowledgements of a change of its configuration.
    pub sees_config_acknowledgements: bool,
    /// The notifications of each queue; empty if the device handles them on the vCPU's thread.
    pub notified: &'a [EventFd],
}

/// A slot for a device.
pub struct DeviceSlot {
    index: u32,
    page: RegisterPage,
    memory: GuestMemory,
    threads: ThreadSpawner,
    registrar: Arc<dyn DeviceEventRegistrar>,
    occupant: Option<Occupant>,
}

struct Occupant {
    device: MmioDevice,
    interrupt: EventFd,
    acknowledged: EventFd,
}

impl Occupant {
    fn events(&self) -> DeviceEvents<'_> {
        DeviceEvents {
            interrupt: &self.interrupt,
            acknowledged: &self.acknowledged,
            sees_config_acknowledgements: self.device.device().has_changing_config(),
            notified: self.device.notify_events(),
        }
    }
}

impl DeviceSlot {
    /// Makes an empty slot. `page` is the page of this index.
    pub fn new(
        index: u32,
        page: RegisterPage,
        memory: GuestMemory,
        threads: ThreadSpawner,
        registrar: Arc<dyn DeviceEventRegistrar>,
    ) -> Self {
        MmioDevice::publish_placeholder(&page);
        Self { index, page, memory, threads, registrar, occupant: None }
    }

    /// Puts a device into the slot, which is empty still after an error.
    pub fn insert(&mut self, device: Box<dyn Device>) -> Result<(), SlotError> {
        if self.occupant.is_some() {
            return Err(SlotError::Occupied(self.index));
        }
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(SlotError::Events);
        let interrupt = event()?;
        let irqfd = interrupt.try_clone().map_err(SlotError::Events)?;
        let acknowledged = event()?;
        let (memory, threads, page) = (self.memory.clone(), self.threads.clone(), self.page.clone());
        let device = MmioDevice::new(device, memory, threads, page, irqfd).map_err(SlotError::Events)?;
        let occupant = Occupant { device, interrupt, acknowledged };
        if let Err(error) = self.registrar.register(self.index, &occupant.events()) {
            self.registrar.unregister(self.index, &occupant.events());
            MmioDevice::publish_placeholder(&self.page);
            return Err(error);
        }
        self.occupant = Some(occupant);
        Ok(())
    }

    /// Takes the device out, if there is one. It has stopped when this returns, whatever the guest is doing with it, so
    /// that its files can be closed.
    pub fn remove(&mut self) -> Option<Box<dyn Device>> {
        let mut occupant = self.occupant.take()?;
        self.registrar.unregister(self.index, &occupant.events());
        occupant.device.stop();
        MmioDevice::publish_placeholder(&self.page);
        Some(occupant.device.into_device())
    }

    /// Whether there is no device in the slot.
    pub fn is_empty(&self) -> bool {
        self.occupant.is_none()
    }

    /// Handles the guest's write of `data` at `offset` of the slot's page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(occupant) = &mut self.occupant {
            occupant.device.write(offset, data);
        }
    }

    /// Shows the guest that the device's configuration has changed.
    pub fn announce_config_change(&mut self) {
        if let Some(occupant) = &mut self.occupant {
            occupant.device.announce_config_change();
        }
    }
}

impl DeviceEventRegistrar for VmFd {
    fn register(&self, slot: u32, events: &DeviceEvents<'_>) -> Result<(), SlotError> {
        let refused = |what| move |source| SlotError::Kvm { what, source };
        self.register_irqfd(events.interrupt, FIRST_IRQ + slot)
            .map_err(refused("take a device's interrupt"))?;
        for (queue, event) in (0u32..).zip(events.notified) {
            self.register_ioevent(event, &register_address(slot, register::QUEUE_NOTIFY), queue)
                .map_err(refused("watch a device's notifications"))?;
        }
        // Nobody reads this eventfd: KVM swallows the writes that go to it, and the guest runs on.
        let address = register_address(slot, register::INTERRUPT_ACK);
        if events.sees_config_acknowledgements {
            self.register_ioevent(events.acknowledged, &address, INTERRUPT_USED_BUFFER)
        } else {
            self.register_ioevent(events.acknowledged, &address, NoDatamatch)
        }
        .map_err(refused("swallow a device's acknowledgements"))
    }

    fn unregister(&self, slot: u32, events: &DeviceEvents<'_>) {
        let address = register_address(slot, register::INTERRUPT_ACK);
        // KVM refuses to unregister an eventfd that is not registered, which does no harm.
        let _ = if events.sees_config_acknowledgements {
            self.unregister_ioevent(events.acknowledged, &address, INTERRUPT_USED_BUFFER)
        } else {
            self.unregister_ioevent(events.acknowledged, &address, NoDatamatch)
        };
        for (queue, event) in (0u32..).zip(events.notified) {
            let _ = self.unregister_ioevent(event, &register_address(slot, register::QUEUE_NOTIFY), queue);
        }
        let _ = self.unregister_irqfd(events.interrupt, FIRST_IRQ + slot);
    }
}

/// The guest-physical address of a register of the device in `slot`.
fn register_address(slot: u32, offset: u64) -> IoEventAddress {
    IoEventAddress::Mmio(DEVICES + u64::from(slot) * DEVICE_SIZE + offset)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::virtio::{register_page, rng::Rng, testing};

    /// The slots whose devices are registered.
    #[derive(Default)]
    struct FakeRegistrar {
        registered: Mutex<Vec<u32>>,
        refuses: bool,
    }

    impl DeviceEventRegistrar for FakeRegistrar {
        fn register(&self, slot: u32, _: &DeviceEvents<'_>) -> Result<(), SlotError> {
            if self.refuses {
                return Err(SlotError::Events(io::ErrorKind::Other.into()));
            }
            self.registered.lock().unwrap().push(slot);
            Ok(())
        }

        fn unregister(&self, slot: u32, _: &DeviceEvents<'_>) {
            self.registered.lock().unwrap().retain(|registered| *registered != slot);
        }
    }

    fn slot(registrar: &Arc<FakeRegistrar>) -> (DeviceSlot, RegisterPage) {
        let page = RegisterPage::new(register_page::allocate(4).unwrap(), 3);
        (
            DeviceSlot::new(3, page.clone(), testing::guest_memory(), testing::threads(), registrar.clone()),
            page,
        )
    }

    #[test]
    fn an_empty_slot_reads_as_a_placeholder_and_ignores_what_is_written() {
        let (mut slot, page) = slot(&Arc::default());
        assert_eq!(
            (page.get(register::MAGIC_VALUE), page.get(register::VERSION), page.get(register::DEVICE_ID)),
            (0x7472_6976, 2, 0)
        );
        slot.write(register::STATUS, &1u32.to_le_bytes());
        slot.write(register::STATUS, b"x");
        assert_eq!(page.get(register::STATUS), 0);
    }

    #[test]
    fn a_slot_can_be_filled_emptied_and_filled_again_without_the_guests_help() {
        let registrar = Arc::new(FakeRegistrar::default());
        let (mut slot, page) = slot(&registrar);
        for _ in 0..2 {
            slot.insert(Box::new(Rng::default())).unwrap();
            assert_eq!((page.get(register::DEVICE_ID), page.get(register::STATUS)), (4, 0));
            assert_eq!(*registrar.registered.lock().unwrap(), [3]);
            // The guest has begun to set the device up.
            slot.write(register::STATUS, &1u32.to_le_bytes());
            assert_eq!(page.get(register::STATUS), 1);
            assert_eq!(slot.remove().unwrap().name(), "rng");
            assert_eq!(
                (
                    page.get(register::DEVICE_ID),
                    page.get(register::STATUS),
                    page.get(register::DEVICE_FEATURES)
                ),
                (0, 0, 0)
            );
            assert!(registrar.registered.lock().unwrap().is_empty());
        }
        assert!(slot.remove().is_none());
    }

    #[test]
    fn a_slot_takes_one_device_at_a_time() {
        let (mut slot, _) = slot(&Arc::default());
        slot.insert(Box::new(Rng::default())).unwrap();
        let error = slot.insert(Box::new(Rng::default())).unwrap_err();
        assert!(matches!(error, SlotError::Occupied(3)), "{error}");
    }

    #[test]
    fn a_slot_whose_device_cannot_be_connected_is_empty() {
        let (mut slot, page) = slot(&Arc::new(FakeRegistrar { refuses: true, ..FakeRegistrar::default() }));
        assert!(slot.insert(Box::new(Rng::default())).is_err());
        assert!(slot.is_empty());
        assert_eq!(page.get(register::DEVICE_ID), 0);
    }
}
