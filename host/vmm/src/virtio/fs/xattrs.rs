//! Extended attributes: which of the host's the guest sees, and under which names the host keeps the guest's.
//!
//! `trusted.*` is for the host's root: overlay file systems, for example, record there what a directory hides. The
//! guest's root has such attributes too (Docker's overlays in a pod do). They are kept on the host under another name,
//! and the host's own are not shown to the guest.

use virtiofsd::passthrough::xattrmap::{Error, XattrMap};

/// Rules in virtiofsd's language, of which the first that matches applies. The guest's `trusted.*` is
/// `user.virtiofs.trusted.*` on the host, which the guest cannot use by that name, and it does not see the host's
/// `trusted.*`.
const RULES: &str = "
    /prefix/all/trusted./user.virtiofs./
    /bad/server//trusted./
    /bad/client/user.virtiofs.//
    /ok/all///";

/// The mapping between the names in the guest and those on the host.
pub fn map() -> Result<XattrMap, Error> {
    XattrMap::try_from(RULES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_attributes_are_left_out_of_a_list() {
        let listed = b"trusted.hosts\0user.virtiofs.trusted.guests\0user.shared\0security.capability\0";
        assert_eq!(
            map().unwrap().map_server_xattrlist(listed.to_vec()).unwrap(),
            b"trusted.guests\0user.shared\0security.capability\0"
        );
    }
}
