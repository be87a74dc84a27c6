//! Places for devices: each is a page of registers and an interrupt line, filled with a device when the
//! machine starts or while it runs, and emptied again.
//!
//! An empty slot reads as a device of type 0, which stands for a place without a device: a driver passes over
//! it and reports no error (virtio 1.2, section 4.2.3.1.1). KVM knows nothing of it but its page, so it costs
//! the start next to nothing. When it has been filled, the guest is to probe it again: its agent binds the
//! slot's platform device, "virtio-mmio.<n>" for slot n.

use std::{io, sync::Arc};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Device,
    mmio::{INTERRUPT_ACK, MmioDevice, QUEUE_NOTIFY, USED_BUFFER},
    page::Page,
};
use crate::{
    arch::current::layout::{DEVICE_SIZE, DEVICES, FIRST_IRQ},
    memory::GuestMemory,
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

/// What connects devices with the guest's processors: KVM, but in tests.
pub trait Wires: Send + Sync {
    /// Lets a device interrupt the guest and hear its notifications.
    fn connect(&self, slot: u32, lines: &Lines<'_>) -> Result<(), SlotError>;
    /// Undoes it, as far as it was done.
    fn disconnect(&self, slot: u32, lines: &Lines<'_>);
}

/// The eventfds of one device.
pub struct Lines<'a> {
    /// Raises its interrupt.
    pub interrupt: &'a EventFd,
    /// Takes the acknowledgements that the device need not see.
    pub acknowledged: &'a EventFd,
    /// Whether it has to see those that are about its configuration.
    pub config_changes: bool,
    /// One for each queue, if they have any.
    pub notified: &'a [EventFd],
}

/// One place for a device.
pub struct Slot {
    index: u32,
    page: Page,
    memory: GuestMemory,
    wires: Arc<dyn Wires>,
    occupant: Option<Occupant>,
}

struct Occupant {
    device: MmioDevice,
    interrupt: EventFd,
    acknowledged: EventFd,
}

impl Occupant {
    fn lines(&self) -> Lines<'_> {
        Lines {
            interrupt: &self.interrupt,
            acknowledged: &self.acknowledged,
            config_changes: self.device.device().config_changes(),
            notified: self.device.notify_events(),
        }
    }
}

impl Slot {
    /// An empty slot; `page` is the one of this index.
    pub fn new(index: u32, page: Page, memory: GuestMemory, wires: Arc<dyn Wires>) -> Slot {
        MmioDevice::publish_placeholder(&page);
        Slot { index, page, memory, wires, occupant: None }
    }

    /// Puts a device in.
    pub fn insert(&mut self, device: Box<dyn Device>) -> Result<(), SlotError> {
        if self.occupant.is_some() {
            return Err(SlotError::Occupied(self.index));
        }
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(SlotError::Events);
        let interrupt = event()?;
        let irqfd = interrupt.try_clone().map_err(SlotError::Events)?;
        let device = MmioDevice::new(device, self.memory.clone(), self.page.clone(), irqfd)
            .map_err(SlotError::Events)?;
        let occupant = Occupant { device, interrupt, acknowledged: event()? };
        if let Err(error) = self.wires.connect(self.index, &occupant.lines()) {
            self.wires.disconnect(self.index, &occupant.lines());
            MmioDevice::publish_placeholder(&self.page);
            return Err(error);
        }
        self.occupant = Some(occupant);
        Ok(())
    }

    /// Takes the device out, if there is one. It has stopped when this returns, whatever the guest
    /// thinks of it: what it holds can be closed.
    pub fn remove(&mut self) -> Option<Box<dyn Device>> {
        let mut occupant = self.occupant.take()?;
        self.wires.disconnect(self.index, &occupant.lines());
        occupant.device.stop();
        MmioDevice::publish_placeholder(&self.page);
        Some(occupant.device.into_device())
    }

    /// Whether there is no device in it.
    pub fn is_empty(&self) -> bool {
        self.occupant.is_none()
    }

    /// The guest writes `data` at `offset` of the slot's page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(occupant) = &mut self.occupant {
            occupant.device.write(offset, data);
        }
    }

    /// Tells the guest that the device's configuration has changed.
    pub fn config_changed(&mut self) {
        if let Some(occupant) = &mut self.occupant {
            occupant.device.config_changed();
        }
    }
}

