//! The guest's own devices, which a privileged container gets instead of the host's.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Spec};

use super::DeviceError;
use crate::resources::DeviceRules;

const DEVICES: &str = "/dev";

/// File systems below /dev, and the console: containers do not get them from containerd either (`pkg/oci`,
/// `getDevices`).
const LEFT_OUT: [&str; 5] = ["pts", "shm", "fd", "mqueue", "console"];

/// Devices that the runtime creates for every container.
const STANDARD: [&str; 7] = ["null", "zero", "full", "random", "urandom", "tty", "ptmx"];

/// Adds the guest's devices to the spec of a container that may use all devices, because it is privileged. A device
/// that the spec already has at the same path stays.
pub fn add(spec: &mut Spec) -> Result<(), DeviceError> {
    add_from(spec, Path::new(DEVICES))
}

fn add_from(spec: &mut Spec, directory: &Path) -> Result<(), DeviceError> {
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    // Invalid rules are refused when the container's cgroup is created.
    if !DeviceRules::new(rules).is_ok_and(|rules| rules.allows_all()) {
        return Ok(());
    }
    let mut devices = linux.devices().clone().unwrap_or_default();
    let guest_devices = list(directory).map_err(DeviceError::List)?;
    let is_missing = |device: &LinuxDevice| devices.iter().all(|present| present.path() != device.path());
    let missing: Vec<_> = guest_devices.into_iter().filter(is_missing).collect();
    devices.extend(missing);
    linux.set_devices(Some(devices));
    Ok(())
}

/// The device nodes in a directory and in those below it, with the paths that they have below /dev.
fn list(directory: &Path) -> io::Result<Vec<LinuxDevice>> {
    let mut devices = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(below) = directories.pop() {
        for entry in fs::read_dir(directory.join(&below))? {
            let entry = entry?;
            let name = entry.file_name();
            let is_one_of = |names: &[&str]| names.iter().any(|other| name == *other);
            if below.as_os_str().is_empty() && (is_one_of(&LEFT_OUT) || is_one_of(&STANDARD)) {
                continue;
            }
            let path = below.join(&name);
            let kind = entry.file_type()?;
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_char_device() || kind.is_block_device() {
                devices.extend(device(&path, kind.is_block_device(), &entry.metadata()?));
            }
        }
    }
    Ok(devices)
}

fn device(path: &Path, is_block: bool, metadata: &fs::Metadata) -> Option<LinuxDevice> {
    LinuxDeviceBuilder::default()
        .path(Path::new(DEVICES).join(path))
        .typ(if is_block { LinuxDeviceType::B } else { LinuxDeviceType::C })
        .major(rustix::fs::major(metadata.rdev()))
        .minor(rustix::fs::minor(metadata.rdev()))
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build()
        // This cannot fail, because the builder has all required fields.
        .ok()
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    use serde_json::json;

    use super::*;

    fn guest() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for below in ["net", "pts", "shm"] {
            fs::create_dir(directory.path().join(below)).unwrap();
        }
        fs::write(directory.path().join("file"), "").unwrap();
        for (name, kind, major, minor) in [
            ("null", FileType::CharacterDevice, 1, 3),
            ("console", FileType::CharacterDevice, 5, 1),
            ("pts/0", FileType::CharacterDevice, 136, 0),
            ("fuse", FileType::CharacterDevice, 10, 229),
            ("net/tun", FileType::CharacterDevice, 10, 200),
            ("vda", FileType::BlockDevice, 254, 0),
        ] {
            let path = directory.path().join(name);
            mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), makedev(major, minor)).unwrap();
        }
        directory
    }

    fn given(devices: &serde_json::Value, rules: &serde_json::Value) -> Vec<(String, i64, i64)> {
        let mut spec: Spec = serde_json::from_value(json!({ "ociVersion": "1.2.0",
            "linux": { "devices": devices, "resources": { "devices": rules } } }))
        .unwrap();
        add_from(&mut spec, guest().path()).unwrap();
        let devices = spec.linux().as_ref().unwrap().devices().clone().unwrap_or_default();
        let mut all: Vec<_> = devices
            .iter()
            .map(|device| (device.path().display().to_string(), device.major(), device.minor()))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn a_privileged_container_has_the_guests_devices_beside_its_own() {
        let own = json!([{ "path": "/dev/vda", "type": "b", "major": 7, "minor": 1 }]);
        assert_eq!(
            given(&own, &json!([{ "allow": true, "access": "rwm" }])),
            [("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200), ("/dev/vda", 7, 1)]
                .map(|(path, major, minor)| (path.to_owned(), major, minor))
        );
    }

    #[test]
    fn other_containers_have_what_was_given_to_them() {
        let rules = json!([
            { "allow": true, "access": "rwm" },
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
        ]);
        assert!(given(&json!([]), &rules).is_empty());
    }
}
