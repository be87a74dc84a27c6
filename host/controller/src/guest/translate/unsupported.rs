//! Everything that the OCI runtime spec has (version 1.3), and what a guest makes of it.
//!
//! A runtime passes over fields that it does not know, and the guest's knows some that mean nothing there. Whoever
//! asked for one has to be told. [`SPEC`] is the whole table; a field that is not in it is refused by its name.

use serde_json::Value;

use super::{Error, unsupported};

/// What may be in a place of a spec.
#[derive(Debug)]
enum Shape {
    /// Whatever the OCI runtime spec has there: the guest's runtime, or another module here, understands all of it.
    Any,
    /// One of these words.
    Word(&'static [&'static str]),
    /// An object of these fields.
    Fields(&'static [(&'static str, Shape)]),
    /// A list of these.
    List(&'static Shape),
    /// Nothing, for this reason.
    Nothing(&'static str),
}

use Shape::{Any, Fields, List, Nothing, Word};

const OTHER_SYSTEM: &str = "the guest is Linux, in a machine of pericarp's own; remove it from the base spec";
const NO_SUCH_FIELD: &str =
    "neither pericarp nor the OCI runtime spec that it knows has such a field; remove it";
const NO_SUCH_WORD: &str = "the OCI runtime spec that pericarp knows has no such value there";
const HOSTS_DEVICES: &str =
    "it is about devices of the host, which the guest does not have; remove it from the container";
const OLD_CGROUPS: &str = "the guest has cgroup v2, which knows no such limit; remove it";

const SPEC: Shape = Fields(&[
    ("ociVersion", Any),
    ("annotations", Any),
    ("hostname", Any),
    ("domainname", Any),
    ("root", Fields(&[("path", Any), ("readonly", Any)])),
    ("mounts", List(&MOUNT)),
    // Refused by the hooks' names.
    ("hooks", Any),
    ("process", PROCESS),
    ("linux", LINUX),
    ("solaris", Nothing(OTHER_SYSTEM)),
    ("windows", Nothing(OTHER_SYSTEM)),
    ("vm", Nothing(OTHER_SYSTEM)),
    ("zos", Nothing(OTHER_SYSTEM)),
    ("freebsd", Nothing(OTHER_SYSTEM)),
]);

const MOUNT: Shape = Fields(&[
    ("destination", Any),
    ("type", Any),
    ("source", Any),
    ("options", Any),
    ("uidMappings", Any),
    ("gidMappings", Any),
]);

const PROCESS: Shape = Fields(&[
    ("terminal", Any),
    ("consoleSize", Any),
    (
        "user",
        Fields(&[
            ("uid", Any),
            ("gid", Any),
            ("umask", Any),
            ("additionalGids", Any),
            ("username", Nothing("Linux knows users by their numbers; set uid")),
        ]),
    ),
    ("args", Any),
    ("commandLine", Nothing(OTHER_SYSTEM)),
    ("env", Any),
    ("cwd", Any),
    (
        "capabilities",
        Fields(&[
            // As with runc, a capability that does not exist is left out.
            ("bounding", Any),
            ("effective", Any),
            ("inheritable", Any),
            ("permitted", Any),
            ("ambient", Any),
        ]),
    ),
    ("rlimits", List(&Fields(&[("type", Word(RLIMITS)), ("hard", Any), ("soft", Any)]))),
    ("noNewPrivileges", Any),
    ("oomScoreAdj", Any),
    // Of these two, the defaults are dropped and others refused.
    ("apparmorProfile", Any),
    ("selinuxLabel", Any),
    (
        "ioPriority",
        Fields(&[
            ("class", Word(&["IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"])),
            ("priority", Any),
        ]),
    ),
    (
        "scheduler",
        Fields(&[
            ("policy", Word(SCHEDULERS)),
            ("nice", Any),
            ("priority", Any),
            ("flags", List(&Word(SCHEDULER_FLAGS))),
            ("runtime", Any),
            ("deadline", Any),
            ("period", Any),
        ]),
    ),
    (
        "execCPUAffinity",
        Nothing("its numbers are of the host's processors, and the guest has its own; remove it"),
    ),
]);

const LINUX: Shape = Fields(&[
    // Of these five, other modules see to what they hold.
    ("namespaces", List(&Fields(&[("type", Any), ("path", Any)]))),
    ("uidMappings", Any),
    ("gidMappings", Any),
    ("devices", List(&DEVICE)),
    ("intelRdt", Any),
    ("sysctl", Any),
    ("cgroupsPath", Any),
    ("maskedPaths", Any),
    ("readonlyPaths", Any),
    ("mountLabel", Any),
    ("timeOffsets", Any),
    ("resources", RESOURCES),
    ("rootfsPropagation", Word(&["", "private", "rprivate", "slave", "rslave", "shared", "rshared"])),
    ("personality", Fields(&[("domain", Word(&["LINUX", "LINUX32"])), ("flags", Any)])),
    ("netDevices", Nothing("the host's network devices are not in the machine; use a CNI plugin")),
    (
        "memoryPolicy",
        Nothing("its numbers are of the host's memory nodes, and the guest has its own; remove it"),
    ),
    ("seccomp", SECCOMP),
]);

const DEVICE: Shape = Fields(&[
    ("path", Any),
    ("type", Any),
    ("major", Any),
    ("minor", Any),
    ("fileMode", Any),
    ("uid", Any),
    ("gid", Any),
]);

const RESOURCES: Shape = Fields(&[
    (
        "devices",
        List(&Fields(&[
            ("allow", Any),
            ("type", Word(&["", "a", "b", "c", "u", "p"])),
            ("major", Any),
            ("minor", Any),
            ("access", Any),
        ])),
    ),
    (
        "memory",
        Fields(&[
            ("limit", Any),
            ("reservation", Any),
            ("swap", Any),
            ("kernel", Nothing(OLD_CGROUPS)),
            ("kernelTCP", Nothing(OLD_CGROUPS)),
            ("swappiness", Nothing(OLD_CGROUPS)),
            ("disableOOMKiller", Nothing(OLD_CGROUPS)),
            ("useHierarchy", Any),
            ("checkBeforeUpdate", Nothing("the guest does not check; remove it")),
        ]),
    ),
    (
        "cpu",
        Fields(&[
            ("shares", Any),
            ("quota", Any),
            ("burst", Any),
            ("period", Any),
            ("realtimeRuntime", Nothing(OLD_CGROUPS)),
            ("realtimePeriod", Nothing(OLD_CGROUPS)),
            ("cpus", Any),
            ("mems", Any),
            ("idle", Any),
        ]),
    ),
    ("pids", Fields(&[("limit", Any)])),
    (
        "blockIO",
        Fields(&[
            ("weight", Any),
            ("leafWeight", Nothing(OLD_CGROUPS)),
            ("weightDevice", Nothing(HOSTS_DEVICES)),
            ("throttleReadBpsDevice", Nothing(HOSTS_DEVICES)),
            ("throttleWriteBpsDevice", Nothing(HOSTS_DEVICES)),
            ("throttleReadIOPSDevice", Nothing(HOSTS_DEVICES)),
            ("throttleWriteIOPSDevice", Nothing(HOSTS_DEVICES)),
        ]),
    ),
    ("hugepageLimits", List(&Fields(&[("pageSize", Any), ("limit", Any)]))),
    ("network", Nothing(OLD_CGROUPS)),
    ("rdma", Nothing(HOSTS_DEVICES)),
    ("unified", Any),
]);

const SECCOMP: Shape = Fields(&[
    ("defaultAction", Word(ACTIONS)),
    ("defaultErrnoRet", Any),
    ("architectures", List(&Word(ARCHITECTURES))),
    (
        "flags",
        List(&Word(&[
            "SECCOMP_FILTER_FLAG_TSYNC",
            "SECCOMP_FILTER_FLAG_LOG",
            "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
            "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
        ])),
    ),
    ("listenerPath", Nothing(NO_LISTENER)),
    ("listenerMetadata", Nothing(NO_LISTENER)),
    (
        "syscalls",
        List(&Fields(&[
            ("names", Any),
            ("action", Word(ACTIONS)),
            ("errnoRet", Any),
            (
                "args",
                List(&Fields(&[("index", Any), ("value", Any), ("valueTwo", Any), ("op", Word(OPERATORS))])),
            ),
            // Written by some profiles for their readers.
            ("comment", Any),
        ])),
    ),
]);

const NO_LISTENER: &str =
    "the listener is on the host, where the container is not; use a profile without SCMP_ACT_NOTIFY";

const RLIMITS: &[&str] = &[
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
];

const SCHEDULERS: &[&str] =
    &["SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE"];

const SCHEDULER_FLAGS: &[&str] = &[
    "SCHED_RESET_ON_FORK",
    "SCHED_FLAG_RECLAIM",
    "SCHED_FLAG_KEEP_POLICY",
    "SCHED_FLAG_KEEP_PARAMS",
    "SCHED_FLAG_UTIL_CLAMP_MIN",
    "SCHED_FLAG_UTIL_CLAMP_MAX",
];

/// All but `SCMP_ACT_NOTIFY`, which needs a listener.
const ACTIONS: &[&str] = &[
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_TRAP",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_LOG",
];

const OPERATORS: &[&str] = &[
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
];

const ARCHITECTURES: &[&str] = &[
    "SCMP_ARCH_NATIVE",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_S390",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_M68K",
    "SCMP_ARCH_SH",
    "SCMP_ARCH_SHEB",
];

/// Refuses what a guest would pass over. What has another type than it should is malformed, and found elsewhere.
pub(super) fn check(spec: &Value) -> Result<(), Error> {
    check_value(spec, &SPEC, "")
}

fn check_value(value: &Value, shape: &Shape, path: &str) -> Result<(), Error> {
    match (shape, value) {
        (Fields(known), Value::Object(fields)) => fields.iter().try_for_each(|(name, value)| {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match known.iter().find(|(known, _)| known == name) {
                Some((_, shape)) => check_value(value, shape, &path),
                None if asks_for_nothing(value) => Ok(()),
                None => unsupported(format!("the field {path} of its OCI spec"), NO_SUCH_FIELD),
            }
        }),
        (List(shape), Value::Array(list)) => (0..)
            .zip(list)
            .try_for_each(|(index, value)| check_value(value, shape, &format!("{path}[{index}]"))),
        (Word(known), Value::String(word)) if !known.contains(&word.as_str()) => {
            let remedy = if word == "SCMP_ACT_NOTIFY" { NO_LISTENER } else { NO_SUCH_WORD };
            unsupported(format!("{word:?} as {path} of its OCI spec"), remedy)
        }
        (Nothing(remedy), value) if !asks_for_nothing(value) => {
            unsupported(format!("{path} of its OCI spec"), remedy)
        }
        _ => Ok(()),
    }
}

/// Whether a field might as well not be there.
fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Specs with one thing in them that is to be refused, and what is said then, one for each place of the table.
    fn refused(shape: &Shape, path: &str) -> Vec<(Value, String)> {
        match shape {
            Any => Vec::new(),
            Word(_) => {
                vec![(json!("SIDEWAYS"), format!("\"SIDEWAYS\" as {path} of its OCI spec"))]
            }
            Nothing(_) => vec![(json!("asked for"), format!("{path} of its OCI spec"))],
            List(shape) => {
                let inside = refused(shape, &format!("{path}[0]"));
                inside.into_iter().map(|(value, what)| (json!([value]), what)).collect()
            }
            Fields(known) => {
                let below =
                    |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
                let unknown =
                    (json!({ "hologram": true }), format!("the field {} of its OCI spec", below("hologram")));
                let inside = known.iter().flat_map(|(name, shape)| {
                    refused(shape, &below(name))
                        .into_iter()
                        .map(move |(value, what)| (json!({ *name: value }), what))
                });
                inside.chain([unknown]).collect()
            }
        }
    }

    #[test]
    fn whatever_a_guest_would_pass_over_is_refused_with_its_place() {
        let rows = refused(&SPEC, "");
        assert!(rows.len() > 50, "{}", rows.len());
        for (spec, expected) in rows {
            match check(&spec) {
                Err(Error::Unsupported { what, .. }) => assert_eq!(what, expected),
                other => panic!("{spec}: {other:?}"),
            }
        }
    }

    /// The places of the table that have an enumeration's values, as the OCI runtime spec has them.
    #[test]
    fn each_word_of_an_enumeration_is_known_by_its_place() {
        for (place, known) in [
            ("/process/rlimits/0/type", "RLIMIT_NOFILE"),
            ("/process/ioPriority/class", "IOPRIO_CLASS_BE"),
            ("/process/scheduler/policy", "SCHED_BATCH"),
            ("/process/scheduler/flags/0", "SCHED_RESET_ON_FORK"),
            ("/linux/rootfsPropagation", "rslave"),
            ("/linux/personality/domain", "LINUX32"),
            ("/linux/resources/devices/0/type", "c"),
            ("/linux/seccomp/defaultAction", "SCMP_ACT_ERRNO"),
            ("/linux/seccomp/architectures/0", "SCMP_ARCH_X86_64"),
            ("/linux/seccomp/flags/0", "SECCOMP_FILTER_FLAG_LOG"),
            ("/linux/seccomp/syscalls/0/action", "SCMP_ACT_ALLOW"),
            ("/linux/seccomp/syscalls/0/args/0/op", "SCMP_CMP_MASKED_EQ"),
        ] {
            let with = |word: &str| {
                place.rsplit('/').filter(|part| !part.is_empty()).fold(json!(word), |value, part| {
                    if part == "0" { json!([value]) } else { json!({ part: value }) }
                })
            };
            check(&with(known)).unwrap();
            let error = check(&with("SIDEWAYS")).unwrap_err().to_string();
            let name = place[1..].replace("/0", "[0]").replace('/', ".");
            assert!(error.contains(&name) && error.contains("SIDEWAYS"), "{error}");
        }
    }

    #[test]
    fn a_profile_that_tells_somebody_on_the_host_is_refused() {
        let notify = json!({ "linux": { "seccomp": { "syscalls": [{ "action": "SCMP_ACT_NOTIFY" }] } } });
        let error = check(&notify).unwrap_err().to_string();
        assert!(error.contains("syscalls[0].action") && error.contains("listener"), "{error}");
    }

    #[test]
    fn what_asks_for_nothing_is_not_refused() {
        for nothing in [json!(null), json!(false), json!(0), json!(""), json!([]), json!({})] {
            check(&json!({ "hologram": nothing, "windows": nothing })).unwrap();
        }
    }
}
