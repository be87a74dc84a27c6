//! The pod's sysctls.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use super::configuration::PodError;

/// Sets sysctls; `root` is `/proc/sys`.
pub fn set(root: &Path, sysctls: &HashMap<String, String>) -> Result<(), PodError> {
    for (key, value) in sysctls {
        let path = sysctl_path(root, key).ok_or_else(|| PodError::UnknownSysctl(key.clone()))?;
        // `fs::write` would create a file that does not exist, if `root` is not procfs.
        let written = fs::OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(PodError::UnknownSysctl(key.clone()));
            }
            Err(source) => {
                return Err(PodError::Sysctl { key: key.clone(), value: value.clone(), source });
            }
        }
    }
    Ok(())
}

/// The file of a sysctl, in either notation of sysctl(8): `net.ipv4.ip_forward`, or with slashes
/// where a name contains a dot (`net/ipv4/conf/eth0.1/forwarding`).
fn sysctl_path(root: &Path, key: &str) -> Option<PathBuf> {
    let separator = if key.contains('/') { '/' } else { '.' };
    let parts: Vec<&str> = key.split(separator).collect();
    let names_a_file = parts.iter().all(|part| !matches!(*part, "" | "." | ".."));
    names_a_file.then(|| root.join(parts.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory_with_sysctl() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("net/core")).unwrap();
        fs::write(root.path().join("net/core/somaxconn"), "4096").unwrap();
        root
    }

    #[test]
    fn a_sysctl_is_written_in_either_notation() {
        let root = directory_with_sysctl();
        for (key, value) in [("net.core.somaxconn", "17"), ("net/core/somaxconn", "23")] {
            set(root.path(), &HashMap::from([(key.into(), value.into())])).unwrap();
            let content = fs::read_to_string(root.path().join("net/core/somaxconn")).unwrap();
            assert!(content.starts_with(value), "{content}");
        }
    }

    #[test]
    fn an_unknown_sysctl_is_named_in_the_error() {
        let root = directory_with_sysctl();
        for key in ["net.core.nonsense", "", "net..core", "net/../../etc/passwd"] {
            let error = set(root.path(), &HashMap::from([(key.to_owned(), "1".into())])).unwrap_err();
            assert!(matches!(&error, PodError::UnknownSysctl(name) if name == key), "{error}");
            assert!(error.to_string().contains(key));
        }
        assert!(!root.path().join("net/core/nonsense").exists());
    }
}
