//! Loads the kernel, the initial ramfs and the boot parameters into guest memory (Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit boot protocol").

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params},
    loader::{self, Elf, KernelLoader as _, elf},
};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion as _};

use super::{
    layout::{CMDLINE, CMDLINE_MAX, GAP, HIGH_MEMORY, LOW_MEMORY_END, ZERO_PAGE, memory_ranges},
    mptable,
    registers::{self, RegisterError},
};
use crate::memory::{self, GuestMemory};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
/// The alignment that a compressed kernel needs to unpack itself. An ELF kernel only checks the field.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
const E820_RAM: u32 = 1;
const PAGE: u64 = 4096;

/// What the guest boots cannot be loaded.
#[derive(Debug, Error)]
pub enum BootError {
    #[error("cannot open the guest kernel {path}")]
    OpenKernel {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the guest kernel {path} is no ELF file; an uncompressed vmlinux is needed")]
    NotElf { path: PathBuf },
    #[error("cannot load the guest kernel {path} into {mib} MiB of memory; it is damaged or too large")]
    Kernel {
        path: PathBuf,
        mib: u64,
        #[source]
        source: loader::Error,
    },
    #[error("cannot open the guest's initramfs {path}")]
    OpenInitramfs {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot read the guest's initramfs {path}")]
    ReadInitramfs {
        path: PathBuf,
        #[source]
        source: GuestMemoryError,
    },
    #[error(
        "the guest's initramfs {path} ({bytes} bytes) does not fit beside the kernel into {mib} MiB of memory"
    )]
    InitramfsSize { path: PathBuf, bytes: u64, mib: u64 },
    #[error("the kernel command line is {length} bytes long; the limit is {CMDLINE_MAX}")]
    Cmdline { length: usize },
    #[error("cannot write boot parameters to guest memory")]
    Parameters(#[source] GuestMemoryError),
    #[error("cannot prepare the first vCPU's memory")]
    Registers(#[source] RegisterError),
}

/// A file that is loaded into a guest's memory.
struct Image<'a> {
    file: File,
    /// For messages.
    path: &'a Path,
}

/// The files that a guest starts from.
pub struct Images<'a> {
    kernel: Image<'a>,
    initramfs: Image<'a>,
}

impl<'a> Images<'a> {
    /// Opens both.
    pub fn open(kernel: &'a Path, initramfs: &'a Path) -> Result<Self, BootError> {
        let open_kernel = |source| BootError::OpenKernel { path: kernel.into(), source };
        let open_initramfs = |source| BootError::OpenInitramfs { path: initramfs.into(), source };
        Ok(Self {
            kernel: Image { file: File::open(kernel).map_err(open_kernel)?, path: kernel },
            initramfs: Image { file: File::open(initramfs).map_err(open_initramfs)?, path: initramfs },
        })
    }
}

/// Loads the kernel, the initial ramfs and the boot parameters for a guest of at most `vcpus`. Returns the address of
/// the kernel's first instruction.
pub fn load(
    memory: &GuestMemory,
    images: Images<'_>,
    cmdline: &str,
    vcpus: u8,
) -> Result<GuestAddress, BootError> {
    let mib = memory::total_bytes(memory) >> 20;
    let Images { kernel: Image { file: mut kernel, path }, initramfs } = images;
    let loaded = Elf::load(memory, None, &mut kernel, Some(HIGH_MEMORY))
        .map_err(|source| kernel_error(path, mib, source))?;
    let (ramdisk, ramdisk_size) = load_initramfs(memory, initramfs, loaded.kernel_end)?;

    // The terminator needs one byte.
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::Cmdline { length: cmdline.len() });
    }
    memory.write_slice(cmdline.as_bytes(), CMDLINE).map_err(BootError::Parameters)?;
    memory.write_obj(0u8, GuestAddress(CMDLINE.0 + cmdline.len() as u64)).map_err(BootError::Parameters)?;

    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = address_u32(CMDLINE.0);
    params.hdr.cmdline_size = address_u32(CMDLINE_MAX as u64);
    params.hdr.ramdisk_image = address_u32(ramdisk.0);
    params.hdr.ramdisk_size = ramdisk_size;
    for (index, (start, size)) in (0u8..).zip(usable_memory(memory)) {
        params.e820_table[usize::from(index)] = boot_e820_entry { addr: start, size, type_: E820_RAM };
        params.e820_entries = index + 1;
    }
    memory.write_obj(params, ZERO_PAGE).map_err(BootError::Parameters)?;
    mptable::write(memory, vcpus).map_err(BootError::Parameters)?;
    registers::write_tables(memory).map_err(BootError::Registers)?;
    Ok(loaded.kernel_load)
}

