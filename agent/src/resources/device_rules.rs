//! Which devices a container's processes may open and create nodes of: a BPF program at its cgroup.
//!
//! The rules mean what they mean to runc (`opencontainers/cgroups`, `devices/emulator.go`, which imitates cgroup v1). A
//! rule for all devices discards the rules before it. Any other rule adds to, or subtracts from, the access to exactly
//! the devices that it names. libcgroups is built without its own programs (feature `cgroupsv2_devices`), because they
//! would need libbpf.

use std::{collections::BTreeMap, fs::File, io, path::Path};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use pericarp_bpf::{self as bpf, Instruction, Register};

/// Kinds of access (`BPF_DEVCG_ACC_*`).
const MKNOD: u8 = 1;
const READ: u8 = 2;
const WRITE: u8 = 4;
const ALL: u8 = MKNOD | READ | WRITE;

/// How many rules a container may have. A container of kubelet's has about ten, and one for each of its devices.
const RULES_MAX: usize = 1024;

/// What every container may use whatever its rules say, as with runc (`libcontainer/specconv`, `AllowedDevices`): it
/// may create any node, and use null, zero, full, random, urandom, tty, pseudo-terminals, and network tunnels.
const ALLOWED: [(Device, u8); 11] = [
    (Device { kind: Kind::Character, major: None, minor: None }, MKNOD),
    (Device { kind: Kind::Block, major: None, minor: None }, MKNOD),
    (character(1, 3), ALL),
    (character(1, 5), ALL),
    (character(1, 7), ALL),
    (character(1, 8), ALL),
    (character(1, 9), ALL),
    (character(5, 0), ALL),
    (character(5, 2), ALL),
    (Device { kind: Kind::Character, major: Some(136), minor: None }, ALL),
    (character(10, 200), ALL),
];

/// The guest's console, on which the agent logs. containerd allows it to every container, because a container's
/// /dev/console is a pseudo-terminal of its own.
const CONSOLE: Device = character(5, 1);

/// Why device rules are refused.
#[derive(Debug, thiserror::Error)]
pub enum DeviceRulesError {
    /// A rule is not of the form that the OCI runtime spec gives it.
    #[error("the device rule {rule:?} has {problem}")]
    Malformed {
        /// The rule, as the spec has it.
        rule: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A rule denies a part of what a rule with wildcards allows. runc refuses this as well.
    #[error(
        "the device rule {0:?} is an exception to one with wildcards, which there cannot be; name the devices \
         one by one"
    )]
    PartialException(String),
    /// There are more than [`RULES_MAX`] rules.
    #[error("{0} device rules are more than the {RULES_MAX} that a container can have")]
    TooMany(usize),
}

/// The type of a device (`BPF_DEVCG_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Block = 1,
    Character = 2,
}

/// One device, or many: a missing number stands for any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Device {
    kind: Kind,
    major: Option<i32>,
    minor: Option<i32>,
}

const fn character(major: i32, minor: i32) -> Device {
    Device { kind: Kind::Character, major: Some(major), minor: Some(minor) }
}

impl Device {
    /// The patterns with more wildcards that include this one.
    fn wider_patterns(self) -> impl Iterator<Item = Device> {
        let wildcards = [(None, self.minor), (self.major, None), (None, None)];
        wildcards
            .into_iter()
            .map(move |(major, minor)| Device { major, minor, ..self })
            .filter(move |wider| *wider != self)
    }
}

/// What a container may use.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DeviceRules {
    /// Whether the container may use the devices that are not exceptions.
    all: bool,
    exceptions: BTreeMap<Device, u8>,
}

impl DeviceRules {
    /// Evaluates `linux.resources.devices`. Without any rule, a container may use only what every container may use.
    pub fn new(rules: &[LinuxDeviceCgroup]) -> Result<Self, DeviceRulesError> {
        if rules.len() > RULES_MAX {
            return Err(DeviceRulesError::TooMany(rules.len()));
        }
        let mut result = Self::default();
        for rule in rules {
            result.add(rule)?;
        }
        if !result.all {
            for (device, access) in ALLOWED {
                *result.exceptions.entry(device).or_default() |= access;
            }
        }
        Ok(result)
    }

