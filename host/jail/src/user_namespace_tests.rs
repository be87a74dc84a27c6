//! These make namespaces, so they need root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::MetadataExt as _;

use rustix::{io::Errno, thread::CapabilitySet};

use super::*;
use crate::testing::in_child;

/// Runs `look` in a process of the namespace; returns what it returns.
fn inside(namespace: &OwnedFd, look: impl FnOnce() -> String) -> String {
    in_child(|| match enter_user_namespace(namespace) {
        Ok(()) => look(),
        Err(error) => format!("cannot enter: {error}"),
    })
}

#[test]
fn every_id_is_what_it_is_on_the_host() {
    let namespace = make_user_namespace().unwrap();
    let own = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::chown(&own, Some(123_456), Some(4_000_000_000)).unwrap();
    let seen = inside(&namespace, || {
        let metadata = fs::metadata(&own).unwrap();
        let changed = std::os::unix::fs::chown(&own, Some(70_000), Some(80_000));
        format!("{} {} {changed:?}", metadata.uid(), metadata.gid())
    });
    assert_eq!(seen, "123456 4000000000 Ok(())");
    let metadata = fs::metadata(&own).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (70_000, 80_000));
}

#[test]
fn capabilities_in_it_are_none_on_the_host() {
    let namespace = make_user_namespace().unwrap();
    let seen = inside(&namespace, || {
        let all = rustix::thread::capabilities(None).unwrap().effective;
        // Each of these needs a capability on the host, and changes nothing without one.
        let name = rustix::system::sethostname(b"x").unwrap_err();
        let device = rustix::fs::mknodat(
            rustix::fs::CWD,
            "/tmp/pericarp-jail-test-device",
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::RUSR,
            rustix::fs::makedev(1, 3),
        );
        let mounted = rustix::mount::mount_change(c"/", rustix::mount::MountPropagationFlags::PRIVATE);
        let refused = [Err(name), device, mounted];
        format!(
            "{} {}",
            all.contains(CapabilitySet::SYS_ADMIN),
            refused.iter().all(|result| *result == Err(Errno::PERM))
        )
    });
    assert_eq!(seen, "true true");
}

#[test]
fn whoever_is_in_it_can_make_no_other_and_so_no_mounts() {
    let namespace = make_user_namespace().unwrap();
    let seen = inside(&namespace, || {
        // SAFETY: only this process, which ends soon, would have other namespaces.
        let made = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWUSER) };
        // A captured machine has no capabilities with which it could raise the limit again. This process has them.
        format!("{made:?}")
    });
    assert_eq!(seen, format!("{:?}", Err::<(), _>(Errno::NOSPC)));
    // Nor is anything changed for others.
    make_user_namespace().unwrap();
}

#[test]
fn nothing_is_left_of_what_made_it() {
    let children = || {
        let path = format!("/proc/self/task/{}/children", rustix::thread::gettid().as_raw_nonzero());
        fs::read_to_string(path).unwrap()
    };
    let before = children();
    drop(make_user_namespace().unwrap());
    assert_eq!(children(), before);
}
