//! Guest-physical addresses.

use vm_memory::GuestAddress;

/// Start of the Global Descriptor Table that the vCPU starts with.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// The (empty) Interrupt Descriptor Table that the vCPU starts with.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// `struct boot_params`, the "zero page".
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables that map the first GiB onto itself: one page each of three levels.
pub const PML4: GuestAddress = GuestAddress(0x9000);
pub const PDPT: GuestAddress = GuestAddress(0xa000);
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
/// The kernel command line, at most [`CMDLINE_MAX`] bytes with its terminator.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
pub const CMDLINE_MAX: usize = 2048;
/// End of the low memory that the kernel may use; what follows is where a PC has its BIOS.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The MP table lies where a PC has its BIOS: the kernel looks there, and may not use it.
pub const MP_TABLE: u32 = 0xf_0000;
pub const MP_TABLE_MAX: usize = 0x1_0000;
/// Kernel and all further memory start here.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// Memory ends here below 4 GiB; the rest of it continues at [`AFTER_GAP`].
pub const GAP: u64 = 0xc000_0000;
pub const AFTER_GAP: u64 = 0x1_0000_0000;

/// virtio-mmio devices: one page each from here.
pub const DEVICES: u64 = 0xd000_0000;
pub const DEVICE_SIZE: u64 = 0x1000;
/// Interrupt of a PC's first serial line.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of the first device; the others follow. Below are the PC's legacy devices.
pub const FIRST_IRQ: u32 = 5;
/// Last input of the IOAPIC.
pub const LAST_IRQ: u8 = 23;
/// One interrupt for each device.
pub const DEVICES_MAX: usize = LAST_IRQ as usize - FIRST_IRQ as usize + 1;

/// Pages that KVM needs for real mode on processors without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const TSS: usize = 0xfffb_d000;

/// The ranges of guest-physical memory of a machine of `bytes`.
pub fn memory_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    // A size that is no usize cannot be mapped either; the mapping's own error says so.
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    if bytes <= GAP {
        return vec![(GuestAddress(0), size(bytes))];
    }
    vec![(GuestAddress(0), size(GAP)), (GuestAddress(AFTER_GAP), size(bytes - GAP))]
}

/// Linux deals with memory that comes later in blocks of this size, or of up to [`LARGE_BLOCK`] where it was
/// started with more than [`LARGE_MEMORY`]; it can use only whole ones of a region.
const BLOCK: u64 = 128 << 20;
const LARGE_BLOCK: u64 = 2 << 30;
const LARGE_MEMORY: u64 = 60 << 30;

/// Where up to `extra` bytes can be plugged into a machine of `bytes`.
pub fn extra_range(bytes: u64, extra: u64) -> (GuestAddress, usize) {
    let block = if bytes > LARGE_MEMORY { LARGE_BLOCK } else { BLOCK };
    let end = AFTER_GAP + bytes.saturating_sub(GAP);
    let size = usize::try_from(extra.next_multiple_of(block)).unwrap_or(usize::MAX);
    (GuestAddress(end.next_multiple_of(block)), size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_three_gib_continues_above_the_device_gap() {
        assert_eq!(memory_ranges(512 << 20), [(GuestAddress(0), 512 << 20)]);
        assert_eq!(memory_ranges(4 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]);
    }

    #[test]
    fn memory_that_comes_later_lies_behind_all_other_in_whole_blocks() {
        assert_eq!(extra_range(512 << 20, 1 << 20), (GuestAddress(4 << 30), 128 << 20));
        assert_eq!(extra_range((4 << 30) + (1 << 20), 1 << 30), (GuestAddress((5 << 30) + BLOCK), 1 << 30));
        assert_eq!(extra_range(100 << 30, 1 << 30), (GuestAddress(102 << 30), 2 << 30));
    }
}
