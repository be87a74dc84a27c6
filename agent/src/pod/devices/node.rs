//! Disks that a container gets as device nodes.

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, Spec};

use super::DeviceError;

/// Changes the device at `path` to the numbers that it has in this guest, in the spec's list of devices and in its
/// device rules.
pub fn set_numbers(spec: &mut Spec, path: &str, (major, minor): (u32, u32)) -> Result<(), DeviceError> {
    let linux = spec.linux_mut().as_mut().ok_or_else(|| DeviceError::NoNode(path.to_owned()))?;
    let device = linux
        .devices_mut()
        .iter_mut()
        .flatten()
        .find(|device| device.path().as_os_str() == path && device.typ() == LinuxDeviceType::B)
        .ok_or_else(|| DeviceError::NoNode(path.to_owned()))?;
    let before = (device.major(), device.minor());
    let (major, minor) = (i64::from(major), i64::from(minor));
    device.set_major(major).set_minor(minor);
    let device = device.clone();

    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    let mut allowed = false;
    for rule in rules.iter_mut().filter(|rule| is_for(rule, before)) {
        rule.set_major(Some(major)).set_minor(Some(minor));
        allowed |= rule.allow();
    }
    if !allowed {
        rules.push(full_access(&device)?);
    }
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    Ok(())
}

/// Whether a rule is for exactly this block device.
fn is_for(rule: &LinuxDeviceCgroup, (major, minor): (i64, i64)) -> bool {
    rule.typ() == Some(LinuxDeviceType::B) && rule.major() == Some(major) && rule.minor() == Some(minor)
}

fn full_access(device: &LinuxDevice) -> Result<LinuxDeviceCgroup, DeviceError> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(device.major())
        .minor(device.minor())
        .access("rwm")
        .build()
        .map_err(|_| DeviceError::NoNode(device.path().display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(rules: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion": "1.1.0", "linux": {{
                "devices": [{{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}},
                            {{"path": "/dev/data", "type": "b", "major": 7, "minor": 0}}],
                "resources": {{"devices": [{rules}]}}}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    fn rules(spec: &Spec) -> Vec<(Option<i64>, Option<i64>, Option<String>)> {
        let rules = spec.linux().as_ref().unwrap().resources().as_ref().unwrap().devices().clone().unwrap();
        rules.iter().map(|rule| (rule.major(), rule.minor(), rule.access().clone())).collect()
    }

    #[test]
    fn a_device_and_its_rule_get_the_guests_numbers_and_others_stay() {
        let mut spec = spec(
            r#"{"allow": false, "access": "rwm"},
               {"allow": true, "type": "c", "major": 7, "minor": 0, "access": "r"},
               {"allow": true, "type": "b", "major": 7, "minor": 0, "access": "r"}"#,
        );
        set_numbers(&mut spec, "/dev/data", (254, 16)).unwrap();
        let device = spec.linux().as_ref().unwrap().devices().as_ref().unwrap()[1].clone();
        assert_eq!((device.major(), device.minor()), (254, 16));
        assert_eq!(
            rules(&spec),
            [
                (None, None, Some("rwm".into())),
                (Some(7), Some(0), Some("r".into())),
                (Some(254), Some(16), Some("r".into()))
            ]
        );
    }

    #[test]
    fn a_device_that_no_rule_allows_is_allowed() {
        let mut spec = spec(r#"{"allow": false, "access": "rwm"}"#);
        set_numbers(&mut spec, "/dev/data", (254, 0)).unwrap();
        assert_eq!(rules(&spec)[1], (Some(254), Some(0), Some("rwm".into())));
    }

    #[test]
    fn a_node_that_the_spec_does_not_have_is_named() {
        for path in ["/dev/other", "/dev/null"] {
            let error = set_numbers(&mut spec(""), path, (254, 0)).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
