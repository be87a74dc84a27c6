//! The controller's configuration: `/etc/pericarp/config.toml`.

pub mod rate_limits;

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use pericarp_vmm::{MachineConfig, RateLimits};
use serde::Deserialize;

/// Below this a guest does not start, so a pod with a smaller limit gets this much. Its containers'
/// own limits are kept by the guest's cgroups.
pub const MINIMUM_MEMORY_MIB: u32 = MachineConfig::MEMORY_MIB_MIN;

/// What an operator can set. Every key is optional; an unknown key is an error.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where pods' directories and the controller's socket live.
    pub run_dir: PathBuf,
    /// The guest's kernel, an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's initial ramfs with the agent in it.
    pub initramfs: PathBuf,
    /// Appended to the guest's kernel command line.
    pub kernel_cmdline: String,
    /// containerd's gRPC socket.
    pub containerd_address: PathBuf,
    /// How long a pod's machine may take from its start until the agent is ready, in seconds in which it could have
    /// worked: time in which others had the CPU is not counted.
    pub ready_timeout_seconds: u64,
    /// How long that may take altogether, in seconds. kubelet gives a pod's start up after 4 minutes.
    pub start_timeout_seconds: u64,
    /// How long a guest may give no answer before its machine is ended, in seconds. 0: for ever.
    pub guest_timeout_seconds: u64,
    /// The size that a pod's console log never exceeds, in KiB.
    pub console_limit_kib: u64,
    /// Whether pods may have virtual machines of their own, by annotation.
    pub nested_virtualization: bool,
    /// What is logged: a `tracing` filter such as "info" or "`pericarp_controller=debug`".
    pub log: String,
    /// The size of a pod's machine when the pod asks for nothing.
    pub defaults: Defaults,
    /// The largest machine that a pod may ask for.
    pub limits: Limits,
    /// How much the devices of each pod's machine may do in a second. A pod may ask for less.
    pub rate_limits: RateLimits,
}

/// The size of a machine whose pod has neither resources nor annotations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// Upper limits of a machine. Without them, and for memory in any case, the host's own size is the limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Number of vCPUs; may be more than the host has CPUs.
    pub vcpus: Option<u8>,
    /// Guest memory in MiB.
    pub memory_mib: Option<u32>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            run_dir: "/run/pericarp".into(),
            kernel: "/usr/lib/pericarp/vmlinux".into(),
            initramfs: "/usr/lib/pericarp/initramfs.cpio".into(),
            kernel_cmdline: String::new(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            ready_timeout_seconds: 10,
            start_timeout_seconds: 110,
            guest_timeout_seconds: 60,
            console_limit_kib: 256,
            nested_virtualization: false,
            log: "info".into(),
            defaults: Defaults::default(),
            limits: Limits::default(),
            rate_limits: RateLimits::default(),
        }
    }
}

