//! Parses OCI specs. What runc tolerates in them is tolerated, and nothing else.

use oci_spec::runtime::{Capability, LinuxResources, Process, Spec};
use serde_json::{Value, from_slice, from_value};

use crate::pod::{HugePagesError, huge_pages};

/// Sets of capabilities in an OCI process.
const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// Why a spec cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The JSON does not have the form that the OCI runtime spec demands.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// `resources.unified` has a key that is not the name of a cgroup's file.
    #[error("unified resource {0:?} is not a cgroup file's name, such as memory.high")]
    Unified(String),
    /// The guest does not have huge pages of this size.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
}

/// Parses a container's spec.
pub fn container(json: &[u8]) -> Result<Spec, SpecError> {
    let mut spec: Value = from_slice(json)?;
    if let Some(process) = spec.get_mut("process") {
        remove_unknown_capabilities(process);
    }
    let mut spec: Spec = from_value(spec)?;
    if let Some(resources) = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut()) {
        check_unified_keys(resources)?;
        huge_pages::check_sizes(resources)?;
    }
    Ok(spec)
}

/// Parses the resources of an `Update` call.
pub fn resources(json: &[u8]) -> Result<LinuxResources, SpecError> {
    let mut resources: LinuxResources = from_slice(json)?;
    check_unified_keys(&resources)?;
    huge_pages::check_sizes(&mut resources)?;
    Ok(resources)
}

/// Checks that the keys of `unified` are file names. libcgroups uses a key as a path below the container's cgroup, so
/// that it could lead to another container's.
fn check_unified_keys(resources: &LinuxResources) -> Result<(), SpecError> {
    let keys = resources.unified().iter().flat_map(|unified| unified.keys());
    match keys.into_iter().find(|key| key.contains('/') || !key.contains('.') || key.starts_with('.')) {
        Some(key) => Err(SpecError::Unified(key.clone())),
        None => Ok(()),
    }
}

/// Parses the spec of another process.
pub fn process(json: &[u8]) -> Result<Process, SpecError> {
    let mut process: Value = from_slice(json)?;
    remove_unknown_capabilities(&mut process);
    Ok(from_value(process)?)
}

/// Removes capabilities that do not exist, with a warning, as runc does (`libcontainer/capabilities`, `capSlice`).
fn remove_unknown_capabilities(process: &mut Value) {
    for set in CAPABILITY_SETS {
        let Some(names) = process.pointer_mut(&format!("/capabilities/{set}")).and_then(Value::as_array_mut)
        else {
            continue;
        };
        names.retain(|name| {
            let known = from_value::<Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!(%name, set, "an unknown capability is left out");
            }
            known
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_capability_is_left_out_and_the_others_stay() {
        let json = br#"{"cwd":"/","user":{"uid":0,"gid":0},"args":["x"],
            "capabilities":{"bounding":["CAP_KILL","CAP_NO_SUCH_THING","CAP_CHOWN"],"ambient":null}}"#;
        let process = process(json).unwrap();
        let capabilities = process.capabilities().clone().unwrap();
        let bounding = capabilities.bounding().clone().unwrap();
        assert_eq!(bounding.len(), 2);
        assert!(bounding.contains(&Capability::Kill) && bounding.contains(&Capability::Chown));
    }

    #[test]
    fn a_unified_key_stays_in_the_containers_cgroup() {
        assert!(resources(br#"{"unified":{"memory.high":"1","hugetlb.2MB.max":"0"}}"#).is_ok());
        for key in ["../memory.high", "a/memory.high", "/memory.high", "..", "memory", ""] {
            let json = format!(r#"{{"unified":{{"{key}":"1"}}}}"#);
            let error = resources(json.as_bytes()).unwrap_err();
            assert!(matches!(&error, SpecError::Unified(named) if named == key), "{key}: {error}");
            let spec = format!(r#"{{"ociVersion":"1.2.0","linux":{{"resources":{json}}}}}"#);
            assert!(container(spec.as_bytes()).is_err());
        }
    }
}
