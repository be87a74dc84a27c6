//! The layout of guest-physical addresses, and of interrupts.

use vm_memory::GuestAddress;

use crate::memory::to_usize;

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
/// End of the low memory that the kernel may use. What follows is where a PC has its BIOS.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The MP table. It lies where a PC has its BIOS, because the kernel looks for it there and does not use that memory.
pub const MP_TABLE: u32 = 0xf_0000;
pub const MP_TABLE_MAX: usize = 0x1_0000;
/// The kernel, and the memory that it may use besides the low memory, start here.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// Start of the gap below 4 GiB in which there are devices instead of memory. Memory continues at [`AFTER_GAP`].
pub const GAP: u64 = 0xc000_0000;
pub const AFTER_GAP: u64 = 0x1_0000_0000;

/// The pages of virtio-mmio devices, one after the other.
pub const DEVICES: u64 = 0xd000_0000;
pub const DEVICE_SIZE: u64 = 0x1000;
/// Interrupt of a PC's first serial line.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of the first virtio-mmio device. The others' follow. Those below are the PC's legacy devices'.
pub const FIRST_IRQ: u32 = 5;
/// Last input of the IOAPIC.
pub const LAST_IRQ: u8 = 23;
/// Most virtio-mmio devices: each has an interrupt of its own.
pub const DEVICES_MAX: usize = LAST_IRQ as usize - FIRST_IRQ as usize + 1;

/// Pages that KVM needs for real mode on processors without unrestricted guest mode.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
pub const TSS: usize = 0xfffb_d000;

/// The ranges of guest-physical memory of a machine of `bytes`.
pub fn memory_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    if bytes <= GAP {
        return vec![(GuestAddress(0), to_usize(bytes))];
    }
    vec![(GuestAddress(0), to_usize(GAP)), (GuestAddress(AFTER_GAP), to_usize(bytes - GAP))]
}

/// Bytes of a memory block of Linux (`Documentation/admin-guide/mm/memory-hotplug.rst`), in which it adds memory while
/// it runs. It can use only whole blocks of a region.
const MEMORY_BLOCK: u64 = 128 << 20;
/// The largest memory block of Linux, which it may use if it was started with more than [`LARGE_MEMORY`].
const LARGE_MEMORY_BLOCK: u64 = 2 << 30;
const LARGE_MEMORY: u64 = 60 << 30;

/// The region in which up to `hotplug_bytes` can be plugged into a machine that is started with `boot_bytes`, as its
/// start and its size in bytes: whole memory blocks behind all other memory.
pub fn hotplug_range(boot_bytes: u64, hotplug_bytes: u64) -> (GuestAddress, usize) {
    let block = if boot_bytes > LARGE_MEMORY { LARGE_MEMORY_BLOCK } else { MEMORY_BLOCK };
    // Memory that ends below the gap leaves nothing behind it.
    let end = AFTER_GAP + boot_bytes.saturating_sub(GAP);
    (GuestAddress(end.next_multiple_of(block)), to_usize(hotplug_bytes.next_multiple_of(block)))
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
        assert_eq!(hotplug_range(512 << 20, 1 << 20), (GuestAddress(4 << 30), 128 << 20));
        assert_eq!(
            hotplug_range((4 << 30) + (1 << 20), 1 << 30),
            (GuestAddress((5 << 30) + MEMORY_BLOCK), 1 << 30)
        );
        assert_eq!(hotplug_range(100 << 30, 1 << 30), (GuestAddress(102 << 30), 2 << 30));
    }
}