impl Default for Defaults {
    fn default() -> Defaults {
        Defaults { vcpus: 1, memory_mib: 512 }
    }
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is there but cannot be read.
    #[error("cannot read the configuration {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong type.
    #[error("{path} is not a valid configuration; see docs/operators.md for its keys", path = path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value that cannot work.
    #[error("{path}: {key} {problem}", path = path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl Config {
    /// Reads a configuration file. A missing file is the default configuration if `optional`.
    pub fn load(path: &Path, optional: bool) -> Result<Config, Error> {
        match fs::read_to_string(path) {
            Ok(text) => Config::parse(&text, path),
            Err(error) if optional && error.kind() == io::ErrorKind::NotFound => Ok(Config::default()),
            Err(source) => Err(Error::Read { path: path.into(), source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Config, Error> {
        let config: Config = toml::from_str(text)
            .map_err(|source| Error::Parse { path: path.into(), source: Box::new(source) })?;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), Error> {
        let wrong =
            |key, problem: &str| Err(Error::Value { path: path.into(), key, problem: problem.to_owned() });
        for (key, file) in
            [("run_dir", &self.run_dir), ("kernel", &self.kernel), ("initramfs", &self.initramfs)]
        {
            if !file.is_absolute() {
                return wrong(key, "must be an absolute path");
            }
        }
        // containerd writes the directory into an address, where these end the path.
        if self.run_dir.to_str().is_none_or(|dir| dir.contains([':', '?', '#', '%', ' '])) {
            return wrong("run_dir", "must be UTF-8 without any of `: ? # %` and blanks");
        }
        if self.defaults.vcpus == 0 {
            return wrong("defaults.vcpus", "must be at least 1");
        }
        if self.defaults.memory_mib < MINIMUM_MEMORY_MIB {
            return wrong(
                "defaults.memory_mib",
                &format!("is too small for a guest to start; use at least {MINIMUM_MEMORY_MIB}"),
            );
        }
        if self.ready_timeout_seconds == 0 {
            return wrong("ready_timeout_seconds", "must be at least 1");
        }
        if let Some(mistake) = rate_limits::mistake_in(&self.rate_limits) {
            return wrong("rate_limits", &mistake);
        }
        Ok(())
    }

    /// How long a machine may take until its agent is ready.
    pub fn ready_timeout(&self) -> Duration {
        Duration::from_secs(self.ready_timeout_seconds)
    }

    /// How long that may take altogether, on a node that has no CPU for it.
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout_seconds.max(self.ready_timeout_seconds))
    }

    /// How long a guest may give no answer; `None` if that is no reason to end it.
    pub fn guest_timeout(&self) -> Option<Duration> {
        (self.guest_timeout_seconds > 0).then(|| Duration::from_secs(self.guest_timeout_seconds))
    }

    /// The socket on which containerd calls the controller.
    pub fn controller_socket(&self) -> PathBuf {
        self.run_dir.join("controller.sock")
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use pericarp_vmm::RateLimit;

    use super::*;

    fn parse(text: &str) -> Result<Config, Error> {
        Config::parse(text, Path::new("config.toml"))
    }

    #[test]
    fn an_empty_file_is_the_default_configuration() {
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_key_that_does_not_exist_is_named_in_the_error() {
        let error = parse("run_dri = '/x'").unwrap_err();
        assert!(
            matches!(&error, Error::Parse { source, .. } if source.message().contains("run_dri")),
            "{error:?}"
        );
    }

    #[test]
    fn nested_keys_are_read() {
        let config = parse("[defaults]\nvcpus = 2\n[limits]\nmemory_mib = 4096").unwrap();
        assert_eq!((config.defaults.vcpus, config.defaults.memory_mib), (2, 512));
        assert_eq!(config.limits.memory_mib, Some(4096));
    }

    #[test]
    fn devices_have_no_rate_limits_unless_they_are_set() {
        assert_eq!(parse("").unwrap().rate_limits, RateLimits::default());
        let text = "[rate_limits.net_receive]\nbytes_per_second = 1000\n[rate_limits.fs]\noperations_per_second = 5\n\
                    operations_burst = 7";
        let limits = parse(text).unwrap().rate_limits;
        let expected = RateLimit { bytes_per_second: NonZeroU64::new(1000), ..RateLimit::default() };
        assert_eq!(limits.net_receive, expected);
        assert_eq!(limits.fs.operations_burst, Some(7));
        for text in
            ["[rate_limits.net]", "[rate_limits.disk]\nbytes = 1", "[rate_limits.disk]\nbytes_per_second = 0"]
        {
            assert!(matches!(parse(text), Err(Error::Parse { .. })), "{text}");
        }
        for text in
            ["[rate_limits.disk]\nbytes_burst = 1", "[rate_limits.console]\noperations_per_second = 1"]
        {
            assert!(matches!(parse(text), Err(Error::Value { key: "rate_limits", .. })), "{text}");
        }
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        for text in
            ["run_dir = 'run'", "run_dir = '/a:b'", "[defaults]\nvcpus = 0", "[defaults]\nmemory_mib = 3"]
        {
            assert!(matches!(parse(text), Err(Error::Value { .. })), "{text}");
        }
    }

    #[test]
    fn only_a_missing_default_file_is_no_error() {
        let missing = Path::new("/nonexistent/pericarp.toml");
        assert_eq!(Config::load(missing, true).unwrap(), Config::default());
        assert!(matches!(Config::load(missing, false), Err(Error::Read { .. })));
    }
}
