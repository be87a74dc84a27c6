//! What CRI was asked for, as containerd has it on record beside the spec that it made of that.
//!
//! containerd passes over some of it. A container that does not get what its author asked for is refused here instead.

use std::path::PathBuf;

use pericarp_protos::cri::NamespaceMode;
use serde_json::Value;

use super::cri_fields;
use crate::guest::translate::{Error, GivenDevice, GivenDevices, unsupported};

/// What a container is made from, in CRI.
const CONTAINER_CONFIG_TYPE: &str = "runtime.v1.ContainerConfig";

/// Kinds of namespaces by their fields in `NamespaceOption`, and the modes in which a container can have them.
const NAMESPACES: [(&str, &str, &[NamespaceMode]); 4] = [
    ("network", "/network", &[NamespaceMode::Pod]),
    ("pid", "/pid", &[NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Target]),
    ("ipc", "/ipc", &[NamespaceMode::Pod]),
    ("user", "/userns_options/mode", &[NamespaceMode::Pod, NamespaceMode::Node]),
];

fn given_devices(config: &Value) -> GivenDevices {
    let path = |device: &Value, key: &str| Some(PathBuf::from(device.get(key)?.as_str()?));
    let devices = config.get("devices").and_then(Value::as_array).into_iter().flatten();
    let given = |device| {
        Some(GivenDevice {
            in_container: path(device, "container_path")?,
            on_host: path(device, "host_path")?,
        })
    };
    devices.filter_map(given).collect()
}

