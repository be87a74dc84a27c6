//! The pod's user namespace, and how ids in a container's user namespace map to ids in the guest.

use std::fs::File;

use nix::{
    sched::{CloneFlags, setns},
    unistd::{Gid, Uid, setgid, setuid},
};
use oci_spec::runtime::{LinuxIdMapping, Spec};
use pericarp_protos::guest::USER_NAMESPACE;

use super::BoxError;

/// Makes this process, which must have one thread, the root of the pod's user namespace.
pub fn enter() -> Result<(), BoxError> {
    setns(File::open(USER_NAMESPACE)?, CloneFlags::CLONE_NEWUSER)?;
    setgid(Gid::from_raw(0))?;
    setuid(Uid::from_raw(0))?;
    Ok(())
}

/// The user id in the guest of a user of a container; `None` if the container's user namespace does not map it.
pub fn uid(spec: &Spec, uid: u32) -> Option<u32> {
    map_id(spec.linux().as_ref().and_then(|linux| linux.uid_mappings().as_deref()), uid)
}

/// The group id in the guest of a group of a container; `None` if the container's user namespace does not map it.
pub fn gid(spec: &Spec, gid: u32) -> Option<u32> {
    map_id(spec.linux().as_ref().and_then(|linux| linux.gid_mappings().as_deref()), gid)
}

fn map_id(mappings: Option<&[LinuxIdMapping]>, id: u32) -> Option<u32> {
    let mappings = mappings.unwrap_or_default();
    if mappings.is_empty() {
        return Some(id);
    }
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id()).filter(|offset| *offset < mapping.size())?;
        mapping.host_id().checked_add(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_container_are_others_in_the_guest_if_it_has_a_user_namespace() {
        let spec = |linux: &str| -> Spec {
            serde_json::from_str(&format!(r#"{{"ociVersion":"1.2.0","linux":{linux}}}"#)).unwrap()
        };
        let plain = spec("{}");
        assert_eq!((uid(&plain, 1000), gid(&plain, 7)), (Some(1000), Some(7)));
        let mapped = spec(
            r#"{"uidMappings":[{"containerID":0,"hostID":65536,"size":1000}],
                "gidMappings":[{"containerID":5,"hostID":131072,"size":10}]}"#,
        );
        assert_eq!(
            (uid(&mapped, 0), uid(&mapped, 999), uid(&mapped, 1000)),
            (Some(65536), Some(66535), None)
        );
        assert_eq!((gid(&mapped, 4), gid(&mapped, 5), gid(&mapped, 15)), (None, Some(131_072), None));
    }
}
