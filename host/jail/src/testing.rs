//! A process in which a test can enter what it would not come out of.

use std::io::{self, Read as _, Write as _};

/// Runs `work` in a child of this process; returns what it returns.
pub fn in_child(work: impl FnOnce() -> String) -> String {
    let (mut reader, mut writer) = io::pipe().unwrap();
    // SAFETY: the child has a copy of this thread alone. glibc keeps its allocator usable there, and no lock of anybody
    // else's is needed.
    match unsafe { libc::fork() } {
        0 => {
            let _ = writer.write_all(work().as_bytes());
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(0) }
        }
        child => {
            assert!(child > 0, "{}", io::Error::last_os_error());
            drop(writer);
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            // SAFETY: the status is not asked for.
            assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
            text
        }
    }
}