    fn add(&mut self, rule: &LinuxDeviceCgroup) -> Result<(), DeviceRulesError> {
        let malformed = |problem| DeviceRulesError::Malformed { rule: rule.to_string(), problem };
        let access = access(rule.access().as_deref().unwrap_or_default()).map_err(malformed)?;
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => {
                *self = Self { all: rule.allow(), exceptions: BTreeMap::new() };
                return Ok(());
            }
            Some(LinuxDeviceType::B) => Kind::Block,
            Some(LinuxDeviceType::C) => Kind::Character,
            Some(_) => return Err(malformed("a type other than a, b and c")),
        };
        let device = Device {
            kind,
            major: number(rule.major()).map_err(malformed)?,
            minor: number(rule.minor()).map_err(malformed)?,
        };
        if rule.allow() != self.all {
            *self.exceptions.entry(device).or_default() |= access;
            return Ok(());
        }
        if device
            .wider_patterns()
            .any(|wider| self.exceptions.get(&wider).is_some_and(|other| other & access != 0))
        {
            return Err(DeviceRulesError::PartialException(rule.to_string()));
        }
        if let Some(left) = self.exceptions.get_mut(&device) {
            *left &= !access;
        }
        self.exceptions.retain(|_, access| *access != 0);
        Ok(())
    }

    /// Whether every device is allowed, as it is to a privileged container.
    pub fn allows_all(&self) -> bool {
        self.all && self.exceptions.is_empty()
    }

    /// Attaches the rules to a cgroup. They apply to its processes and those below it as long as the cgroup exists.
    pub fn apply(&self, cgroup: &Path) -> io::Result<()> {
        let program = bpf::load(bpf::Kind::CgroupDevice, "pericarp_device", &self.program())?;
        bpf::attach_to_cgroup(program, File::open(cgroup)?)
    }

    /// The program, which returns 1 for an access that is allowed and 0 otherwise (`struct bpf_cgroup_dev_ctx`).
    fn program(&self) -> Vec<Instruction> {
        const CONTEXT: Register = 1;
        let mut program = vec![
            Instruction::load_word(KIND, CONTEXT, 0),
            Instruction::copy(ACCESS, KIND),
            Instruction::and(KIND, 0xffff),
            Instruction::shift_right(ACCESS, 16),
            Instruction::load_word(MAJOR, CONTEXT, 4),
            Instruction::load_word(MINOR, CONTEXT, 8),
        ];
        if !self.all {
            program.extend(clause(CONSOLE, READ | WRITE, false));
        }
        for (device, access) in &self.exceptions {
            program.extend(clause(*device, *access, !self.all));
        }
        program.extend(verdict(self.all));
        program
    }
}

/// The registers into which the program loads the access that it has to decide on.
const KIND: Register = 2;
const ACCESS: Register = 3;
const MAJOR: Register = 4;
const MINOR: Register = 5;

/// Ends the program if the access concerns the device: with 1 if `allowed` and all of the requested access is in
/// `access`, with 0 if not `allowed` and any of it is.
fn clause(device: Device, access: u8, allowed: bool) -> Vec<Instruction> {
    /// Stands for the offset of a jump to the end of the clause.
    const NEXT: i16 = i16::MAX;
    const REST: Register = 1;
    let mut clause = vec![Instruction::jump_unless(KIND, device.kind as i32, NEXT)];
    clause.push(Instruction::copy(REST, ACCESS));
    if allowed {
        clause.push(Instruction::and(REST, i32::from(ALL & !access)));
        clause.push(Instruction::jump_unless(REST, 0, NEXT));
    } else {
        clause.push(Instruction::and(REST, i32::from(access)));
        clause.push(Instruction::jump_if(REST, 0, NEXT));
    }
    for (register, number) in [(MAJOR, device.major), (MINOR, device.minor)] {
        clause.extend(number.map(|number| Instruction::jump_unless(register, number, NEXT)));
    }
    clause.extend(verdict(allowed));
    // A jump's offset is the number of instructions between it and its target.
    for (instruction, remaining) in clause.iter_mut().rev().zip(0..) {
        if instruction.offset == NEXT {
            instruction.offset = remaining;
        }
    }
    clause
}