/// Refuses what a container cannot have; returns the devices. The record is containerd's
/// `internal/cri/store/container`, `versionedMetadata`.
pub fn check(record: &[u8]) -> Result<GivenDevices, Error> {
    let record: Value = serde_json::from_slice(record).map_err(Error::Record)?;
    let config = record
        .pointer("/Metadata/Config")
        .filter(|config| config.is_object())
        .ok_or(Error::Malformed("containerd's record of it has no CRI configuration"))?;
    if let Some(unknown) = cri_fields::unknown_in_json(CONTAINER_CONFIG_TYPE, config) {
        return unsupported(unknown.to_string(), cri_fields::REMEDY);
    }
    if config.get("windows").is_some_and(|windows| !windows.is_null()) {
        return unsupported("a Windows container", "the guest is Linux; remove the windows section");
    }
    let options = config.pointer("/linux/security_context/namespace_options").unwrap_or(&Value::Null);
    NAMESPACES.iter().try_for_each(|(kind, place, can_be)| {
        let mode = options.pointer(place).and_then(Value::as_i64).unwrap_or(0);
        if can_be.iter().any(|known| i64::from(*known as i32) == mode) {
            return Ok(());
        }
        let named = i32::try_from(mode).ok().and_then(|mode| NamespaceMode::try_from(mode).ok());
        unsupported(
            format!(
                "the mode {} for its {kind} namespace",
                named.map_or("unknown", |mode| mode.as_str_name())
            ),
            "a container's namespaces are its pod's; ask for POD, or for processes also CONTAINER or TARGET",
        )
    })?;
    Ok(given_devices(config))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn checked(config: &Value) -> Result<(), String> {
        let record = json!({ "Version": "v1", "Metadata": { "ID": "x", "Config": config } });
        check(record.to_string().as_bytes()).map(drop).map_err(|error| error.to_string())
    }

    #[test]
    fn a_device_that_was_asked_for_is_found_where_the_host_has_it() {
        let config = json!({ "devices": [
            { "container_path": "/dev/data", "host_path": "/dev/disk/by-id/7", "permissions": "rwm" },
            { "container_path": "/dev/all", "host_path": "/dev/mapper" },
        ] });
        let given = given_devices(&config);
        let source = |path: &str| given.source(Path::new(path));
        assert_eq!(source("/dev/data"), Some("/dev/disk/by-id/7".into()));
        assert_eq!(source("/dev/all/one"), Some("/dev/mapper/one".into()));
        assert_eq!(source("/dev/database"), None);
        assert_eq!(source("/dev"), None);
    }

    #[test]
    fn a_container_as_kubelet_asks_for_it_is_not_refused() {
        let config = json!({
            "metadata": { "name": "web" }, "image": { "image": "sha256:0", "user_specified_image": "web" },
            "envs": [{ "key": "A", "value": "b" }], "labels": { "io.kubernetes.pod.name": "web" },
            "mounts": [{ "container_path": "/data", "host_path": "/var/data", "propagation": 1 }],
            "linux": { "resources": { "cpu_shares": 2, "oom_score_adj": 1000, "unified": { "memory.oom.group": "1" } },
                "security_context": {
                    "namespace_options": { "pid": 1, "userns_options": { "mode": 2 } },
                    "run_as_user": {}, "masked_paths": ["/proc/kcore"], "seccomp": { "profile_type": 1 } } },
        });
        assert_eq!(checked(&config), Ok(()));
        for record in ["", "{}", "no json", r#"{"Metadata":{"Config":[]}}"#] {
            assert!(check(record.as_bytes()).is_err(), "{record}");
        }
    }

    #[test]
    fn a_mode_of_a_namespace_that_a_container_cannot_have_is_refused_by_its_name() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let kinds: [(&str, &[NamespaceMode]); 4] = [
            ("network", &[Pod]),
            ("pid", &[Pod, Container, Target]),
            ("ipc", &[Pod]),
            ("user", &[Pod, Node]),
        ];
        for (kind, can_be) in kinds {
            for mode in [Pod, Container, Node, Target] {
                let options = match kind {
                    "user" => json!({ "userns_options": { "mode": mode as i32 } }),
                    kind => json!({ kind: mode as i32 }),
                };
                let config = json!({ "linux": { "security_context": { "namespace_options": options } } });
                match checked(&config) {
                    Ok(()) => assert!(can_be.contains(&mode), "{kind} {}", mode.as_str_name()),
                    Err(error) => {
                        assert!(!can_be.contains(&mode), "{error}");
                        let named = format!("the mode {} for its {kind} namespace", mode.as_str_name());
                        assert!(error.contains(&named), "{error}");
                    }
                }
            }
        }
    }

    /// Every field of a container's configuration that has an enumeration's values.
    const ENUMERATIONS: [&str; 9] = [
        "mounts[0].propagation",
        "linux.security_context.namespace_options.network",
        "linux.security_context.namespace_options.pid",
        "linux.security_context.namespace_options.ipc",
        "linux.security_context.namespace_options.userns_options.mode",
        "linux.security_context.seccomp.profile_type",
        "linux.security_context.apparmor.profile_type",
        "linux.security_context.supplemental_groups_policy",
        "stop_signal",
    ];

    #[test]
    fn a_value_that_an_enumeration_does_not_have_is_refused_with_its_fields_name() {
        let mut fields = cri_fields::enumerations(CONTAINER_CONFIG_TYPE);
        fields.retain(|(path, ..)| !path.starts_with("windows."));
        let mut paths: Vec<_> = fields.iter().map(|(path, ..)| path.as_str()).collect();
        let mut expected = ENUMERATIONS;
        paths.sort_unstable();
        expected.sort_unstable();
        assert_eq!(paths, expected, "CRI has other fields now; decide what each of their values means here");
        for (path, _, config) in &fields {
            let error = checked(config).unwrap_err();
            assert!(error.contains(&format!("the value 99 of CRI's field {path}")), "{error}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_by_its_name() {
        for (config, named) in [
            (json!({ "hologram": true }), "hologram"),
            (
                json!({ "linux": { "security_context": { "hologram": 1 } } }),
                "linux.security_context.hologram",
            ),
            (json!({ "windows": {} }), "Windows"),
        ] {
            let error = checked(&config).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
