//! How large a pod's machine is.

use serde::{Deserialize, Serialize};

use super::cpuset::CpuSet;
use crate::config::{Config, MINIMUM_MEMORY_MIB};

/// The OCI runtime spec's name for the only size of huge pages that guests have.
pub const HUGE_PAGE: &str = "2MB";

const MIB: u64 = 1 << 20;

/// The size of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
}

/// How much of two things something may use; `None`: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuAndMemory {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// What a pod asks of its machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodResources {
    /// What its containers may use together.
    pub limits: CpuAndMemory,
    /// What the machine itself needs, by the pod's `RuntimeClass`.
    pub overhead: CpuAndMemory,
    /// A number of vCPUs that stays, whatever the containers may use.
    pub fixed_vcpus: Option<u64>,
    /// An amount of memory that stays, whatever the containers may use.
    pub fixed_memory_mib: Option<u64>,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCapacity {
    /// CPUs that the controller may run on.
    pub cpus: u32,
    /// All memory in MiB.
    pub memory_mib: u64,
}

impl HostCapacity {
    /// Asks the kernel.
    pub fn read() -> Self {
        let info = rustix::system::sysinfo();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: info.totalram.saturating_mul(u64::from(info.mem_unit)) / MIB,
        }
    }
}

/// Why a pod cannot have the machine it asks for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
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
    /// The size for a pod of which nothing is known.
    pub fn default_of(config: &Config) -> Self {
        Self { vcpus: config.defaults.vcpus, memory_mib: config.defaults.memory_mib }
    }

    /// The size with which a pod's machine starts.
    pub fn at_start(pod: &PodResources, config: &Config, host: HostCapacity) -> Result<Self, Error> {
        let vcpus = pod.fixed_vcpus.or_else(|| pod.cpus()).unwrap_or(u64::from(config.defaults.vcpus));
        let memory = pod.fixed_memory_mib.or_else(|| pod.memory_mib());
        Self::within(vcpus, memory.unwrap_or(u64::from(config.defaults.memory_mib)), config, host)
    }

    /// The size that a running machine should have: what its containers may use together plus the pod's overhead,
    /// except that it has no less memory than at its start, which the guest cannot give back, and no fewer vCPUs while
    /// a container has no limit. What an annotation fixes stays fixed. `pod` is what the pod asks for now.
    pub fn fitting(
        start: Self,
        pod: &PodResources,
        containers: &[Limits],
        config: &Config,
        host: HostCapacity,
    ) -> Result<Self, Error> {
        let vcpus = if pod.fixed_vcpus.is_some() {
            u64::from(start.vcpus)
        } else {
            let milli = containers.iter().filter_map(|container| container.cpu_milli);
            let sum = milli.fold(pod.overhead.cpu_milli.unwrap_or(0), u64::saturating_add);
            let sum = sum.div_ceil(1000).max(1);
            let all =
                !containers.is_empty() && containers.iter().all(|container| container.cpu_milli.is_some());
            if all { sum } else { pod.cpus().unwrap_or(u64::from(start.vcpus)).max(sum) }
        };
        let memory_mib = if pod.fixed_memory_mib.is_some() {
            u64::from(start.memory_mib)
        } else {
            let bytes = containers.iter().filter_map(|container| container.memory_bytes);
            let sum = bytes.fold(pod.overhead.memory_bytes.unwrap_or(0), u64::saturating_add).div_ceil(MIB);
            let huge = containers.iter().map(|container| container.huge_page_bytes);
            let huge = huge.fold(0, u64::saturating_add).div_ceil(MIB);
            let least = u64::from(start.memory_mib).max(pod.memory_mib().unwrap_or(0));
            least.max(sum).saturating_add(huge)
        };
        Self::within(vcpus, memory_mib, config, host)
    }

    /// The largest machine that a pod may have.
    pub fn most(config: &Config, host: HostCapacity) -> Size {
        Size {
            vcpus: u8::try_from(most_vcpus(config, host).0).unwrap_or(u8::MAX),
            memory_mib: u32::try_from(most_memory(config, host).0).unwrap_or(u32::MAX),
        }
    }

    fn within(vcpus: u64, memory_mib: u64, config: &Config, host: HostCapacity) -> Result<Size, Error> {
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
fn most_vcpus(config: &Config, host: HostCapacity) -> (u64, Limiter) {
    match config.limits.vcpus {
        Some(limit) => (u64::from(limit), Limiter::Configuration),
        None => (u64::from(host.cpus).min(u64::from(u8::MAX)), Limiter::Host),
    }
}

fn most_memory(config: &Config, host: HostCapacity) -> (u64, Limiter) {
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

impl PodResources {
    /// Whole CPUs for the CPU time that pod and overhead may use; `None` if the pod has no limit.
    fn cpus(&self) -> Option<u64> {
        let pod = self.limits.cpu_milli?;
        Some(pod.saturating_add(self.overhead.cpu_milli.unwrap_or(0)).div_ceil(1000).max(1))
    }

    /// MiB that pod and overhead may use; `None` if the pod has no limit.
    fn memory_mib(&self) -> Option<u64> {
        let pod = self.limits.memory_bytes?;
        let mib = pod.saturating_add(self.overhead.memory_bytes.unwrap_or(0)).div_ceil(MIB);
        Some(mib.max(u64::from(MINIMUM_MEMORY_MIB)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: HostCapacity = HostCapacity { cpus: 4, memory_mib: 8192 };
    const NOTHING: CpuAndMemory = CpuAndMemory { cpu_milli: None, memory_bytes: None };

    fn uses(cpu_milli: u64, memory_bytes: u64) -> CpuAndMemory {
        CpuAndMemory { cpu_milli: Some(cpu_milli), memory_bytes: Some(memory_bytes) }
    }

    fn pod(limits: CpuAndMemory, overhead: CpuAndMemory) -> PodResources {
        PodResources { limits, overhead, ..PodResources::default() }
    }

    fn fixed(vcpus: u64, memory_mib: u64) -> PodResources {
        PodResources {
            fixed_vcpus: Some(vcpus),
            fixed_memory_mib: Some(memory_mib),
            ..PodResources::default()
        }
    }

    fn size(pod: &PodResources) -> Result<Size, Error> {
        Size::at_start(pod, &Config::default(), HOST)
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_defaults() {
        let expected = Size { vcpus: 1, memory_mib: 512 };
        assert_eq!(size(&PodResources::default()), Ok(expected));
    }

    #[test]
    fn overhead_is_added_and_cpus_are_rounded_up() {
        let pod = pod(uses(1500, 100 << 20), uses(600, (28 << 20) + 1));
        assert_eq!(size(&pod), Ok(Size { vcpus: 3, memory_mib: 129 }));
    }

    #[test]
    fn overhead_alone_does_not_make_a_machine_small() {
        let pod = pod(NOTHING, uses(100, 32 << 20));
        assert_eq!(size(&pod), Ok(Size { vcpus: 1, memory_mib: 512 }));
    }

    #[test]
    fn a_tiny_limit_still_lets_the_guest_start() {
        assert_eq!(size(&pod(uses(10, 1 << 20), NOTHING)), Ok(Size { vcpus: 1, memory_mib: 64 }));
    }

    #[test]
    fn fixed_numbers_win() {
        let pod = PodResources { limits: uses(1000, 1 << 30), ..fixed(2, 300) };
        assert_eq!(size(&pod), Ok(Size { vcpus: 2, memory_mib: 300 }));
    }

    #[test]
    fn what_the_host_does_not_have_is_refused_with_both_numbers() {
        let error = size(&fixed(1, 9000)).unwrap_err();
        assert_eq!(error, Error::Memory { asked: 9000, limit: 8192, whose: Limiter::Host });
        assert!(error.to_string().contains("9000") && error.to_string().contains("8192"));
        let error = size(&pod(CpuAndMemory { cpu_milli: Some(5000), ..NOTHING }, NOTHING)).unwrap_err();
        assert_eq!(error, Error::Vcpus { asked: 5, limit: 4, whose: Limiter::Host });
    }

    #[test]
    fn the_configurations_limits_hold_too() {
        let mut config = Config::default();
        config.limits.memory_mib = Some(256);
        let error = Size::at_start(&PodResources::default(), &config, HOST).unwrap_err();
        assert_eq!(error, Error::Memory { asked: 512, limit: 256, whose: Limiter::Configuration });
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let pod = pod(uses(u64::MAX, u64::MAX), uses(u64::MAX, u64::MAX));
        assert!(size(&pod).is_err());
    }

    fn limited(cpu_milli: u64, mib: u64) -> Limits {
        Limits { cpu_milli: Some(cpu_milli), memory_bytes: Some(mib << 20), ..Limits::default() }
    }

    fn fitted(start: Size, pod: &PodResources, containers: &[Limits]) -> Result<Size, Error> {
        Size::fitting(start, pod, containers, &Config::default(), HOST)
    }

    #[test]
    fn a_running_machine_fits_what_its_containers_may_use_together() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let none = PodResources::default();
        let two = [limited(1500, 400), limited(1000, 400)];
        assert_eq!(fitted(start, &none, &two), Ok(Size { vcpus: 3, memory_mib: 800 }));
        let with_overhead = pod(NOTHING, uses(500, 100 << 20));
        assert_eq!(fitted(start, &with_overhead, &two), Ok(Size { vcpus: 3, memory_mib: 900 }));
        assert_eq!(fitted(start, &none, &[limited(100, 64)]), Ok(Size { vcpus: 1, memory_mib: 512 }));
    }

    #[test]
    fn a_container_without_limits_keeps_what_the_machine_had() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let none = PodResources::default();
        assert_eq!(fitted(start, &none, &[]), Ok(start));
        assert_eq!(fitted(start, &none, &[Limits::default(), limited(100, 64)]), Ok(start));
        let large = [Limits::default(), limited(3000, 1024)];
        assert_eq!(fitted(start, &none, &large), Ok(Size { vcpus: 3, memory_mib: 1024 }));
    }

    #[test]
    fn a_pod_that_is_given_more_has_it_and_loses_processors_but_no_memory_with_less() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let unlimited = [Limits::default()];
        let with = |limits| fitted(start, &pod(limits, NOTHING), &unlimited);
        assert_eq!(with(uses(4000, 1 << 30)), Ok(Size { vcpus: 4, memory_mib: 1024 }));
        assert_eq!(with(uses(1000, 256 << 20)), Ok(Size { vcpus: 1, memory_mib: 512 }));
        assert!(matches!(with(uses(5000, 1 << 30)), Err(Error::Vcpus { asked: 5, limit: 4, .. })));
    }

    #[test]
    fn huge_pages_come_on_top_of_all_other_memory() {
        let start = Size { vcpus: 1, memory_mib: 512 };
        let none = PodResources::default();
        let huge = Limits { huge_page_bytes: 64 << 20, ..Limits::default() };
        assert_eq!(fitted(start, &none, std::slice::from_ref(&huge)), Ok(Size { vcpus: 1, memory_mib: 576 }));
        let both = [huge.clone(), limited(100, 600), huge];
        assert_eq!(fitted(start, &none, &both), Ok(Size { vcpus: 1, memory_mib: 728 }));
    }

    #[test]
    fn what_an_annotation_fixes_stays_and_the_hosts_size_is_the_limit() {
        let start = Size { vcpus: 2, memory_mib: 512 };
        let fixed = fixed(2, 512);
        assert_eq!(fitted(start, &fixed, &[limited(4000, 4096)]), Ok(start));
        let error = fitted(start, &PodResources::default(), &[limited(100, 9000)]).unwrap_err();
        assert!(matches!(error, Error::Memory { limit: 8192, .. }));
    }

    #[test]
    fn an_operators_limit_of_vcpus_counts_instead_of_the_hosts_number() {
        let mut config = Config::default();
        config.limits.vcpus = Some(6);
        assert_eq!(Size::most(&config, HOST), Size { vcpus: 6, memory_mib: 8192 });
        assert!(Size::at_start(&fixed(6, 512), &config, HOST).is_ok());
        assert!(Size::at_start(&fixed(7, 512), &config, HOST).is_err());
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
