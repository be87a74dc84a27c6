//! As whom the guest's requests are done.
//!
//! The guest's kernel has decided what its users may do before a request comes; the host's is asked to do it, not whether
//! it may be done. virtiofsd makes files as the guest's user, so that they belong to them, but as a user without
//! privileges, and does all else as root. Neither will do for the root of a user namespace: that is a user like any other
//! here, who may nevertheless write in its other users' directories; and where the ids of a volume are mapped for it, the
//! host's root is nobody, who can have no file renamed or linked. And as root, anybody's data could fill up what a disk keeps
//! for root.

use rustix::{
    io::Errno,
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, capabilities_secure_bits,
        set_capabilities, set_capabilities_secure_bits,
    },
};
use virtiofsd::{
    filesystem::Context,
    fuse::{InHeader, Opcode},
    soft_idmap::Id as _,
};

/// Requests that give a file a new name.
const NAMING: [u32; 3] = [Opcode::Rename as u32, Opcode::Link as u32, Opcode::Rename2 as u32];
/// Root, or no user at all, as in a request that the guest's kernel makes by itself.
const NO_USER: [u32; 2] = [0, u32::MAX];

/// Somebody without any claim to what is kept for others. Which number it is does not matter: a file is written as whoever
/// has opened it.
const NOBODY: u32 = 65534;

/// What it takes to do as the guest says with the files below the share, whoever owns them. Neither devices can be made with
/// it, nor limits of disk space exceeded, nor attributes set that the host trusts.
fn needed() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETFCAP
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
}

/// Lets this thread act as other users and keep those privileges that it needs, and takes away the others. Before its first
/// request: virtiofsd restores what it has found then.
pub fn keep_privileges() -> rustix::io::Result<()> {
    let bits = capabilities_secure_bits()? | CapabilitiesSecureBits::NO_SETUID_FIXUP;
    match set_capabilities_secure_bits(bits) {
        // A machine without privileges has none to keep, and cannot act as anybody else.
        Err(Errno::PERM) => {}
        result => result?,
    }
    let has = capabilities(None)?;
    set_capabilities(
        None,
        CapabilitySets {
            effective: has.effective & needed(),
            permitted: has.permitted & needed(),
            inheritable: CapabilitySet::empty(),
        },
    )
}

/// While this lives, its thread's files are its user's.
pub struct Acting(());

impl Acting {
    /// As the user of a request for which that matters and which virtiofsd does not do as the user by itself.
    pub fn for_request(header: &InHeader) -> Option<Acting> {
        let (uid, gid) = (header.uid.into_inner(), header.gid.into_inner());
        let matters = NAMING.contains(&header.opcode) && !NO_USER.contains(&uid);
        matters.then(|| Acting::new(uid, gid))
    }

    /// As nobody, for a request that may take up disk space and is not root's. ext4 keeps some for root, and goes by who
    /// writes (`ext4_has_free_clusters`), not by whose file it is. What the guest's kernel writes late or by itself says
    /// "root" or nobody, whoever it is for.
    pub fn for_data(context: Context, delayed: bool) -> Option<Acting> {
        (delayed || context.uid.into_inner() != 0).then(|| {
            // SAFETY: only this thread's user for file systems changes.
            unsafe { libc::setfsuid(NOBODY) };
            Acting(())
        })
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
        let request = |opcode, uid: u32| {
            Acting::for_request(&InHeader { opcode, uid: uid.into(), ..InHeader::default() }).is_some()
        };
        assert!(request(12, 1000) && request(13, 1000) && request(45, 1000));
        assert!(!request(12, 0) && !request(12, u32::MAX) && !request(9, 1000));
    }

    #[test]
    fn a_thread_keeps_no_privileges_but_those_that_it_needs() {
        thread::scope(|scope| {
            scope.spawn(|| {
                keep_privileges().unwrap();
                let has = capabilities(None).unwrap();
                assert_eq!((has.effective, has.permitted), (needed(), needed()));
                for never in [CapabilitySet::MKNOD, CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_RESOURCE] {
                    assert!(!has.permitted.contains(never), "{never:?}");
                }
                assert!(has.inheritable.is_empty());
            });
        });
    }
}
