//! How large a pod's machine is.

use pericarp_protos::cri::{LinuxContainerResources, PodSandboxConfig};
use serde::{Deserialize, Serialize};

use crate::{config::Config, cpuset::CpuSet, spec::HUGE_PAGE};

/// Overrides the number of vCPUs of one pod.
pub const VCPUS_ANNOTATION: &str = "io.pericarp.vcpus";

/// Overrides the guest memory of one pod, in MiB.
pub const MEMORY_ANNOTATION: &str = "io.pericarp.memory-mib";

/// Below this a guest does not start, so a pod with a smaller limit gets this much. Its containers'
/// own limits are kept by the guest's cgroups.
pub const MINIMUM_MEMORY_MIB: u32 = 64;

const MIB: u64 = 1 << 20;

/// The size of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// For a pod of which nothing is known.
    pub fn default_of(config: &Config) -> Size {
        Size { vcpus: config.defaults.vcpus, memory_mib: config.defaults.memory_mib }
    }

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
        Size::within(vcpus, memory_mib, config, host)
    }

    /// The size that a running machine should have: what its containers may use together plus the pod's overhead, but no
    /// less memory than at its start, which the guest cannot give back, and no fewer vCPUs while a container has no limit.
    /// What an annotation fixes stays fixed.
    pub fn fitting(
        start: Size,
        pod: &PodSandboxConfig,
        containers: &[Limits],
        config: &Config,
        host: Host,
    ) -> Result<Size, Error> {
        let overhead = pod.linux.as_ref().and_then(|linux| linux.overhead.as_ref());
        let (mut vcpus, mut memory_mib) = (u64::from(start.vcpus), u64::from(start.memory_mib));
        if !pod.annotations.contains_key(VCPUS_ANNOTATION) {
            let milli = containers.iter().filter_map(|container| container.cpu_milli);
            let sum = milli.fold(cpu_milli(overhead).unwrap_or(0), u64::saturating_add).div_ceil(1000).max(1);
            let all =
                !containers.is_empty() && containers.iter().all(|container| container.cpu_milli.is_some());
            vcpus = if all { sum } else { vcpus.max(sum) };
        }
        if !pod.annotations.contains_key(MEMORY_ANNOTATION) {
            let bytes = containers.iter().filter_map(|container| container.memory_bytes);
            let sum = bytes.fold(memory_bytes(overhead).unwrap_or(0), u64::saturating_add).div_ceil(MIB);
            let huge = containers.iter().map(|container| container.huge_page_bytes);
            let huge = huge.fold(0, u64::saturating_add).div_ceil(MIB);
            memory_mib = memory_mib.max(sum).saturating_add(huge);
        }
        Size::within(vcpus, memory_mib, config, host)
    }

    /// The largest machine that a pod may have.
    pub fn most(config: &Config, host: Host) -> Size {
        Size {
            vcpus: u8::try_from(most_vcpus(config, host).0).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(most_memory(config, host).0).unwrap_or(u32::MAX),
        }
    }

    fn within(vcpus: u64, memory_mib: u64, config: &Config, host: Host) -> Result<Size, Error> {
        let (limit, whose) = most_vcpus(config, host);
        if vcpus > limit {
            return Err(Error::Vcpus { asked: vcpus, limit, whose });
        }
        let (limit, whose) = most_memory(config, host);
        if memory_mib > limit {
            return Err(Error::Memory { asked: memory_mib, limit, whose });
        }
        Ok(Size {
            vcpus: u8::try_from(vcpus).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(memory_mib).unwrap_or(u32::MAX),
        })
    }
}

/// An operator's word counts, also if it is more than the host has: vCPUs are shared.
fn most_vcpus(config: &Config, host: Host) -> (u64, Limiter) {
    match config.limits.vcpus {
        Some(limit) => (u64::from(limit), Limiter::Configuration),
        None => (u64::from(host.cpus).min(u64::from(u8::MAX)), Limiter::Host),
    }
}

