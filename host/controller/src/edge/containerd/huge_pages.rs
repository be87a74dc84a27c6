//! Limits of huge pages that containerd leaves out of a container's spec.

use serde::Deserialize;
use serde_json::{Value, json};

/// CRI's record of a container, as far as it is about huge pages (containerd: `internal/cri/store/container`,
/// `Metadata`).
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
    // What is not a spec is refused elsewhere.
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
