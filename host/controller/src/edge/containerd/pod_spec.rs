//! A pod's specification, from what CRI was asked for.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use pericarp_protos::{cri, id::SandboxId};
use pericarp_vmm::RateLimits;
use prost::{DecodeError, Message as _};
use serde::Deserialize;
use thiserror::Error;

use super::{
    cri_fields,
    refusals::{self, Refusal},
};
use crate::{
    config::{MINIMUM_MEMORY_MIB, rate_limits},
    host::{
        network::InterfaceStatus,
        process::Process,
        size::{CpuAndMemory, PodResources, Size},
        user_namespace::{IdMap, IdRange, NotOneRange},
    },
    pod::{
        owned_in,
        record::{End, Record, Stage},
        spec::{Dns, PodSpec},
    },
};

/// What a pod is made from, in CRI.
pub const POD_CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";

/// Overrides the number of vCPUs of one pod.
const VCPUS_ANNOTATION: &str = "io.pericarp.vcpus";
/// Overrides the guest memory of one pod, in MiB.
const MEMORY_ANNOTATION: &str = "io.pericarp.memory-mib";
/// Asks for virtual machines inside of the pod: "true" or "false".
const NESTED_ANNOTATION: &str = "io.pericarp.nested-virtualization";
/// How all of Pericarp's annotations begin. One that is not known is refused.
const OWN_ANNOTATIONS: &str = "io.pericarp.";
/// Those that are not for rate limits.
const OTHER_ANNOTATIONS: [&str; 3] = [VCPUS_ANNOTATION, MEMORY_ANNOTATION, NESTED_ANNOTATION];

/// Characters of an annotation that an error quotes.
const QUOTE_MAX: usize = 64;

