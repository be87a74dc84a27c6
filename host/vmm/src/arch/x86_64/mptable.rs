//! The MP table (Intel `MultiProcessor` Specification 1.4, chapter 4), in which a kernel finds its processors and
//! interrupts without ACPI.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{LAST_IRQ, MP_TABLE, MP_TABLE_MAX};
use crate::memory::GuestMemory;

const SPECIFICATION_1_4: u8 = 4;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const ISA_BUS: u8 = 0;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;

/// Writes the table for `vcpus` processors into guest memory.
pub fn write(memory: &GuestMemory, vcpus: u8) -> Result<(), GuestMemoryError> {
    let table = configuration_table(vcpus);
    let pointer_size: u32 = 16;
    let mut bytes = floating_pointer(MP_TABLE + pointer_size).to_vec();
    bytes.extend(table);
    assert!(bytes.len() <= MP_TABLE_MAX, "the MP table has {} bytes", bytes.len());
    memory.write_slice(&bytes, GuestAddress(MP_TABLE.into()))
}

/// The structure that the kernel searches for, which contains the address of the configuration table.
fn floating_pointer(table: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..4].copy_from_slice(b"_MP_");
    bytes[4..8].copy_from_slice(&table.to_le_bytes());
    bytes[8] = 1; // length in 16-byte units
    bytes[9] = SPECIFICATION_1_4;
    bytes[10] = checksum(&bytes);
    bytes
}

fn configuration_table(vcpus: u8) -> Vec<u8> {
    let ioapic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOT } else { 0 };
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
        // The processor's signature and features: family 6 with an APIC and an FPU. Linux reads CPUID instead.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = [0u8; 8];
    ioapic[..4].copy_from_slice(&[ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1]);
    ioapic[4..].copy_from_slice(&IOAPIC_ADDRESS.to_le_bytes());
    add(&ioapic);
    for irq in 0..=LAST_IRQ {
        // Polarity and trigger mode are those of the ISA bus, edge-triggered and active high, as an irqfd's.
        add(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = vec![0u8; 44];
    table[0..4].copy_from_slice(b"PCMP");
    let Ok(length) = u16::try_from(table.len() + entries.len()) else {
        unreachable!("the entries of 255 processors have 5 KiB")
    };
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = SPECIFICATION_1_4;
    table[8..16].copy_from_slice(b"PERICARP");
    table[16..28].copy_from_slice(b"MACHINE     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LAPIC_ADDRESS.to_le_bytes());
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

/// The value that makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_add_up_to_zero_and_the_largest_machine_fits() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&memory, u8::MAX - 1).unwrap();
        let mut pointer = [0u8; 16];
        memory.read_slice(&mut pointer, GuestAddress(MP_TABLE.into())).unwrap();
        assert_eq!(checksum(&pointer), 0);
        let table = configuration_table(u8::MAX - 1);
        assert_eq!(checksum(&table), 0);
        assert!(table.len() + 16 <= MP_TABLE_MAX);
        assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
    }

    #[test]
    fn every_vcpu_has_an_entry_and_only_the_first_boots() {
        let table = configuration_table(3);
        let flags: Vec<u8> = (0..3).map(|cpu| table[44 + cpu * 20 + 3]).collect();
        assert_eq!(flags, [3, 1, 1]);
    }
}
