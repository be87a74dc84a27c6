//! Limits that a kernel has for each user. To it, PID 1 and the root of every container are one user: what a container takes is
//! not left for the agent, nor for other containers. All of it is memory that the kernel counts to the cgroup of who takes it,
//! so that with these out of the way a container's limit of memory is the limit.

use std::{fs, io, path::Path};

use super::BootError;

/// No limit, for the kernel's `int`.
const NO_LIMIT: &str = "2147483647";

/// sysctl(8)'s names with slashes, and values.
const LIMITS: [(&str, &str); 14] = [
    ("fs/epoll/max_user_watches", NO_LIMIT),
    // Not counted for each user, but for all: only who has CAP_SYS_ADMIN could open a file when another has taken them.
    ("fs/file-max", "9223372036854775807"),
    ("fs/inotify/max_user_instances", NO_LIMIT),
    ("fs/inotify/max_user_watches", NO_LIMIT),
    // Of all containers together.
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

/// Raises them. One that this kernel does not have is none.
pub fn raise() -> Result<(), BootError> {
    raise_in(Path::new("/proc/sys"))
}

fn raise_in(root: &Path) -> Result<(), BootError> {
    for (name, value) in LIMITS {
        // Not `fs::write`, which would create what does not exist, were `root` anything but procfs.
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
