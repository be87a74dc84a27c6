//! As whom the guest's requests are done.
//!
//! The guest's kernel has decided what its users may do before a request comes; the host's is asked to do it, not whether
//! it may be done. virtiofsd makes files as the guest's user, so that they belong to them, but as a user without
//! privileges, and does all else as root. Neither will do for the root of a user namespace: that is a user like any other
//! here, who may nevertheless write in its other users' directories; and where the ids of a volume are mapped for it, the
//! host's root is nobody, who can have no file renamed or linked.

use rustix::{
    io::Errno,
    thread::{CapabilitiesSecureBits, capabilities_secure_bits, set_capabilities_secure_bits},
};
use vm_memory::{Bytes as _, GuestAddress};

use crate::memory::GuestMemory;

/// Requests that give a file a new name (`include/uapi/linux/fuse.h`).
const NAMING: [u32; 3] = [12, 13, 45];
/// Bytes from the start of a request's header to where opcode, user and group are.
const OPCODE: u64 = 4;
const IDS: u64 = 24;
/// Bytes of a header up to the end of its ids.
pub const HEADER: u32 = 32;
/// Root, or no user at all, as in a request that the guest's kernel makes by itself.
const NO_USER: [u32; 2] = [0, u32::MAX];

/// Lets this thread act as other users and keep its privileges.
pub fn keep_privileges() -> rustix::io::Result<()> {
    let bits = capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    match set_capabilities_secure_bits(bits) {
        // A machine without privileges has none to keep, and cannot act as anybody else.
        Err(Errno::PERM) => Ok(()),
        result => result,
    }
}

/// While this lives, its thread's files are its user's.
pub struct Acting(());

impl Acting {
    /// As the user of a request for which that matters and which virtiofsd does not do as the user by itself.
    /// `header` is where the request begins.
    pub fn for_request(memory: &GuestMemory, header: GuestAddress) -> Option<Acting> {
        let read = |offset| memory.read_obj::<u32>(GuestAddress(header.0.checked_add(offset)?)).ok();
        if !NAMING.contains(&read(OPCODE)?) {
            return None;
        }
        let (uid, gid) = (read(IDS)?, read(IDS + 4)?);
        (!NO_USER.contains(&uid)).then(|| Acting::new(uid, gid))
    }

    fn new(uid: u32, gid: u32) -> Acting {
        set_ids(uid, gid);
        Acting(())
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        set_ids(0, 0);
    }
}

fn set_ids(uid: u32, gid: u32) {
    // SAFETY: only this thread's ids for file systems change, to what the caller says. Neither call can fail for a thread
    // with the privilege, and one without it stays who it is.
    unsafe {
        libc::setfsgid(gid);
        libc::setfsuid(uid);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
        thread,
    };

    use super::*;

    #[test]
    fn what_a_thread_makes_is_its_users_and_nothing_is_forbidden() {
        let directory = tempfile::tempdir().unwrap();
        let others = directory.path().join("others");
        fs::create_dir(&others).unwrap();
        chown(&others, Some(4321), Some(4321)).unwrap();
        fs::set_permissions(&others, fs::Permissions::from_mode(0o700)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                keep_privileges().unwrap();
                let acting = Acting::new(1234, 1235);
                fs::write(others.join("new"), "").unwrap();
                drop(acting);
                fs::write(others.join("roots"), "").unwrap();
            });
        });
        let owner = |name: &str| {
            let metadata = fs::metadata(others.join(name)).unwrap();
            (metadata.uid(), metadata.gid())
        };
        assert_eq!(owner("new"), (1234, 1235));
        assert_eq!(owner("roots"), (0, 0));
    }

    #[test]
    fn only_requests_that_name_files_are_done_as_their_user() {
        let memory = crate::memory::allocate(&[(GuestAddress(0), 4096)]).unwrap();
        let request = |opcode: u32, uid: u32| {
            let mut header = [0; 40];
            header[4..8].copy_from_slice(&opcode.to_le_bytes());
            header[24..28].copy_from_slice(&uid.to_le_bytes());
            memory.write_slice(&header, GuestAddress(64)).unwrap();
            Acting::for_request(&memory, GuestAddress(64)).is_some()
        };
        assert!(request(12, 1000) && request(13, 1000) && request(45, 1000));
        assert!(!request(12, 0) && !request(12, u32::MAX) && !request(9, 1000));
        assert!(Acting::for_request(&memory, GuestAddress(u64::MAX - 8)).is_none());
    }
}
