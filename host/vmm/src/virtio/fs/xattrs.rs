//! Extended attributes that mean something to the host are not the guest's.
//!
//! `trusted.*` is for the host's root: overlay file systems, for one, keep there what a directory hides. The guest's root has
//! such attributes too (Docker's overlays in a pod do), so they are kept on the host under another name, and the host's own
//! are not shown.

use virtiofsd::passthrough::xattrmap::{Error, XattrMap};

/// In virtiofsd's language, the first rule that fits holds: the guest's `trusted.*` are `user.virtiofs.trusted.*` on the host,
/// where it cannot use them by that name, and does not see the host's `trusted.*`.
const RULES: &str = "
    /prefix/all/trusted./user.virtiofs./
    /bad/server//trusted./
    /bad/client/user.virtiofs.//
    /ok/all///";

/// What the guest's names are on the host, and the host's in the guest.
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