fn verdict(allowed: bool) -> [Instruction; 2] {
    [Instruction::set(0, i32::from(allowed)), Instruction::exit()]
}

fn access(text: &str) -> Result<u8, &'static str> {
    let mut access = 0;
    for letter in text.chars() {
        access |= match letter {
            'm' => MKNOD,
            'r' => READ,
            'w' => WRITE,
            _ => return Err("an access other than r, w and m"),
        };
    }
    if access == 0 { Err("no access") } else { Ok(access) }
}

/// Converts a device number. A missing or negative one stands for any number.
fn number(number: Option<i64>) -> Result<Option<i32>, &'static str> {
    match number.filter(|number| *number >= 0).map(i32::try_from) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err("a number that no device has"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules(rules: &serde_json::Value) -> Result<DeviceRules, DeviceRulesError> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_value(rules.clone()).unwrap();
        DeviceRules::new(&rules)
    }

    fn block(major: i32, minor: i32) -> Device {
        Device { kind: Kind::Block, major: Some(major), minor: Some(minor) }
    }

    #[test]
    fn without_rules_a_container_has_what_every_container_has() {
        for none in [json!([]), json!([{ "allow": false, "access": "rwm" }])] {
            let rules = rules(&none).unwrap();
            assert!(!rules.all);
            assert_eq!(rules.exceptions, BTreeMap::from(ALLOWED));
        }
    }

    #[test]
    fn a_rule_for_all_devices_begins_anew_and_others_add_up() {
        let rules = rules(&json!([
            { "allow": true, "type": "b", "major": 7, "minor": 1, "access": "rwm" },
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "r" },
            { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "wm" },
            { "allow": true, "type": "b", "major": 254, "minor": 32, "access": "rw" },
            { "allow": false, "type": "b", "major": 254, "minor": 32, "access": "w" },
            { "allow": true, "type": "c", "major": 10, "minor": -1, "access": "r" },
        ]))
        .unwrap();
        let mut expected = BTreeMap::from(ALLOWED);
        expected.insert(block(254, 16), ALL);
        expected.insert(block(254, 32), READ);
        expected.insert(Device { kind: Kind::Character, major: Some(10), minor: None }, READ);
        assert_eq!(rules, DeviceRules { all: false, exceptions: expected });
    }

    #[test]
    fn who_may_use_everything_may_use_all_but_the_exceptions() {
        let rules = rules(&json!([
            { "allow": true, "access": "rwm" },
            { "allow": false, "type": "c", "major": 1, "minor": 11, "access": "rw" },
        ]))
        .unwrap();
        let expected = BTreeMap::from([(character(1, 11), READ | WRITE)]);
        assert_eq!(rules, DeviceRules { all: true, exceptions: expected });
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for (rule, said) in [
            (json!({ "allow": true, "type": "c", "major": 1, "minor": 3 }), "no access"),
            (json!({ "allow": true, "type": "c", "access": "rx" }), "an access other than"),
            (json!({ "allow": true, "type": "p", "access": "r" }), "a type other than"),
            (json!({ "allow": true, "type": "c", "major": 1_i64 << 40, "access": "r" }), "no device has"),
        ] {
            let error = rules(&json!([rule])).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        let hole = json!([
            { "allow": true, "type": "b", "major": 254, "access": "rwm" },
            { "allow": false, "type": "b", "major": 254, "minor": 0, "access": "r" },
        ]);
        assert!(matches!(rules(&hole), Err(DeviceRulesError::PartialException(_))));
        let many = vec![json!({ "allow": false, "access": "rwm" }); RULES_MAX + 1];
        assert!(matches!(rules(&json!(many)), Err(DeviceRulesError::TooMany(_))));
    }

    #[test]
    fn the_kernel_takes_as_many_rules_as_there_may_be() {
        let many: Vec<_> = (0..RULES_MAX)
            .map(|minor| json!({ "allow": true, "type": "b", "major": 7, "minor": minor, "access": "rw" }))
            .collect();
        for rules in [rules(&json!(many)), rules(&json!([{ "allow": true, "access": "rwm" }]))] {
            bpf::load(bpf::Kind::CgroupDevice, "test", &rules.unwrap().program()).unwrap();
        }
    }
}
