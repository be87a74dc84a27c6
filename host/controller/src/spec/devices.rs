//! The devices of a spec: what the guest has by itself, and block devices of the host, which come as disks.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Error, object, text, unsupported};

/// Device nodes that every container has; the guest makes its own (OCI runtime spec, "Default Devices").
const STANDARD_DEVICES: [&str; 8] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/console",
    "/dev/ptmx",
];

/// Character devices that the guest's kernel has under the host's numbers (Linux: `Documentation/admin-guide/devices.txt`):
/// /dev/fuse and /dev/net/tun.
const GUEST_DEVICES: [(u32, u32); 2] = [(10, 229), (10, 200)];

/// A block device of the host that a container gets under a path of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockVolume {
    /// In the container.
    pub path: String,
    /// The host's numbers.
    pub major: u32,
    /// The same.
    pub minor: u32,
    /// Whether it may not be written.
    pub read_only: bool,
}

/// Leaves those devices in the spec that the container gets, and says which of them are to come as disks.
pub(super) fn translate(linux: &mut Map<String, Value>) -> Result<Vec<BlockVolume>, Error> {
    let rules = object(linux, "resources", "linux.resources is not an object")?
        .and_then(|resources| resources.get("devices")?.as_array().cloned())
        .unwrap_or_default();
    let privileged = rules.iter().any(allows_everything);
    let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else { return Ok(Vec::new()) };
    let mut volumes = Vec::new();
    let mut kept = Vec::new();
    for device in std::mem::take(devices) {
        let fields = device.as_object().ok_or(Error::Malformed("a device is not an object"))?;
        let (path, kind) = (text(fields, "path"), text(fields, "type"));
        let number =
            |key| fields.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        // The guest's runtime makes these anyway, with the guest's numbers.
        if STANDARD_DEVICES.contains(&path) {
            continue;
        }
        let numbers = number("major").zip(number("minor"));
        match (kind, numbers) {
            // containerd lists all the host's devices for a privileged container. It gets the machine's.
            (_, Some(numbers)) if privileged && is_hosts_own(path, numbers) => continue,
            ("b", Some((major, minor))) => {
                let read_only = !rules.iter().any(|rule| allows_writing(rule, major, minor));
                volumes.push(BlockVolume { path: path.to_owned(), major, minor, read_only });
            }
            ("c" | "u", Some(numbers)) if GUEST_DEVICES.contains(&numbers) => {}
            _ if privileged => continue,
            _ => {
                return unsupported(
                    format!("the host's device {path:?}"),
                    "only block devices, /dev/fuse and /dev/net/tun can be had; remove it from the container",
                );
            }
        }
        kept.push(device);
    }
    *devices = kept;
    Ok(volumes)
}

/// Whether a rule lets the container use every device (`oci.WithAllDevicesAllowed`): it is privileged.
fn allows_everything(rule: &Value) -> bool {
    let unset = |key| rule.get(key).is_none_or(Value::is_null);
    let any_type = unset("type") || rule.get("type").is_some_and(|kind| kind == "a");
    rule.get("allow") == Some(&Value::Bool(true)) && any_type && unset("major") && unset("minor")
}

fn allows_writing(rule: &Value, major: u32, minor: u32) -> bool {
    let is = |key, number: u32| rule.get(key).and_then(Value::as_u64) == Some(u64::from(number));
    let access = rule.get("access").and_then(Value::as_str).unwrap_or_default();
    let this = rule.get("allow") == Some(&Value::Bool(true)) && is("major", major) && is("minor", minor);
    allows_everything(rule) || this && access.contains('w')
}

/// Whether the host has the device under the same path, so that nobody has given it to the container on purpose.
fn is_hosts_own(path: &str, (major, minor): (u32, u32)) -> bool {
    rustix::fs::stat(Path::new(path)).is_ok_and(|stat| {
        (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (major, minor)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn translated(devices: &Value, rules: &Value) -> Result<(Vec<String>, Vec<BlockVolume>), Error> {
        let mut linux = Map::new();
        linux.insert("devices".into(), devices.clone());
        linux.insert("resources".into(), json!({ "devices": rules }));
        let volumes = translate(&mut linux)?;
        let left = linux["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|device| device["path"].as_str().unwrap().to_owned());
        Ok((left.collect(), volumes))
    }

    fn nothing_allowed() -> Value {
        json!([{ "allow": false, "access": "rwm" }])
    }

    #[test]
    fn a_block_device_is_a_volume_that_may_be_written_if_its_rule_says_so() {
        let devices = json!([{ "path": "/dev/data", "type": "b", "major": 7, "minor": 3 }]);
        for (access, read_only) in [("rwm", false), ("r", true), ("rm", true)] {
            let rules = json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 7, "minor": 3, "access": access },
                { "allow": true, "type": "b", "major": 7, "minor": 4, "access": "rwm" },
            ]);
            let volume = BlockVolume { path: "/dev/data".into(), major: 7, minor: 3, read_only };
            assert_eq!(translated(&devices, &rules).unwrap(), (vec!["/dev/data".to_owned()], vec![volume]));
        }
    }

    #[test]
    fn devices_that_the_guest_has_itself_are_its_own() {
        let devices = json!([
            { "path": "/dev/null", "type": "c", "major": 1, "minor": 3 },
            { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 },
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200 },
        ]);
        let (left, volumes) = translated(&devices, &nothing_allowed()).unwrap();
        assert_eq!((left, volumes), (vec!["/dev/fuse".to_owned(), "/dev/net/tun".to_owned()], vec![]));
    }

    #[test]
    fn any_other_device_is_refused_by_its_path() {
        for device in [
            json!({ "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 }),
            json!({ "path": "/dev/odd", "type": "b" }),
            json!({ "path": "/dev/odd", "type": "p" }),
        ] {
            let error = translated(&json!([device]), &nothing_allowed()).unwrap_err();
            assert!(error.to_string().contains(device["path"].as_str().unwrap()), "{error}");
        }
        assert!(translated(&json!(["/dev/sda"]), &nothing_allowed()).is_err());
    }

    #[test]
    fn a_privileged_container_gets_what_was_given_to_it_and_not_the_hosts_list() {
        let devices = json!([
            // The host's own, under the host's path.
            { "path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237 },
            { "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 },
            { "path": "/dev/xvda", "type": "b", "major": 7, "minor": 3 },
        ]);
        let (left, volumes) = translated(&devices, &json!([{ "allow": true, "access": "rwm" }])).unwrap();
        assert_eq!(left, ["/dev/xvda"]);
        assert!(!volumes[0].read_only);
    }
}
