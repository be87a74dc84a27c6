//! How large a pod's machine is.

use pericarp_protos::cri::{LinuxContainerResources, PodSandboxConfig};

use crate::config::Config;

/// Overrides the number of vCPUs of one pod.
pub const VCPUS_ANNOTATION: &str = "io.pericarp.vcpus";

/// Overrides the guest memory of one pod, in MiB.
pub const MEMORY_ANNOTATION: &str = "io.pericarp.memory-mib";

/// Below this a guest does not start, so a pod with a smaller limit gets this much. Its containers'
/// own limits are kept by the guest's cgroups.
pub const MINIMUM_MEMORY_MIB: u32 = 64;

const MIB: u64 = 1 << 20;

/// The size of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// CPUs that the controller may run on.
    pub cpus: u32,
    /// All memory in MiB.
    pub memory_mib: u64,
}

impl Host {
    /// Asks the kernel.
    pub fn read() -> Host {
        let info = rustix::system::sysinfo();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Host {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: info.totalram.saturating_mul(u64::from(info.mem_unit)) / MIB,
        }
    }
}

/// Why a pod cannot have the machine it asks for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An annotation that is not a number.
    #[error("annotation {key} is {value:?}; it must be a whole number of at least {minimum}")]
    Annotation {
        /// The annotation.
        key: &'static str,
        /// What the pod has there.
        value: String,
        /// The least that is accepted.
        minimum: u32,
    },
    /// More vCPUs than allowed.
    #[error("the pod asks for {asked} vCPUs, and {limit} are the most that {whose} allows; ask for fewer")]
    Vcpus {
        /// What the pod asks for.
        asked: u64,
        /// The limit.
        limit: u64,
        /// Whose limit it is.
        whose: Limiter,
    },
    /// More memory than allowed.
    #[error(
        "the pod asks for {asked} MiB of memory, and {limit} MiB are the most that {whose} allows; ask for less"
    )]
    Memory {
        /// What the pod asks for.
        asked: u64,
        /// The limit.
        limit: u64,
        /// Whose limit it is.
        whose: Limiter,
    },
}

/// Whose limit was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limiter {
    /// The host's hardware.
    Host,
    /// `limits` in the configuration.
    Configuration,
}

impl std::fmt::Display for Limiter {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Limiter::Host => "this host",
            Limiter::Configuration => "the controller's configuration",
        })
    }
}

impl Size {
    /// The size for one pod: its annotations, else its resources plus overhead, else the defaults.
    pub fn of(pod: &PodSandboxConfig, config: &Config, host: Host) -> Result<Size, Error> {
        let linux = pod.linux.as_ref();
        let resources = linux.and_then(|linux| linux.resources.as_ref());
        let overhead = linux.and_then(|linux| linux.overhead.as_ref());
        let vcpus = match annotation(pod, VCPUS_ANNOTATION, 1)? {
            Some(vcpus) => vcpus,
            None => cpus(resources, overhead).unwrap_or(u64::from(config.defaults.vcpus)),
        };
        let memory_mib = match annotation(pod, MEMORY_ANNOTATION, MINIMUM_MEMORY_MIB)? {
            Some(memory) => memory,
            None => memory(resources, overhead).unwrap_or(u64::from(config.defaults.memory_mib)),
        };
        let limits = config.limits;
        for (limit, whose) in [
            (Some(u64::from(host.cpus).min(u64::from(u8::MAX))), Limiter::Host),
            (limits.vcpus.map(u64::from), Limiter::Configuration),
        ] {
            if let Some(limit) = limit.filter(|limit| vcpus > *limit) {
                return Err(Error::Vcpus { asked: vcpus, limit, whose });
            }
        }
        for (limit, whose) in [
            (Some(host.memory_mib.min(u64::from(u32::MAX))), Limiter::Host),
            (limits.memory_mib.map(u64::from), Limiter::Configuration),
        ] {
            if let Some(limit) = limit.filter(|limit| memory_mib > *limit) {
                return Err(Error::Memory { asked: memory_mib, limit, whose });
            }
        }
        Ok(Size {
            vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(memory_mib).unwrap_or(u32::MAX),
        })
    }
}

fn annotation(pod: &PodSandboxConfig, key: &'static str, minimum: u32) -> Result<Option<u64>, Error> {
    let Some(value) = pod.annotations.get(key) else { return Ok(None) };
    match value.parse::<u64>() {
        Ok(number) if number >= u64::from(minimum) => Ok(Some(number)),
        _ => Err(Error::Annotation { key, value: value.chars().take(64).collect(), minimum }),
    }
}

