//! Guest memory: anonymous mappings without a reservation, which cost the host only what the guest touches.

use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap,
    mmap::MmapRegionBuilder,
};

/// Guest memory as every device sees it. virtiofsd insists on the bitmap type; there is never a bitmap in it.
pub type GuestMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// Size of a page of guest memory in bytes.
const PAGE: usize = 4096;

/// Guest memory cannot be mapped.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("cannot map {mib} MiB of guest memory; ask for less, or free memory on the host")]
    Map {
        mib: u64,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    #[error("guest memory of {mib} MiB does not fit the machine's address layout")]
    Layout { mib: u64 },
}

/// Maps guest memory for the given ranges of guest-physical addresses.
///
/// The mapping is `MAP_NORESERVE`: a machine costs the host only what its guest has touched.
pub fn allocate(ranges: &[(GuestAddress, usize)]) -> Result<GuestMemory, MemoryError> {
    let mib = ranges.iter().map(|(_, size)| *size as u64).sum::<u64>() >> 20;
    let regions = ranges.iter().map(|range| map(*range, mib)).collect::<Result<Vec<_>, _>>()?;
    GuestMemory::from_regions(regions).map_err(|_| MemoryError::Layout { mib })
}

/// Maps one more range of guest memory, and returns all of it.
pub fn extend(memory: &GuestMemory, range: (GuestAddress, usize)) -> Result<GuestMemory, MemoryError> {
    let mib = (total_bytes(memory) >> 20) + (range.1 as u64 >> 20);
    memory.insert_region(Arc::new(map(range, mib)?)).map_err(|_| MemoryError::Layout { mib })
}

/// Maps one range of guest memory. `mib` is how much is mapped in all, for messages.
fn map(
    (start, size): (GuestAddress, usize),
    mib: u64,
) -> Result<GuestRegionMmap<BitmapMmapRegion>, MemoryError> {
    let mapping = MmapRegionBuilder::<BitmapMmapRegion>::new_with_bitmap(size, BitmapMmapRegion::default())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .map_err(|source| MemoryError::Map { mib, source })?;
    let region = GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Layout { mib })?;
    // SAFETY: the range is exactly the mapping made above; advice does not change its contents.
    let advised = unsafe { madvise(region.as_ptr().cast(), region.size(), Advice::LinuxHugepage) };
    if let Err(error) = advised {
        // Kernels without transparent huge pages run the guest as well, a little slower.
        tracing::debug!(%error, "no huge pages for guest memory");
    }
    Ok(region)
}

/// Bytes of guest memory that have a host page behind them (`mincore(2)`).
pub fn resident_bytes(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| resident_pages(region) * PAGE as u64).sum()
}

fn resident_pages(region: &GuestRegionMmap<BitmapMmapRegion>) -> u64 {
    /// Pages per call, so that the buffer stays small for a guest of any size.
    const WINDOW: usize = 16 * 1024;
    let mut residency = vec![0u8; WINDOW];
    let size = to_usize(region.len());
    (0..size)
        .step_by(WINDOW * PAGE)
        .map(|offset| {
            let length = (size - offset).min(WINDOW * PAGE);
            // SAFETY: offset and length lie inside the mapping, and the vector has a byte for each
            // page of the window.
            let result =
                unsafe { libc::mincore(region.as_ptr().add(offset).cast(), length, residency.as_mut_ptr()) };
            if result != 0 {
                return 0;
            }
            residency[..length.div_ceil(PAGE)].iter().filter(|page| **page & 1 != 0).count() as u64
        })
        .sum()
}

/// A number of bytes as a size in this process's address space.
pub const fn to_usize(bytes: u64) -> usize {
    const { assert!(usize::BITS == u64::BITS, "machines run on 64-bit hosts only") };
    #[expect(clippy::cast_possible_truncation, reason = "both have 64 bits")]
    let bytes = bytes as usize;
    bytes
}

/// Total bytes of guest memory.
pub fn total_bytes(memory: &GuestMemory) -> u64 {
    memory.iter().map(vm_memory::GuestMemoryRegion::len).sum()
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn untouched_memory_is_not_resident_and_touched_memory_is() {
        let memory = allocate(&[(GuestAddress(0), 64 << 20)]).unwrap();
        assert_eq!(total_bytes(&memory), 64 << 20);
        assert_eq!(resident_bytes(&memory), 0);
        memory.write_obj(1u8, GuestAddress(0x10_0000)).unwrap();
        assert!(resident_bytes(&memory) >= PAGE as u64);
    }

    #[test]
    fn more_memory_than_the_address_space_holds_is_a_clear_error() {
        let error = allocate(&[(GuestAddress(0), 1 << 60)]).unwrap_err();
        assert!(error.to_string().contains("MiB of guest memory"), "{error}");
    }
}
