//! The files that a guest boots.

use std::{fs::File, io::Read as _, path::Path};

use super::Finding;

const ELF_MAGIC: &[u8] = b"\x7fELF";
/// `ELFCLASS64` and `ELFDATA2LSB`, the two bytes after the magic.
const ELF_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
/// Where `e_machine` is, and its value for `x86_64` (`EM_X86_64`).
const ELF_MACHINE: usize = 18;
const ELF_X86_64: [u8; 2] = [62, 0];
/// Where a bzImage has its magic (Linux `Documentation/arch/x86/boot.rst`).
const BZIMAGE: usize = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";

/// A cpio archive in the "newc" format (Linux
/// `Documentation/driver-api/early-userspace/buffer-format.rst`).
const CPIO_MAGIC: &[u8] = b"070701";
/// Magics of compressed archives, with what the guest's kernel must be configured with.
const COMPRESSED: [(&[u8], &str); 3] = [
    (b"\x1f\x8b", "CONFIG_RD_GZIP"),
    (b"\xfd7zXZ\0", "CONFIG_RD_XZ"),
    (b"\x28\xb5\x2f\xfd", "CONFIG_RD_ZSTD"),
];

/// As much of a file as is looked at.
const HEADER: u64 = 0x206;
const BUILD: &str = "build it with guest-image/build, or correct the path in the configuration";

/// Whether a file is a kernel that the machine can load.
pub fn kernel(path: &Path) -> Finding {
    read(path).map_or_else(|unreadable| unreadable, |header| judge_kernel(path, &header))
}

/// Whether a file is an initial ramfs.
pub fn initramfs(path: &Path) -> Finding {
    read(path).map_or_else(|unreadable| unreadable, |header| judge_initramfs(path, &header))
}

/// The beginning of a file.
fn read(path: &Path) -> Result<Vec<u8>, Finding> {
    let mut header = Vec::new();
    File::open(path)
        .and_then(|file| file.take(HEADER).read_to_end(&mut header))
        .map(|_| header)
        .map_err(|error| Finding::failed(format!("{} cannot be read: {error}", path.display()), BUILD))
}

fn judge_kernel(path: &Path, header: &[u8]) -> Finding {
    let path = path.display();
    if !header.starts_with(ELF_MAGIC) {
        return if header.get(BZIMAGE..).is_some_and(|rest| rest.starts_with(BZIMAGE_MAGIC)) {
            let to_do = "use the `vmlinux` that was built with it";
            Finding::failed(format!("{path} is a compressed kernel (bzImage)"), to_do)
        } else {
            Finding::failed(format!("{path} is not an ELF file"), BUILD)
        };
    }
    let bits = header.get(ELF_MAGIC.len()..ELF_MAGIC.len() + 2);
    let machine = header.get(ELF_MACHINE..ELF_MACHINE + 2);
    if bits == Some(&ELF_64_LITTLE_ENDIAN) && machine == Some(&ELF_X86_64) {
        Finding::ok(format!("{path} is an x86_64 ELF file"))
    } else {
        Finding::failed(format!("{path} is an ELF file, but not for x86_64"), BUILD)
    }
}

fn judge_initramfs(path: &Path, header: &[u8]) -> Finding {
    let path = path.display();
    if header.starts_with(CPIO_MAGIC) {
        return Finding::ok(format!("{path} is a cpio archive"));
    }
    match COMPRESSED.iter().find(|(magic, _)| header.starts_with(magic)) {
        Some((_, option)) => Finding::warning(
            format!("{path} is compressed"),
            format!(
                "make sure that the guest's kernel has {option} (guest-image/build's has not), or unpack it"
            ),
        ),
        None => Finding::failed(format!("{path} is not a cpio archive (newc)"), BUILD),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Status, *};

    fn elf(class: u8, machine: u8) -> Vec<u8> {
        let mut header = vec![0; 64];
        header[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        header[ELF_MACHINE] = machine;
        header
    }

    fn kernel_status(header: &[u8]) -> Status {
        judge_kernel(Path::new("vmlinux"), header).status
    }

    fn initramfs_status(header: &[u8]) -> Status {
        judge_initramfs(Path::new("initramfs"), header).status
    }

    #[test]
    fn only_an_elf_file_for_this_architecture_is_a_kernel() {
        assert_eq!(kernel_status(&elf(2, 62)), Status::Ok);
        assert_eq!(kernel_status(&elf(2, 183)), Status::Failed, "aarch64");
        assert_eq!(kernel_status(&elf(1, 62)), Status::Failed, "32 bits");
        assert_eq!(kernel_status(ELF_MAGIC), Status::Failed, "cut off");
        assert_eq!(kernel_status(b""), Status::Failed);
    }

    #[test]
    fn a_bzimage_is_told_from_other_files() {
        let mut header = vec![0; usize::try_from(HEADER).unwrap()];
        header[BZIMAGE..].copy_from_slice(BZIMAGE_MAGIC);
        let finding = judge_kernel(Path::new("/boot/vmlinuz"), &header);
        assert_eq!(finding.status, Status::Failed);
        assert!(finding.found.contains("bzImage"), "{finding:?}");
    }

    #[test]
    fn an_initramfs_is_a_cpio_archive() {
        assert_eq!(initramfs_status(b"07070100000001"), Status::Ok);
        assert_eq!(initramfs_status(b"070707"), Status::Failed, "the old format");
        assert_eq!(initramfs_status(b""), Status::Failed);
    }

    #[test]
    fn a_compressed_initramfs_asks_something_of_the_kernel() {
        for (magic, option) in COMPRESSED {
            let finding = judge_initramfs(Path::new("initramfs"), magic);
            assert_eq!(finding.status, Status::Warning);
            assert!(finding.to_do.unwrap().contains(option));
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let finding = kernel(Path::new("/nonexistent/vmlinux"));
        assert_eq!(finding.status, Status::Failed);
        assert!(finding.found.starts_with("/nonexistent/vmlinux cannot be read"), "{finding:?}");
    }
}