/// Whole CPUs for the CPU time that pod and overhead may use; `None` if the pod has no limit.
fn cpus(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Option<u64> {
    let milli = |resources: Option<&LinuxContainerResources>| {
        let resources = resources?;
        let quota = u64::try_from(resources.cpu_quota).ok().filter(|quota| *quota > 0)?;
        let period = u64::try_from(resources.cpu_period).ok().filter(|period| *period > 0)?;
        Some(quota.saturating_mul(1000) / period)
    };
    let pod = milli(resources)?;
    Some(pod.saturating_add(milli(overhead).unwrap_or(0)).div_ceil(1000).max(1))
}

/// MiB that pod and overhead may use; `None` if the pod has no limit.
fn memory(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Option<u64> {
    let bytes = |resources: Option<&LinuxContainerResources>| {
        u64::try_from(resources?.memory_limit_in_bytes).ok().filter(|limit| *limit > 0)
    };
    let pod = bytes(resources)?;
    let mib = pod.saturating_add(bytes(overhead).unwrap_or(0)).div_ceil(MIB);
    Some(mib.max(u64::from(MINIMUM_MEMORY_MIB)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pericarp_protos::cri::LinuxPodSandboxConfig;

    const HOST: Host = Host { cpus: 4, memory_mib: 8192 };

    #[expect(clippy::unnecessary_wraps, reason = "the other value is `None`")]
    fn resources(quota: i64, memory: i64) -> Option<LinuxContainerResources> {
        Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: quota,
            memory_limit_in_bytes: memory,
            ..Default::default()
        })
    }

    fn pod(
        resources: Option<LinuxContainerResources>,
        overhead: Option<LinuxContainerResources>,
        annotations: &[(&str, &str)],
    ) -> PodSandboxConfig {
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig { resources, overhead, ..Default::default() }),
            annotations: annotations.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            ..Default::default()
        }
    }

    fn size(pod: &PodSandboxConfig) -> Result<Size, Error> {
        Size::of(pod, &Config::default(), HOST)
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_defaults() {
        let expected = Size { vcpus: 1, memory_mib: 512 };
        assert_eq!(size(&PodSandboxConfig::default()), Ok(expected));
        assert_eq!(size(&pod(resources(0, 0), resources(0, 0), &[])), Ok(expected));
    }

    #[test]
    fn overhead_is_added_and_cpus_are_rounded_up() {
        let pod = pod(resources(150_000, 100 << 20), resources(60_000, (28 << 20) + 1), &[]);
        assert_eq!(size(&pod), Ok(Size { vcpus: 3, memory_mib: 129 }));
    }

    #[test]
    fn overhead_alone_does_not_make_a_machine_small() {
        let pod = pod(None, resources(10_000, 32 << 20), &[]);
        assert_eq!(size(&pod), Ok(Size { vcpus: 1, memory_mib: 512 }));
    }

    #[test]
    fn a_tiny_limit_still_lets_the_guest_start() {
        assert_eq!(size(&pod(resources(1_000, 1 << 20), None, &[])), Ok(Size { vcpus: 1, memory_mib: 64 }));
    }

    #[test]
    fn annotations_win() {
        let pod =
            pod(resources(100_000, 1 << 30), None, &[(VCPUS_ANNOTATION, "2"), (MEMORY_ANNOTATION, "300")]);
        assert_eq!(size(&pod), Ok(Size { vcpus: 2, memory_mib: 300 }));
    }

    #[test]
    fn an_annotation_that_is_no_number_is_refused() {
        for value in ["", "two", "-1", "0", "1.5"] {
            let pod = pod(None, None, &[(VCPUS_ANNOTATION, value)]);
            assert!(matches!(size(&pod), Err(Error::Annotation { .. })), "{value}");
        }
    }

    #[test]
    fn what_the_host_does_not_have_is_refused_with_both_numbers() {
        let error = size(&pod(None, None, &[(MEMORY_ANNOTATION, "9000")])).unwrap_err();
        assert_eq!(error, Error::Memory { asked: 9000, limit: 8192, whose: Limiter::Host });
        assert!(error.to_string().contains("9000") && error.to_string().contains("8192"));
        let error = size(&pod(resources(500_000, 0), None, &[])).unwrap_err();
        assert_eq!(error, Error::Vcpus { asked: 5, limit: 4, whose: Limiter::Host });
    }

    #[test]
    fn the_configurations_limits_hold_too() {
        let mut config = Config::default();
        config.limits.memory_mib = Some(256);
        let error = Size::of(&PodSandboxConfig::default(), &config, HOST).unwrap_err();
        assert_eq!(error, Error::Memory { asked: 512, limit: 256, whose: Limiter::Configuration });
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let pod = pod(resources(i64::MAX, i64::MAX), resources(i64::MAX, i64::MAX), &[]);
        assert!(size(&pod).is_err());
    }
}
