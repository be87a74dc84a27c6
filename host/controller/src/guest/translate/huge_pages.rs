//! Huge pages: how many a container may have, and directories of them.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use serde_json::{Map, Value};

use super::{Error, unsupported};
use crate::host::size::HUGE_PAGE;

/// `HUGETLBFS_MAGIC` (linux/magic.h).
const HUGETLBFS: rustix::fs::FsWord = 0x9584_58f6;

/// A mounted `hugetlbfs` of the host's. Its pages are of no use to a guest, which has its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HugeDirectory {
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl HugeDirectory {
    /// What is there on the host, if it is one.
    pub fn at(path: &Path) -> Option<HugeDirectory> {
        let kind = rustix::fs::statfs(path).ok()?.f_type;
        if kind != HUGETLBFS {
            return None;
        }
        let metadata = std::fs::metadata(path).ok()?;
        Some(HugeDirectory { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() })
    }

    /// Makes a bind mount of it into a mount of the guest's own; containers that name the same have the same.
    pub(super) fn mount(&self, mount: &mut Map<String, Value>, name: &str, read_only: bool) {
        let HugeDirectory { mode, uid, gid } = self;
        let mut options = vec![
            "pagesize=2M".to_owned(),
            format!("mode={mode:o}"),
            format!("uid={uid}"),
            format!("gid={gid}"),
        ];
        options.extend(read_only.then(|| "ro".to_owned()));
        mount.insert("type".into(), "hugetlbfs".into());
        mount.insert("source".into(), name.into());
        mount.insert("options".into(), options.into());
    }
}

/// Whether a spec's container may have any.
pub(super) fn are_allowed(spec: &Map<String, Value>) -> bool {
    let limits = spec.get("linux").map(|linux| &linux["resources"]["hugepageLimits"]);
    let mut limits = limits.and_then(Value::as_array).into_iter().flatten();
    limits.any(|limit| limit["limit"].as_u64().is_some_and(|bytes| bytes > 0))
}

/// Refuses pages of a size that guests do not have.
pub(super) fn check(resources: &Map<String, Value>) -> Result<(), Error> {
    let mut limits = resources.get("hugepageLimits").and_then(Value::as_array).into_iter().flatten();
    let other = |limit: &&Value| limit["pageSize"] != HUGE_PAGE && limit["limit"].as_u64() > Some(0);
    match limits.find(other) {
        Some(limit) => unsupported(
            format!("huge pages of {}", limit["pageSize"].as_str().unwrap_or_default()),
            "the guest has those of 2Mi only; ask for hugepages-2Mi",
        ),
        None => Ok(()),
    }
}
