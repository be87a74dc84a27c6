//! Limits that the kernel has for each user.
//!
//! PID 1 and the root of every container are one user to the kernel, so what one container uses would be missing for
//! the agent and for other containers. Everything that these limits count takes memory, which the kernel charges to the
//! cgroup of its user. With the limits raised, a container is limited by its memory alone.

use std::{fs, io, path::Path};

use super::BootError;

/// No limit, for the kernel's `int`.
const NO_LIMIT: &str = "2147483647";

/// Names of sysctls, with slashes as sysctl(8) allows, and their values.
const LIMITS: [(&str, &str); 14] = [
    ("fs/epoll/max_user_watches", NO_LIMIT),
    // This one counts the files of all users. At the limit only a process with CAP_SYS_ADMIN could open another one.
    ("fs/file-max", "9223372036854775807"),
    ("fs/inotify/max_user_instances", NO_LIMIT),
    ("fs/inotify/max_user_watches", NO_LIMIT),
    // This one counts the pseudo-terminals of all containers.
    ("kernel/pty/max", "65536"),
    ("user/max_cgroup_namespaces", NO_LIMIT),
    ("user/max_ipc_namespaces", NO_LIMIT),
    ("user/max_mnt_namespaces", NO_LIMIT),
    ("user/max_net_namespaces", NO_LIMIT),
    ("user/max_pid_namespaces", NO_LIMIT),
    ("user/max_user_namespaces", NO_LIMIT),
    ("user/max_uts_namespaces", NO_LIMIT),
    ("user/max_inotify_instances", NO_LIMIT),
    ("user/max_inotify_watches", NO_LIMIT),
];

/// Raises the limits. A limit that this kernel does not have is skipped.
pub fn raise() -> Result<(), BootError> {
    raise_in(Path::new("/proc/sys"))
}

fn raise_in(root: &Path) -> Result<(), BootError> {
    for (name, value) in LIMITS {
        // `fs::write` would create a file that does not exist, if `root` is not procfs.
        let written = fs::OpenOptions::new()
            .write(true)
            .open(root.join(name))
            .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
        match written {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            written => written.map_err(BootError::new(format!("set the sysctl {name} to {value}")))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_raised_and_what_the_kernel_does_not_have_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("fs/epoll")).unwrap();
        let file = root.path().join("fs/epoll/max_user_watches");
        fs::write(&file, "1").unwrap();
        raise_in(root.path()).unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), NO_LIMIT);
        assert!(!root.path().join("fs/file-max").exists());
    }
}