fn most_memory(config: &Config, host: Host) -> (u64, Limiter) {
    let has = host.memory_mib.min(u64::from(u32::MAX));
    match config.limits.memory_mib.map(u64::from).filter(|limit| *limit < has) {
        Some(limit) => (limit, Limiter::Configuration),
        None => (has, Limiter::Host),
    }
}

/// What one container may use; `None` or empty: as much as there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
    /// Bytes in huge pages, which are not counted as memory.
    pub huge_page_bytes: u64,
    /// CPUs of the host.
    pub cpus: CpuSet,
    /// Memory nodes of the host.
    pub mems: CpuSet,
    /// When the host's kernel is to kill it (`oom_score_adj`).
    pub oom_score_adj: i64,
}

impl Limits {
    /// Reads them from an OCI runtime spec. What cannot be read is no limit: the spec is checked elsewhere.
    pub fn of_spec(spec: &[u8]) -> Limits {
        let spec: serde_json::Value = serde_json::from_slice(spec).unwrap_or_default();
        let resources = &spec["linux"]["resources"];
        let positive = |value: &serde_json::Value| value.as_u64().filter(|number| *number > 0);
        let set = |value: &serde_json::Value| value.as_str().and_then(CpuSet::parse).unwrap_or_default();
        // Of other sizes there are none.
        let huge_pages = resources["hugepageLimits"].as_array().into_iter().flatten();
        let huge_pages = huge_pages.filter(|limit| limit["pageSize"] == HUGE_PAGE);
        let huge_pages = huge_pages.filter_map(|limit| limit["limit"].as_u64()).fold(0, u64::saturating_add);
        let (quota, period) = (positive(&resources["cpu"]["quota"]), positive(&resources["cpu"]["period"]));
        Limits {
            cpu_milli: quota.zip(period).map(|(quota, period)| quota.saturating_mul(1000) / period),
            memory_bytes: positive(&resources["memory"]["limit"]),
            huge_page_bytes: huge_pages,
            cpus: set(&resources["cpu"]["cpus"]),
            mems: set(&resources["cpu"]["mems"]),
            oom_score_adj: spec["process"]["oomScoreAdj"].as_i64().unwrap_or(0),
        }
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
    let pod = cpu_milli(resources)?;
    Some(pod.saturating_add(cpu_milli(overhead).unwrap_or(0)).div_ceil(1000).max(1))
}

fn cpu_milli(resources: Option<&LinuxContainerResources>) -> Option<u64> {
    let resources = resources?;
    let quota = u64::try_from(resources.cpu_quota).ok().filter(|quota| *quota > 0)?;
    let period = u64::try_from(resources.cpu_period).ok().filter(|period| *period > 0)?;
    Some(quota.saturating_mul(1000) / period)
}

/// MiB that pod and overhead may use; `None` if the pod has no limit.
fn memory(
    resources: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Option<u64> {
    let pod = memory_bytes(resources)?;
    let mib = pod.saturating_add(memory_bytes(overhead).unwrap_or(0)).div_ceil(MIB);
    Some(mib.max(u64::from(MINIMUM_MEMORY_MIB)))
}

fn memory_bytes(resources: Option<&LinuxContainerResources>) -> Option<u64> {
    u64::try_from(resources?.memory_limit_in_bytes).ok().filter(|limit| *limit > 0)
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

    fn limited(cpu_milli: u64, mib: u64) -> Limits {
        Limits { cpu_milli: Some(cpu_milli), memory_bytes: Some(mib << 20), ..Limits::default() }
    }

    fn fitted(start: Size, pod: &PodSandboxConfig, containers: &[Limits]) -> Result<Size, Error> {
        Size::fitting(start, pod, containers, &Config::default(), HOST)
    }

    #[test]
    fn a_running_machine_fits_what_its_containers_may_use_together() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let none = PodSandboxConfig::default();
        let two = [limited(1500, 400), limited(1000, 400)];
        assert_eq!(fitted(start, &none, &two), Ok(Size { vcpus: 3, memory_mib: 800 }));
        let with_overhead = pod(None, resources(50_000, 100 << 20), &[]);
        assert_eq!(fitted(start, &with_overhead, &two), Ok(Size { vcpus: 3, memory_mib: 900 }));
        assert_eq!(fitted(start, &none, &[limited(100, 64)]), Ok(Size { vcpus: 1, memory_mib: 512 }));
    }

    #[test]
    fn a_container_without_limits_keeps_what_the_machine_had() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let none = PodSandboxConfig::default();
        assert_eq!(fitted(start, &none, &[]), Ok(start));
        assert_eq!(fitted(start, &none, &[Limits::default(), limited(100, 64)]), Ok(start));
        let large = [Limits::default(), limited(3000, 1024)];
        assert_eq!(fitted(start, &none, &large), Ok(Size { vcpus: 3, memory_mib: 1024 }));
    }

