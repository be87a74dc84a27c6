//! The last steps of a container's process: it looks up its program and executes it.

use std::{
    collections::HashMap,
    ffi::CString,
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError, default::DefaultExecutor,
};
use nix::{
    fcntl::{AT_FDCWD, AtFlags},
    unistd::{AccessFlags, execv, faccessat},
};
use oci_spec::runtime::{Process, Spec};

use super::home;

/// Executes programs as runc does, with runc's error texts, which clients look for.
#[derive(Clone)]
pub struct GuestExecutor {
    /// The user, in the container.
    pub uid: u32,
}

impl Executor for GuestExecutor {
    /// Runs in the container's root, as the container's user, before the process is reported as created. So a command
    /// that does not exist is an error of `Create`, not of `Start`.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        program(spec).map(drop).map_err(ExecutorValidationError::ArgValidationError)
    }

    fn setup_envs(&self, mut variables: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        if let Some(home) = variables.get_mut("HOME") {
            home::look_up(home, self.uid);
        }
        DefaultExecutor {}.setup_envs(variables)
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (path, arguments) = program(spec).map_err(|text| ExecutorError::Other(text.clone()))?;
        let path = c_string(path.as_os_str().as_encoded_bytes())?;
        let arguments =
            arguments.iter().map(|argument| c_string(argument.as_bytes())).collect::<Result<Vec<_>, _>>()?;
        reset_ignored_signals();
        let Err(errno) = execv(&path, &arguments);
        let text = format!("exec {}: {}", path.to_string_lossy(), errno.desc().to_lowercase());
        // For a container nobody reads the error any more. Like runc, write it to the container's log.
        let _ = writeln!(io::stderr(), "{text}");
        Err(ExecutorError::Other(text))
    }
}

/// The kernel's `struct sigaction` on x86-64, all zeroes: the default disposition.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Resets signals that this process ignores, because they would stay ignored in the new program. Rust's runtime ignores
/// SIGPIPE. glibc's `posix_spawn`, which has started this process, ignores the two signals that glibc uses itself (32
/// and 33) and that cannot be changed by its `sigaction`.
fn reset_ignored_signals() {
    for signal in [libc::SIGPIPE, 32, 33] {
        // SAFETY: the kernel reads 32 bytes of a constant. This process has no handlers for these signals.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                std::ptr::null_mut::<libc::c_void>(),
                size_of::<u64>(),
            );
        }
    }
}

fn c_string(bytes: &[u8]) -> Result<CString, ExecutorError> {
    CString::new(bytes).map_err(|_| ExecutorError::InvalidArg)
}

fn program(spec: &Spec) -> Result<(PathBuf, &[String]), String> {
    let process = spec.process().as_ref().ok_or("the spec has no process")?;
    let arguments = process.args().as_deref().unwrap_or_default();
    let name = arguments.first().ok_or("the process has no arguments")?;
    Ok((look_up(name, search_path(process))?, arguments))
}

fn search_path(process: &Process) -> &str {
    let environment = process.env().as_deref().unwrap_or_default();
    environment.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default()
}

/// Looks up a program as Go's `exec.LookPath` does, which runc uses.
fn look_up(name: &str, search_path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check_executable(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(format!("exec: {name:?}: stat {name}: no such file or directory"))
            }
            Err(error) => Err(format!("exec: {name:?}: {}", description(&error))),
        };
    }
    search_path
        .split(':')
        .map(|directory| Path::new(if directory.is_empty() { "." } else { directory }).join(name))
        .find(|path| check_executable(path).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

fn check_executable(path: &Path) -> io::Result<()> {
    let metadata = path.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    match faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // The kernel or the seccomp profile does not have faccessat2. Root needs one x bit; execve checks other users.
        Err(nix::Error::ENOSYS | nix::Error::EPERM) if metadata.mode() & 0o111 != 0 => Ok(()),
        Err(nix::Error::ENOSYS | nix::Error::EPERM) => Err(io::ErrorKind::PermissionDenied.into()),
        result => Ok(result?),
    }
}

/// The text that Go has for an error, which is Rust's without the error's number.
fn description(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::Error::from_raw(number).desc().to_lowercase(),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn create_file(directory: &Path, name: &str, mode: u32) {
        let path = directory.join(name);
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_program_is_looked_for_as_runc_does() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        create_file(first.path(), "tool", 0o644);
        create_file(second.path(), "tool", 0o755);
        let search_path = format!("{}:{}", first.path().display(), second.path().display());
        assert_eq!(look_up("tool", &search_path).unwrap(), second.path().join("tool"));
        assert_eq!(
            look_up("nope", &search_path).unwrap_err(),
            "exec: \"nope\": executable file not found in $PATH"
        );
        assert_eq!(
            look_up("/no/such", &search_path).unwrap_err(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        let data = first.path().join("tool").display().to_string();
        assert_eq!(look_up(&data, "").unwrap_err(), format!("exec: {data:?}: permission denied"));
        let directory = first.path().display().to_string();
        assert_eq!(look_up(&directory, "").unwrap_err(), format!("exec: {directory:?}: is a directory"));
    }
}
