//! These make namespaces, so they need root.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, os::fd::AsRawFd as _, path::Path};

use rustix::{
    fs::{OFlags, openat},
    io::Errno,
};

use super::*;
use crate::testing::in_child;

/// Runs `look` in a process that has entered a root of its own. It gets the descriptors' directory, and what it returns
/// is returned.
fn inside(look: impl FnOnce(&File) -> String) -> String {
    in_child(|| match enter() {
        Ok(descriptors) => look(&descriptors),
        Err(error) => format!("cannot enter: {error}"),
    })
}

fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn there_is_an_empty_share_and_nothing_else_from_wherever_one_looks() {
    let seen = inside(|_| {
        let places = ["/", "/..", "/share", "/share/../..", "."];
        places.map(|place| format!("{place}: {}", names(place).join(" "))).join("\n")
    });
    assert_eq!(seen, "/: share\n/..: share\n/share: \n/share/../..: share\n.: share");
}

#[test]
fn nothing_inside_can_be_written() {
    let seen = inside(|_| {
        let errors = ["/new", "/share/new"].map(|path| fs::create_dir(path).unwrap_err().kind().to_string());
        errors.join(", ")
    });
    assert_eq!(seen, "read-only filesystem or storage medium, read-only filesystem or storage medium");
}

#[test]
fn the_descriptors_directory_leads_to_open_files_and_not_to_the_host() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, "content").unwrap();
    let open = File::open(&file).unwrap();
    let seen = inside(|descriptors| {
        let again = openat(descriptors, open.as_raw_fd().to_string(), OFlags::RDONLY, Mode::empty()).unwrap();
        let content = io::read_to_string(File::from(again)).unwrap();
        let upward = ["../status", "../root/etc/passwd", "../../1/status", "../../sys/kernel/hostname"]
            .map(|path| openat(descriptors, path, OFlags::RDONLY, Mode::empty()).unwrap_err())
            .iter()
            // The names are looked up among the descriptors, wherever they seem to lead.
            .all(|error| matches!(*error, Errno::NOENT | Errno::NOTDIR));
        format!("{content} {upward}")
    });
    assert_eq!(seen, "content true");
}

#[test]
fn the_host_keeps_its_mounts() {
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert_eq!(inside(|_| "done".into()), "done");
    let added: Vec<_> = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .filter(|line| line.contains("pericarp") && !before.contains(line))
        .map(str::to_owned)
        .collect();
    assert_eq!(added, Vec::<String>::new());
}