    #[test]
    fn huge_pages_come_on_top_of_all_other_memory() {
        let start = Size { vcpus: 1, memory_mib: 512 };
        let none = PodSandboxConfig::default();
        let huge = Limits { huge_page_bytes: 64 << 20, ..Limits::default() };
        assert_eq!(fitted(start, &none, std::slice::from_ref(&huge)), Ok(Size { vcpus: 1, memory_mib: 576 }));
        let both = [huge.clone(), limited(100, 600), huge];
        assert_eq!(fitted(start, &none, &both), Ok(Size { vcpus: 1, memory_mib: 728 }));
    }

    #[test]
    fn what_an_annotation_fixes_stays_and_the_hosts_size_is_the_limit() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let fixed = pod(None, None, &[(VCPUS_ANNOTATION, "2"), (MEMORY_ANNOTATION, "512")]);
        assert_eq!(fitted(start, &fixed, &[limited(4000, 4096)]), Ok(start));
        let error = fitted(start, &PodSandboxConfig::default(), &[limited(100, 9000)]).unwrap_err();
        assert!(matches!(error, Error::Memory { limit: 8192, .. }));
    }

    #[test]
    fn an_operators_limit_of_vcpus_counts_instead_of_the_hosts_number() {
        let mut config = Config::default();
        config.limits.vcpus = Some(6);
        assert_eq!(Size::most(&config, HOST), Size { vcpus: 6, memory_mib: 8192 });
        assert!(Size::of(&pod(resources(600_000, 0), None, &[]), &config, HOST).is_ok());
        assert!(Size::of(&pod(resources(700_000, 0), None, &[]), &config, HOST).is_err());
    }

    #[test]
    fn limits_are_read_from_a_spec() {
        let spec =
            br#"{"linux":{"resources":{"cpu":{"quota":150000,"period":100000},"memory":{"limit":1048576}}}}"#;
        assert_eq!(
            Limits::of_spec(spec),
            Limits { cpu_milli: Some(1500), memory_bytes: Some(1 << 20), ..Limits::default() }
        );
        let spared = br#"{"process":{"oomScoreAdj":-997}}"#;
        assert_eq!(Limits::of_spec(spared), Limits { oom_score_adj: -997, ..Limits::default() });
        let pinned = br#"{"linux":{"resources":{"cpu":{"cpus":"2-3","mems":"0"},
            "hugepageLimits":[{"pageSize":"2MB","limit":4194304},{"pageSize":"1GB","limit":0}]}}}"#;
        let limits = Limits::of_spec(pinned);
        assert_eq!((limits.cpus.to_string(), limits.mems.to_string()), ("2,3".into(), "0".into()));
        assert_eq!(limits.huge_page_bytes, 4 << 20);
        let without = br#"{"linux":{"resources":{"cpu":{"quota":-1,"period":100000},"memory":{"limit":0}}}}"#;
        assert_eq!(Limits::of_spec(without), Limits::default());
        assert_eq!(Limits::of_spec(b"no spec"), Limits::default());
    }
}