/// An address or a size in the boot parameters, which have 32 bits. All of them belong to the first region of memory,
/// which ends below 4 GiB.
fn address_u32(address: u64) -> u32 {
    let Ok(address) = u32::try_from(address) else {
        unreachable!("{address:#x} is not below the device gap")
    };
    address
}

fn kernel_error(path: &Path, mib: u64, source: loader::Error) -> BootError {
    match source {
        loader::Error::Elf(
            elf::Error::ReadElfHeader | elf::Error::InvalidElfMagicNumber | elf::Error::BigEndianElfOnLittle,
        ) => BootError::NotElf { path: path.into() },
        source => BootError::Kernel { path: path.into(), mib, source },
    }
}

/// Loads the initramfs at the end of the memory below the device gap, where the kernel makes no early allocations.
/// Returns its address and its size in bytes.
fn load_initramfs(
    memory: &GuestMemory,
    image: Image<'_>,
    kernel_end: u64,
) -> Result<(GuestAddress, u32), BootError> {
    let Image { mut file, path } = image;
    let open = |source| BootError::OpenInitramfs { path: path.into(), source };
    let bytes = file.metadata().map_err(open)?.len();
    let mib = memory::total_bytes(memory) >> 20;
    let too_large = || BootError::InitramfsSize { path: path.into(), bytes, mib };
    let end =
        memory.iter().map(|region| region.start_addr().0 + region.len()).filter(|end| *end <= GAP).max();
    let start = end.unwrap_or(GAP).checked_sub(bytes).ok_or_else(too_large)? & !(PAGE - 1);
    if start < kernel_end {
        return Err(too_large());
    }
    let size = u32::try_from(bytes).map_err(|_| too_large())?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, size as usize)
        .map_err(|source| BootError::ReadInitramfs { path: path.into(), source })?;
    Ok((GuestAddress(start), size))
}

/// The memory that the kernel may use, as start and size in bytes.
fn usable_memory(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let mut usable = vec![(0, LOW_MEMORY_END)];
    for (start, size) in memory_ranges(memory::total_bytes(memory)) {
        let first = start.0.max(HIGH_MEMORY.0);
        usable.push((first, start.0 + size as u64 - first));
    }
    usable
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn guest() -> GuestMemory {
        memory::allocate(&memory_ranges(64 << 20)).unwrap()
    }

    fn image(path: &Path) -> Image<'_> {
        Image { file: File::open(path).unwrap(), path }
    }

    fn file(contents: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(contents).unwrap();
        file
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = Images::open(Path::new("/no/such/vmlinux"), Path::new("/x")).err().unwrap();
        assert_eq!(error.to_string(), "cannot open the guest kernel /no/such/vmlinux");
    }

    #[test]
    fn a_kernel_that_is_no_elf_is_named() {
        let kernel = file(&[0x90; 4096]);
        let images = Images::open(kernel.path(), kernel.path()).unwrap();
        let error = load(&guest(), images, "", 1).unwrap_err();
        assert!(matches!(error, BootError::NotElf { .. }), "{error:?}");
        assert!(error.to_string().contains(kernel.path().to_str().unwrap()));
    }

    #[test]
    fn an_initramfs_larger_than_memory_is_refused() {
        let initramfs = tempfile::NamedTempFile::new().unwrap();
        initramfs.as_file().set_len(65 << 20).unwrap();
        let error = load_initramfs(&guest(), image(initramfs.path()), 0x200_0000).unwrap_err();
        assert!(matches!(error, BootError::InitramfsSize { mib: 64, .. }), "{error:?}");
    }

    #[test]
    fn the_initramfs_ends_where_memory_ends() {
        let initramfs = file(&[7; 5000]);
        let memory = guest();
        let (start, size) = load_initramfs(&memory, image(initramfs.path()), 0x200_0000).unwrap();
        assert_eq!((start.0 % PAGE, size), (0, 5000));
        assert!(start.0 + u64::from(size) <= 64 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(start.0 + 4999)).unwrap(), 7);
    }

    #[test]
    fn the_kernel_is_not_given_the_bios_area() {
        assert_eq!(usable_memory(&guest()), [(0, 0x9fc00), (0x10_0000, 63 << 20)]);
    }
}
