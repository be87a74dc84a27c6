//! The credentials with which the guest's requests are executed.
//!
//! The guest's kernel has decided what its users may do before a request comes. The host's kernel is to execute it, not
//! to decide that again. virtiofsd makes files with the ids of the guest's user, so that they belong to that user, but
//! without capabilities; it does everything else as root. Neither is enough for the root of a user namespace. On the
//! host that is an ordinary user, who may nevertheless write in the directories of the namespace's other users. Where
//! the ids of a volume are mapped for the namespace, the host's root is nobody, for whom no file can be renamed or
//! linked. And with root's credentials, the data of any user could fill the space that a disk reserves for root.

use virtiofsd::{
    filesystem::Context,
    fuse::{InHeader, Opcode},
    soft_idmap::Id as _,
};

/// Operations that give a file a new name.
const NAMING_OPERATIONS: [u32; 3] = [Opcode::Rename as u32, Opcode::Link as u32, Opcode::Rename2 as u32];
/// The ids of root, and of no user, as in a request that the guest's kernel makes by itself.
const ROOT_OR_NO_USER: [u32; 2] = [0, u32::MAX];

/// A user without a claim to space that is reserved. The number does not matter, because a file is written with the
/// rights of whoever has opened it.
const NOBODY: u32 = 65534;

/// The calling thread's ids for access to files (setfsuid(2), setfsgid(2)), as long as this exists. Afterwards they are
/// root's again.
pub struct FsCredentials(());

impl FsCredentials {
    /// Takes the ids of a request's user, if the operation needs them and virtiofsd does not take them by itself.
    pub fn for_request(header: &InHeader) -> Option<Self> {
        let (uid, gid) = (header.uid.into_inner(), header.gid.into_inner());
        let needs_user = NAMING_OPERATIONS.contains(&header.opcode) && !ROOT_OR_NO_USER.contains(&uid);
        needs_user.then(|| Self::new(uid, gid))
    }

    /// Takes the id of nobody for a request that may use up disk space, unless root makes it. ext4 reserves space for
    /// root, and decides by who writes (`ext4_has_free_clusters`), not by whose file it is. For what the guest's kernel
    /// writes late (`delayed`) or by itself it names root or no user, whoever has written it.
    pub fn for_data(context: Context, delayed: bool) -> Option<Self> {
        (delayed || context.uid.into_inner() != 0).then(|| {
            // SAFETY: only this thread's user id for access to files changes.
            unsafe { libc::setfsuid(NOBODY) };
            Self(())
        })
    }

    fn new(uid: u32, gid: u32) -> Self {
        set_fs_ids(uid, gid);
        Self(())
    }
}

impl Drop for FsCredentials {
    fn drop(&mut self) {
        set_fs_ids(0, 0);
    }
}

fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: only this thread's ids for access to files change, to what the caller says. Neither call can fail for a
    // thread with the capability, and the ids of one without it do not change.
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

    use rustix::thread::{CapabilitySet, capabilities};

    use super::*;
    use crate::threads::{required_capabilities, restrict_capabilities};

    #[test]
    fn what_a_thread_makes_is_its_users_and_nothing_is_forbidden() {
        let directory = tempfile::tempdir().unwrap();
        let others = directory.path().join("others");
        fs::create_dir(&others).unwrap();
        chown(&others, Some(4321), Some(4321)).unwrap();
        fs::set_permissions(&others, fs::Permissions::from_mode(0o700)).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                restrict_capabilities().unwrap();
                let credentials = FsCredentials::new(1234, 1235);
                fs::write(others.join("new"), "").unwrap();
                drop(credentials);
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
            FsCredentials::for_request(&InHeader { opcode, uid: uid.into(), ..InHeader::default() }).is_some()
        };
        assert!(request(12, 1000) && request(13, 1000) && request(45, 1000));
        assert!(!request(12, 0) && !request(12, u32::MAX) && !request(9, 1000));
    }

    #[test]
    fn a_thread_keeps_no_privileges_but_those_that_it_needs() {
        thread::scope(|scope| {
            scope.spawn(|| {
                restrict_capabilities().unwrap();
                let has = capabilities(None).unwrap();
                assert_eq!(
                    (has.effective, has.permitted),
                    (required_capabilities(), required_capabilities())
                );
                for never in [CapabilitySet::MKNOD, CapabilitySet::SYS_ADMIN, CapabilitySet::SYS_RESOURCE] {
                    assert!(!has.permitted.contains(never), "{never:?}");
                }
                assert!(has.inheritable.is_empty());
            });
        });
    }
}