/// A pod is asked for that cannot be made. Each error names the pod.
#[derive(Debug, Error)]
pub enum PodSpecError {
    #[error("pod sandbox {id:?}: its PodSandboxConfig cannot be read")]
    Unreadable {
        id: String,
        #[source]
        source: DecodeError,
    },
    #[error("{pod}: {what} cannot be given to a pod in a machine of its own: {remedy}")]
    Refused { pod: String, what: String, remedy: &'static str },
    #[error("{pod}: annotation {key} is {value:?}; it must be {expected}")]
    Annotation { pod: String, key: String, value: String, expected: String },
    #[error("{pod}: there is no annotation {key}; those that there are: {known}")]
    NoAnnotation { pod: String, key: String, known: String },
}

/// Reads a `PodSandboxConfig`, and refuses what is not understood or cannot be done. `source_namespace` is
/// containerd's, `netns` empty if there is none.
pub fn pod_spec(
    id: SandboxId,
    source_namespace: &str,
    message: &[u8],
    netns: &str,
) -> Result<PodSpec, PodSpecError> {
    let unreadable = |source| PodSpecError::Unreadable { id: id.to_string(), source };
    let config = cri::PodSandboxConfig::decode(message).map_err(unreadable)?;
    let unknown = cri_fields::unknown_in_message(POD_CONFIG_TYPE, message).map_err(unreadable)?;
    let refusal = unknown.map(|unknown| Refusal::of_unknown(&unknown)).or_else(|| refusals::refusal(&config));
    if let Some(Refusal { what, remedy }) = refusal {
        let pod = of_config(id, source_namespace, netns, &config).title();
        return Err(PodSpecError::Refused { pod, what, remedy });
    }
    let mut spec = of_config(id, source_namespace, netns, &config);
    let annotations = Annotations { pod: &spec.title(), config: &config };
    let (vcpus, memory) = (
        annotations.number(VCPUS_ANNOTATION, 1)?,
        annotations.number(MEMORY_ANNOTATION, MINIMUM_MEMORY_MIB)?,
    );
    let nested = annotations.flag(NESTED_ANNOTATION)?;
    let limits = annotations.rate_limits()?;
    spec.resources.fixed_vcpus = vcpus;
    spec.resources.fixed_memory_mib = memory;
    spec.nested_virtualization = nested;
    spec.rate_limits = limits;
    Ok(spec)
}

/// What a configuration says, except its annotations.
fn of_config(id: SandboxId, source_namespace: &str, netns: &str, config: &cri::PodSandboxConfig) -> PodSpec {
    let metadata = config.metadata.clone().unwrap_or_default();
    let linux = config.linux.clone().unwrap_or_default();
    let dns = config.dns_config.clone().filter(|dns| *dns != cri::DnsConfig::default());
    PodSpec {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        netns: (!netns.is_empty()).then(|| PathBuf::from(netns)),
        hostname: config.hostname.clone(),
        dns: dns.map(|cri::DnsConfig { servers, searches, options }| Dns { servers, searches, options }),
        sysctls: linux.sysctls.into_iter().collect(),
        // What is not a map is refused.
        id_map: id_map(config).ok().flatten(),
        cgroup_parent: linux.cgroup_parent,
        resources: PodResources {
            limits: cpu_and_memory(linux.resources.as_ref()),
            overhead: cpu_and_memory(linux.overhead.as_ref()),
            ..PodResources::default()
        },
        // A message of CRI's is made of what JSON has.
        request: serde_json::to_value(config).unwrap_or_default(),
        ..PodSpec::unknown(id, source_namespace)
    }
}

/// How much may be used. CRI says 0 or less for what has no limit.
pub fn cpu_and_memory(resources: Option<&cri::LinuxContainerResources>) -> CpuAndMemory {
    let positive = |number: i64| u64::try_from(number).ok().filter(|number| *number > 0);
    let Some(resources) = resources else { return CpuAndMemory::default() };
    let (quota, period) = (positive(resources.cpu_quota), positive(resources.cpu_period));
    CpuAndMemory {
        cpu_milli: quota.zip(period).map(|(quota, period)| quota.saturating_mul(1000) / period),
        memory_bytes: positive(resources.memory_limit_in_bytes),
    }
}

/// The ids that a pod asks for; `None` if it is to have the host's.
pub fn id_map(config: &cri::PodSandboxConfig) -> Result<Option<IdMap>, NotOneRange> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    let Some(requested) = options.and_then(|options| options.userns_options.as_ref()) else {
        return Ok(None);
    };
    if requested.mode != cri::NamespaceMode::Pod as i32 {
        return Ok(None);
    }
    let range = |ranges: &[cri::IdMapping]| match ranges {
        [range] if range.length > 0 => {
            Ok(IdRange { inside: range.container_id, outside: range.host_id, length: range.length })
        }
        _ => Err(NotOneRange),
    };
    Ok(Some(IdMap { uids: range(&requested.uids)?, gids: range(&requested.gids)? }))
}

struct Annotations<'a> {
    pod: &'a str,
    config: &'a cri::PodSandboxConfig,
}

