//! The devices of a spec: what the guest has by itself, and block devices of the host, which come as disks.

use std::path::{Path, PathBuf};

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

/// Character devices that the guest's kernel has under the host's numbers (Linux:
/// `Documentation/admin-guide/devices.txt`): /dev/fuse and /dev/net/tun.
const GUEST_DEVICES: [(u32, u32); 2] = [(10, 229), (10, 200)];

/// A block device of the host that a container gets under a path of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockVolume {
    /// In the container.
    pub path: String,
    /// The host's major number.
    pub major: u32,
    /// The host's minor number.
    pub minor: u32,
    /// Whether it may not be written.
    pub read_only: bool,
}

/// The devices of the host that were asked for, which may be directories of devices. The spec of a privileged container
/// lists all of the host's beside them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GivenDevices(Vec<GivenDevice>);

/// A device of the host, or a directory of devices, and where a container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenDevice {
    pub in_container: PathBuf,
    pub on_host: PathBuf,
}

impl FromIterator<GivenDevice> for GivenDevices {
    fn from_iter<T: IntoIterator<Item = GivenDevice>>(devices: T) -> Self {
        Self(devices.into_iter().collect())
    }
}

impl GivenDevices {
    /// Where the host has what the container has at `path`; `None` if nobody asked for that.
    pub fn source(&self, path: &Path) -> Option<PathBuf> {
        self.0.iter().find_map(|device| {
            let below = path.strip_prefix(&device.in_container).ok()?;
            Some(if below.as_os_str().is_empty() {
                device.on_host.clone()
            } else {
                device.on_host.join(below)
            })
        })
    }
}

/// Leaves those devices in the spec that the container gets, and says which of them are to come as disks. `given` is
/// what CRI was asked for. What was not asked for is no volume: a privileged container's list is that of all the host's
/// devices, some of which may have other numbers by now, those of somebody else's disk.
pub(super) fn translate(
    linux: &mut Map<String, Value>,
    given: Option<&GivenDevices>,
) -> Result<Vec<BlockVolume>, Error> {
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
            ("b", Some(numbers)) if is_volume(path, numbers, privileged, given)? => {
                let (major, minor) = numbers;
                let read_only = !rules.iter().any(|rule| allows_writing(rule, major, minor));
                volumes.push(BlockVolume { path: path.to_owned(), major, minor, read_only });
            }
            ("c" | "u", Some(numbers)) if GUEST_DEVICES.contains(&numbers) => {}
            // containerd lists all the host's devices for a privileged container. It gets the machine's.
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

/// Whether a block device is one that somebody has given to the container.
fn is_volume(
    path: &str,
    numbers: (u32, u32),
    privileged: bool,
    given: Option<&GivenDevices>,
) -> Result<bool, Error> {
    match given.map(|given| given.source(Path::new(path))) {
        Some(Some(source)) if has_numbers(&source, numbers) => Ok(true),
        // The host may have another device under the same path, which is in the list as well.
        Some(Some(_)) if !privileged => Err(Error::OtherDevice { path: path.to_owned() }),
        // The numbers are all that is known of it, and may be another device's at any time.
        Some(None) if !privileged => unsupported(
            format!("the block device {path:?}"),
            "CRI was not asked for it; give it to the container as a raw block volume (volumeDevices)",
        ),
        // Nobody but the author of the spec can have listed it.
        None if !privileged => Ok(true),
        _ => Ok(false),
    }
}

/// Whether the host has a device with these numbers there now.
fn has_numbers(source: &Path, (major, minor): (u32, u32)) -> bool {
    rustix::fs::stat(source).is_ok_and(|stat| {
        (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (major, minor)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn translated(devices: &Value, rules: &Value) -> Result<(Vec<String>, Vec<BlockVolume>), Error> {
        translated_of(devices, rules, None)
    }

    /// With what CRI was asked for: pairs of a path in the container and one on the host.
    fn translated_of(
        devices: &Value,
        rules: &Value,
        given: Option<&[(&str, &Path)]>,
    ) -> Result<(Vec<String>, Vec<BlockVolume>), Error> {
        let given = given.map(|given| {
            let device = |(path, source): &(&str, &Path)| GivenDevice {
                in_container: path.into(),
                on_host: (*source).to_owned(),
            };
            given.iter().map(device).collect::<GivenDevices>()
        });
        let mut linux = Map::new();
        linux.insert("devices".into(), devices.clone());
        linux.insert("resources".into(), json!({ "devices": rules }));
        let volumes = translate(&mut linux, given.as_ref())?;
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

    /// A block device of this machine's, as a path in a directory and its numbers. The node's path is nobody's
    /// business.
    fn block_device(directory: &Path) -> (std::path::PathBuf, (u32, u32)) {
        let node = directory.join("disk");
        let device = rustix::fs::makedev(7, 3);
        let made = rustix::fs::mknodat(
            rustix::fs::CWD,
            &node,
            rustix::fs::FileType::BlockDevice,
            rustix::fs::Mode::RUSR,
            device,
        );
        made.expect("these tests need root");
        (node, (7, 3))
    }

    #[test]
    fn a_privileged_container_gets_what_was_given_to_it_and_nothing_else_of_the_hosts_list() {
        let directory = tempfile::tempdir().unwrap();
        let (node, (major, minor)) = block_device(directory.path());
        let devices = json!([
            { "path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237 },
            { "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 },
            // The host's list has them: at that time the numbers were another disk's.
            { "path": "/dev/nvme3n1", "type": "b", "major": major, "minor": minor },
            // The host has a disk of the same name as the volume.
            { "path": "/dev/xvda", "type": "b", "major": 202, "minor": 0 },
            { "path": "/dev/xvda", "type": "b", "major": major, "minor": minor },
        ]);
        let rules = json!([{ "allow": true, "access": "rwm" }]);
        let (left, volumes) = translated_of(&devices, &rules, Some(&[("/dev/xvda", &node)])).unwrap();
        assert_eq!(left, ["/dev/xvda"]);
        let volume = BlockVolume { path: "/dev/xvda".into(), major, minor, read_only: false };
        assert_eq!(volumes, [volume]);
        // Where nothing is on record, nothing can have been asked for.
        for given in [None, Some(&[] as &[_])] {
            assert_eq!(translated_of(&devices, &rules, given).unwrap(), (vec![], vec![]));
        }
    }

    #[test]
    fn a_volume_whose_device_has_other_numbers_by_now_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (node, (major, minor)) = block_device(directory.path());
        let device = |minor| json!([{ "path": "/dev/data", "type": "b", "major": major, "minor": minor }]);
        let given: [(&str, &Path); 1] = [("/dev/data", &node)];
        let (left, _) = translated_of(&device(minor), &nothing_allowed(), Some(&given)).unwrap();
        assert_eq!(left, ["/dev/data"]);
        let error = translated_of(&device(minor + 1), &nothing_allowed(), Some(&given)).unwrap_err();
        assert!(error.to_string().contains("/dev/data"), "{error}");
        // Of what was not asked for, nobody knows why it is in the spec.
        let error = translated_of(&device(minor), &nothing_allowed(), Some(&[])).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }
}