impl Wires for VmFd {
    fn connect(&self, slot: u32, lines: &Lines<'_>) -> Result<(), SlotError> {
        let refused = |what| move |source| SlotError::Kvm { what, source };
        self.register_irqfd(lines.interrupt, FIRST_IRQ + slot)
            .map_err(refused("take a device's interrupt"))?;
        for (queue, event) in (0u32..).zip(lines.notified) {
            self.register_ioevent(event, &register(slot, QUEUE_NOTIFY), queue)
                .map_err(refused("watch a device's notifications"))?;
        }
        // Nobody reads it: KVM swallows what is written there, and goes on with the guest.
        let address = register(slot, INTERRUPT_ACK);
        if lines.config_changes {
            self.register_ioevent(lines.acknowledged, &address, USED_BUFFER)
        } else {
            self.register_ioevent(lines.acknowledged, &address, NoDatamatch)
        }
        .map_err(refused("swallow a device's acknowledgements"))
    }

    fn disconnect(&self, slot: u32, lines: &Lines<'_>) {
        let address = register(slot, INTERRUPT_ACK);
        // What was not connected is refused, which is as good.
        let _ = if lines.config_changes {
            self.unregister_ioevent(lines.acknowledged, &address, USED_BUFFER)
        } else {
            self.unregister_ioevent(lines.acknowledged, &address, NoDatamatch)
        };
        for (queue, event) in (0u32..).zip(lines.notified) {
            let _ = self.unregister_ioevent(event, &register(slot, QUEUE_NOTIFY), queue);
        }
        let _ = self.unregister_irqfd(lines.interrupt, FIRST_IRQ + slot);
    }
}

fn register(slot: u32, offset: u64) -> IoEventAddress {
    IoEventAddress::Mmio(DEVICES + u64::from(slot) * DEVICE_SIZE + offset)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::virtio::{page, rng::Rng, testing};

    /// What was connected and not disconnected.
    #[derive(Default)]
    struct Board {
        connected: Mutex<Vec<u32>>,
        refuses: bool,
    }

    impl Wires for Board {
        fn connect(&self, slot: u32, _: &Lines<'_>) -> Result<(), SlotError> {
            if self.refuses {
                return Err(SlotError::Events(io::ErrorKind::Other.into()));
            }
            self.connected.lock().unwrap().push(slot);
            Ok(())
        }

        fn disconnect(&self, slot: u32, _: &Lines<'_>) {
            self.connected.lock().unwrap().retain(|connected| *connected != slot);
        }
    }

    fn slot(board: &Arc<Board>) -> (Slot, Page) {
        let page = Page::new(page::allocate(4).unwrap(), 3);
        (Slot::new(3, page.clone(), testing::guest_memory(), board.clone()), page)
    }

    #[test]
    fn an_empty_slot_reads_as_a_placeholder_and_ignores_what_is_written() {
        let (mut slot, page) = slot(&Arc::default());
        assert_eq!((page.get(0), page.get(4), page.get(8)), (0x7472_6976, 2, 0));
        slot.write(0x70, &1u32.to_le_bytes());
        slot.write(0x70, b"x");
        assert_eq!(page.get(0x70), 0);
    }

    #[test]
    fn a_slot_can_be_filled_emptied_and_filled_again_without_the_guests_help() {
        let board = Arc::new(Board::default());
        let (mut slot, page) = slot(&board);
        for _ in 0..2 {
            slot.insert(Box::new(Rng::default())).unwrap();
            assert_eq!((page.get(8), page.get(0x70)), (4, 0));
            assert_eq!(*board.connected.lock().unwrap(), [3]);
            // The guest has begun to set the device up.
            slot.write(0x70, &1u32.to_le_bytes());
            assert_eq!(page.get(0x70), 1);
            assert_eq!(slot.remove().unwrap().name(), "rng");
            assert_eq!((page.get(8), page.get(0x70), page.get(0x10)), (0, 0, 0));
            assert!(board.connected.lock().unwrap().is_empty());
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
        let (mut slot, page) = slot(&Arc::new(Board { refuses: true, ..Board::default() }));
        assert!(slot.insert(Box::new(Rng::default())).is_err());
        assert!(slot.is_empty());
        assert_eq!(page.get(8), 0);
    }
}