impl Annotations<'_> {
    fn number(&self, key: &str, minimum: u32) -> Result<Option<u64>, PodSpecError> {
        let Some(value) = self.config.annotations.get(key) else { return Ok(None) };
        match value.parse::<u64>() {
            Ok(number) if number >= u64::from(minimum) => Ok(Some(number)),
            _ => Err(self.wrong(key, value, format!("a whole number of at least {minimum}"))),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, PodSpecError> {
        match self.config.annotations.get(key).map(String::as_str) {
            None | Some("false") => Ok(false),
            Some("true") => Ok(true),
            Some(value) => Err(self.wrong(key, value, "\"true\" or \"false\"".to_owned())),
        }
    }

    /// What all annotations for rate limits say together.
    fn rate_limits(&self) -> Result<RateLimits, PodSpecError> {
        let mut limits = RateLimits::default();
        for (key, value) in &self.config.annotations {
            if !key.starts_with(OWN_ANNOTATIONS) || OTHER_ANNOTATIONS.contains(&key.as_str()) {
                continue;
            }
            if !key.starts_with(rate_limits::ANNOTATION_PREFIX) {
                return Err(self.unknown(key));
            }
            let Ok(number) = value.parse() else {
                return Err(self.wrong(key, value, format!("a whole number from 1 to {}", u64::MAX)));
            };
            if !rate_limits::set_annotated(&mut limits, key, number) {
                return Err(self.unknown(key));
            }
        }
        Ok(limits)
    }

    /// The error for an annotation of ours that there is not.
    fn unknown(&self, key: &str) -> PodSpecError {
        let known = OTHER_ANNOTATIONS.map(str::to_owned).into_iter().chain(rate_limits::annotations());
        let known = known.collect::<Vec<_>>().join(", ");
        PodSpecError::NoAnnotation { pod: self.pod.to_owned(), key: quoted(key), known }
    }

    fn wrong(&self, key: &str, value: &str, expected: String) -> PodSpecError {
        let (key, value) = (quoted(key), quoted(value));
        PodSpecError::Annotation { pod: self.pod.to_owned(), key, value, expected }
    }
}

/// As much of an annotation as an error quotes.
fn quoted(text: &str) -> String {
    text.chars().take(QUOTE_MAX).collect()
}

/// The record of a pod that a controller before version 0.2 has left, which spoke CRI.
pub fn older_record(text: &[u8], directory: &Path) -> Option<Record> {
    #[derive(Deserialize)]
    struct Version1 {
        version: u64,
        stage: Stage,
        id: SandboxId,
        namespace: String,
        netns: String,
        config: cri::PodSandboxConfig,
        #[serde(default = "SystemTime::now")]
        created_at: SystemTime,
        #[serde(flatten)]
        machine: Process,
        cgroup: Option<PathBuf>,
        #[serde(default)]
        interfaces: Vec<InterfaceStatus>,
        #[serde(default)]
        port_forward: Option<String>,
        #[serde(default)]
        size: Option<Size>,
        #[serde(default)]
        end: Option<End>,
    }
    let old: Version1 = serde_json::from_slice(text).ok()?;
    if old.version != 1 {
        return None;
    }
    let number = |key| old.config.annotations.get(key).and_then(|value| value.parse().ok());
    let mut spec = of_config(old.id, &old.namespace, &old.netns, &old.config);
    spec.created_at = old.created_at;
    spec.resources.fixed_vcpus = number(VCPUS_ANNOTATION);
    spec.resources.fixed_memory_mib = number(MEMORY_ANNOTATION);
    let netns = spec.netns.clone();
    let mut record = Record::new(spec, old.size?);
    record.stage = old.stage;
    record.interfaces = old.interfaces;
    record.port_forward = old.port_forward;
    record.end = old.end;
    record.owned = owned_in(directory, netns, old.cgroup, Some(old.machine));
    Some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec_of(config: &cri::PodSandboxConfig) -> Result<PodSpec, String> {
        pod_spec("abc".parse().unwrap(), "k8s.io", &config.encode_to_vec(), "/run/netns/x")
            .map_err(|error| error.to_string())
    }

    fn named() -> cri::PodSandboxConfig {
        let (name, namespace) = ("web".into(), "default".into());
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata { name, namespace, ..Default::default() }),
            ..Default::default()
        }
    }

    fn annotated(key: &str, value: &str) -> cri::PodSandboxConfig {
        let annotations = [(key.to_owned(), value.to_owned())].into();
        cri::PodSandboxConfig { annotations, ..named() }
    }

    fn with_namespaces(options: cri::NamespaceOption) -> cri::PodSandboxConfig {
        let security_context = cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..cri::LinuxSandboxSecurityContext::default()
        };
        let linux = cri::LinuxPodSandboxConfig {
            security_context: Some(security_context),
            ..cri::LinuxPodSandboxConfig::default()
        };
        cri::PodSandboxConfig { linux: Some(linux), ..named() }
    }

    #[test]
    fn a_pod_is_what_cri_says() {
        let mut config = named();
        config.hostname = "web-0".into();
        config.dns_config = Some(cri::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() });
        let resources = cri::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            memory_limit_in_bytes: 1 << 30,
            ..Default::default()
        };
        config.linux = Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/pod1".into(),
            sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
            resources: Some(resources),
            ..Default::default()
        });
        let spec = spec_of(&config).unwrap();
        assert_eq!(spec.title(), "pod default/web (abc)");
        assert_eq!(spec.hostname, "web-0");
        assert_eq!(spec.dns.unwrap().servers, ["10.96.0.10"]);
        assert_eq!(spec.sysctls["kernel.shm_rmid_forced"], "1");
        assert_eq!(spec.cgroup_parent, "/kubepods/pod1");
        assert_eq!(
            spec.resources.limits,
            CpuAndMemory { cpu_milli: Some(1500), memory_bytes: Some(1 << 30) }
        );
        assert_eq!(spec.resources.overhead, CpuAndMemory::default());
        assert_eq!(spec.netns, Some("/run/netns/x".into()));
        assert_eq!(spec.request["hostname"], "web-0");
    }

    #[test]
    fn what_is_not_said_is_the_nodes() {
        let spec = spec_of(&cri::PodSandboxConfig { dns_config: Some(cri::DnsConfig::default()), ..named() });
        assert_eq!(spec.unwrap().dns, None);
        let spec = pod_spec("abc".parse().unwrap(), "k8s.io", &named().encode_to_vec(), "").unwrap();
        assert_eq!((spec.netns, spec.resources), (None, PodResources::default()));
    }

    #[test]
    fn annotations_fix_sizes_and_allow_machines_and_are_refused_if_they_say_anything_else() {
        assert_eq!(spec_of(&annotated(VCPUS_ANNOTATION, "2")).unwrap().resources.fixed_vcpus, Some(2));
        assert_eq!(
            spec_of(&annotated(MEMORY_ANNOTATION, "300")).unwrap().resources.fixed_memory_mib,
            Some(300)
        );
        for (value, nested) in [("true", true), ("false", false)] {
            assert_eq!(spec_of(&annotated(NESTED_ANNOTATION, value)).unwrap().nested_virtualization, nested);
        }
        for (key, values) in [
            (VCPUS_ANNOTATION, &["", "two", "-1", "0", "1.5"][..]),
            (MEMORY_ANNOTATION, &["63", "1G"]),
            (NESTED_ANNOTATION, &["yes", "True", ""]),
        ] {
            for value in values {
                let error = spec_of(&annotated(key, value)).unwrap_err();
                assert!(error.contains("default/web") && error.contains(key), "{error}");
            }
        }
        let long = spec_of(&annotated(NESTED_ANNOTATION, &"x".repeat(10_000))).unwrap_err();
        assert!(long.len() < 300, "{long}");
    }

    #[test]
    fn annotations_limit_devices_and_are_refused_if_they_say_anything_else() {
        let key = |name: &str| format!("{}{name}", rate_limits::ANNOTATION_PREFIX);
        let limits = spec_of(&annotated(&key("fs.operations-per-second"), "50")).unwrap().rate_limits;
        assert_eq!(limits.fs.operations_per_second.map(u64::from), Some(50));
        assert_eq!(spec_of(&named()).unwrap().rate_limits, RateLimits::default());
        for value in ["", "0", "-1", "1.5", "1M", "18446744073709551616"] {
            let error = spec_of(&annotated(&key("disk.bytes-per-second"), value)).unwrap_err();
            let quoted = format!("disk.bytes-per-second is {value:?}; it must be a whole number from 1");
            assert!(error.contains("default/web") && error.contains(&quoted), "{error}");
        }
        for name in ["disk.bytes_per_second", "console.operations-burst", "tape.bytes-burst", ""] {
            let error = spec_of(&annotated(&key(name), "1")).unwrap_err();
            let (quoted, known) = (format!("no annotation {};", key(name)), key("console.bytes-burst"));
            assert!(error.contains("default/web") && error.contains(&quoted), "{error}");
            assert!(error.contains(&known), "{error}");
        }
    }

    #[test]
    fn a_pod_on_the_hosts_network_is_refused_with_its_name_and_what_to_do() {
        let network = cri::NamespaceMode::Node as i32;
        let error =
            spec_of(&with_namespaces(cri::NamespaceOption { network, ..Default::default() })).unwrap_err();
        assert!(error.contains("default/web") && error.contains("remove hostNetwork"), "{error}");
    }

    #[test]
    fn a_pod_for_which_something_unknown_was_asked_is_refused_with_its_name() {
        let read = |message: &[u8]| pod_spec("abc".parse().unwrap(), "k8s.io", message, "");
        let known = named().encode_to_vec();
        // Field 1000, a number.
        let error = read(&[&known[..], &[0xc0, 0x3e, 1]].concat()).unwrap_err().to_string();
        assert!(error.contains("default/web") && error.contains("number 1000"), "{error}");
        assert!(matches!(read(&[0xff]), Err(PodSpecError::Unreadable { .. })));
    }

    #[test]
    fn a_pod_has_the_one_range_of_ids_that_it_asks_for_or_the_hosts() {
        use cri::NamespaceMode::{Node, Pod};
        fn range(&(container_id, host_id, length): &(u32, u32, u32)) -> cri::IdMapping {
            cri::IdMapping { container_id, host_id, length }
        }
        let config = |mode: cri::NamespaceMode, uids: &[(u32, u32, u32)]| {
            let user = cri::UserNamespace {
                mode: mode as i32,
                uids: uids.iter().map(range).collect(),
                gids: vec![range(&(0, 196_608, 65536))],
            };
            with_namespaces(cri::NamespaceOption { userns_options: Some(user), ..Default::default() })
        };
        let one = [(0, 131_072, 65536)];
        let expected = IdMap {
            uids: IdRange { inside: 0, outside: 131_072, length: 65536 },
            gids: IdRange { inside: 0, outside: 196_608, length: 65536 },
        };
        assert_eq!(id_map(&config(Pod, &one)), Ok(Some(expected)));
        assert_eq!(spec_of(&config(Pod, &one)).unwrap().id_map, Some(expected));
        assert_eq!(id_map(&config(Node, &one)), Ok(None));
        assert_eq!(id_map(&named()), Ok(None));
        for wrong in [&[][..], &[(0, 1, 1), (1, 2, 1)], &[(0, 1, 0)]] {
            assert_eq!(id_map(&config(Pod, wrong)), Err(NotOneRange));
            assert!(spec_of(&config(Pod, wrong)).unwrap_err().contains("this user namespace"));
        }
    }

    #[test]
    fn a_record_of_the_first_controllers_is_read() {
        let text = r#"{"version":1,"stage":"running","id":"x","namespace":"k8s.io","netns":"/run/netns/x",
            "config":{"annotations":{"io.pericarp.vcpus":"2"},"metadata":{"name":"web","namespace":"default"}},
            "pid":7,"start_time":8,"cgroup":"/sys/fs/cgroup/x","size":{"vcpus":2,"memory_mib":300}}"#;
        let record = older_record(text.as_bytes(), Path::new("/run/pericarp/x")).unwrap();
        assert_eq!(record.spec.title(), "pod default/web (x)");
        assert_eq!(record.spec.resources.fixed_vcpus, Some(2));
        assert_eq!(record.owned.machine(), Some(Process { pid: 7, start_time: 8 }));
        assert_eq!(record.owned.cgroup(), Some("/sys/fs/cgroup/x".into()));
        assert_eq!((record.stage, record.size), (Stage::Running, Size { vcpus: 2, memory_mib: 300 }));
        for other in ["", "{}", &text.replace(":1,", ":3,")] {
            assert_eq!(older_record(other.as_bytes(), Path::new("/")), None);
        }
    }
}
