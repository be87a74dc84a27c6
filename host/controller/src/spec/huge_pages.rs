//! Huge pages: how many a container may have, and directories of them.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Error, unsupported};

/// The OCI runtime spec's name for the only size that guests have.
pub const HUGE_PAGE: &str = "2MB";

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

/// CRI's record of a container, as far as it is about huge pages (containerd: `internal/cri/store/container`, `Metadata`).
#[derive(Default, Deserialize)]
#[serde(default)]
struct Record {
    #[serde(rename = "Metadata")]
    metadata: Metadata,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Metadata {
    #[serde(rename = "Config")]
    config: Config,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Config {
    linux: Linux,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Linux {
    resources: Resources,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Resources {
    hugepage_limits: Vec<Limit>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Limit {
    page_size: String,
    limit: u64,
}

/// Puts back into a spec what containerd leaves out on a host whose cgroups cannot limit huge pages
/// (`internal/cri/opts`, `WithResources`): the guest's can.
pub fn restore_limits(spec: Vec<u8>, record: &[u8]) -> Vec<u8> {
    let record: Record = serde_json::from_slice(record).unwrap_or_default();
    let limits = record.metadata.config.linux.resources.hugepage_limits;
    if limits.iter().all(|limit| limit.limit == 0) {
        return spec;
    }
    // What is no spec is refused elsewhere.
    let Ok(mut parsed) = serde_json::from_slice::<Value>(&spec) else { return spec };
    let Some(linux) = parsed.get_mut("linux").and_then(Value::as_object_mut) else { return spec };
    let resources = linux.entry("resources").or_insert_with(|| json!({}));
    let Some(resources) = resources.as_object_mut() else { return spec };
    if resources.get("hugepageLimits").is_some_and(|limits| !limits.is_null()) {
        return spec;
    }
    let limits = limits.iter().map(|limit| json!({ "pageSize": limit.page_size, "limit": limit.limit }));
    resources.insert("hugepageLimits".into(), limits.collect());
    serde_json::to_vec(&parsed).unwrap_or(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"Version":"v1","Metadata":{"ID":"x","Config":{"linux":{"resources":
        {"cpu_shares":2,"hugepage_limits":[{"page_size":"2MB","limit":4194304},{"page_size":"1GB"}]}}}}}"#;

    fn restored(spec: &Value, record: &str) -> Value {
        serde_json::from_slice(&restore_limits(spec.to_string().into_bytes(), record.as_bytes())).unwrap()
    }

    #[test]
    fn what_containerd_left_out_is_put_back() {
        let wanted = json!([{ "pageSize": "2MB", "limit": 4_194_304 }, { "pageSize": "1GB", "limit": 0 }]);
        for spec in [json!({ "linux": {} }), json!({ "linux": { "resources": { "hugepageLimits": null } } })]
        {
            assert_eq!(restored(&spec, RECORD)["linux"]["resources"]["hugepageLimits"], wanted);
        }
    }

    #[test]
    fn what_a_spec_has_itself_stays() {
        let spec =
            json!({ "linux": { "resources": { "hugepageLimits": [{ "pageSize": "2MB", "limit": 2 }] } } });
        assert_eq!(restored(&spec, RECORD), spec);
        let plain = json!({ "linux": { "resources": {} } });
        for record in ["", "{}", "no json", r#"{"Metadata":{"Config":{"linux":{"resources":{}}}}}"#] {
            assert_eq!(restored(&plain, record), plain, "{record}");
        }
    }
}
