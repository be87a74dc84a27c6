//! Reads OCI specs as forgivingly as runc does.

use oci_spec::runtime::{Capability, Process, Spec};
use serde_json::{Error, Value, from_slice, from_value};

/// Sets of capabilities in an OCI process.
const CAPABILITY_SETS: [&str; 5] = ["bounding", "effective", "inheritable", "permitted", "ambient"];

/// A container's spec.
pub fn container(json: &[u8]) -> Result<Spec, Error> {
    let mut spec: Value = from_slice(json)?;
    if let Some(process) = spec.get_mut("process") {
        forget_unknown_capabilities(process);
    }
    from_value(spec)
}

/// The spec of one more process.
pub fn process(json: &[u8]) -> Result<Process, Error> {
    let mut process: Value = from_slice(json)?;
    forget_unknown_capabilities(&mut process);
    from_value(process)
}

/// Capabilities that do not exist cannot be had: runc warns of them and goes on
/// (`libcontainer/capabilities`, `capSlice`).
fn forget_unknown_capabilities(process: &mut Value) {
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
}
