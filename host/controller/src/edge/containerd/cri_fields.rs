//! Fields and values in CRI's messages that the CRI known here has no name for.
//!
//! A decoder passes over both without a word, as protobuf wants it. Whoever set one asked for something, and has to be
//! told that nothing comes of it.

use std::{fmt, sync::LazyLock};

use pericarp_protos::cri::DESCRIPTORS;
use prost::DecodeError;
use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, Kind, MessageDescriptor, Value};
use serde_json::Value as Json;

/// Every message of CRI's. Cannot fail: the build has made the bytes.
static CRI: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(DESCRIPTORS).unwrap_or_default());

/// A field or a value that has no name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unknown {
    /// A field, by its name or, from a message in protobuf's own encoding, its number.
    Field { path: String },
    /// A value of a field that has an enumeration's.
    Value { path: String, number: String },
}

/// What to do about either.
pub const REMEDY: &str = "this version of pericarp does not know it; use a newer one, or do without";

impl fmt::Display for Unknown {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unknown::Field { path } => write!(formatter, "the field {path} of CRI's"),
            Unknown::Value { path, number } => write!(formatter, "the value {number} of CRI's field {path}"),
        }
    }
}

/// The first unknown of an encoded message, for example a `runtime.v1.PodSandboxConfig`.
pub fn unknown_in_message(kind: &str, bytes: &[u8]) -> Result<Option<Unknown>, DecodeError> {
    let Some(descriptor) = CRI.get_message_by_name(kind) else {
        return Ok(Some(Unknown::Field { path: kind.to_owned() }));
    };
    Ok(in_message(&DynamicMessage::decode(descriptor, bytes)?, ""))
}

/// The first unknown of a message as containerd keeps it on record: in JSON, with the fields' names in the protocol.
pub fn unknown_in_json(kind: &str, json: &Json) -> Option<Unknown> {
    match CRI.get_message_by_name(kind) {
        Some(descriptor) => in_object(&descriptor, json, ""),
        None => Some(Unknown::Field { path: kind.to_owned() }),
    }
}

fn below(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

fn in_message(message: &DynamicMessage, path: &str) -> Option<Unknown> {
    if let Some(field) = message.unknown_fields().next() {
        return Some(Unknown::Field { path: below(path, &format!("number {}", field.number())) });
    }
    message.fields().find_map(|(field, value)| in_value(&field.kind(), value, &below(path, field.name())))
}

fn in_value(kind: &Kind, value: &Value, path: &str) -> Option<Unknown> {
    match (value, kind) {
        (Value::Message(message), _) => in_message(message, path),
        (Value::EnumNumber(number), Kind::Enum(names)) => in_enumeration(names, i64::from(*number), path),
        (Value::List(list), _) => {
            (0..).zip(list).find_map(|(index, value)| in_value(kind, value, &format!("{path}[{index}]")))
        }
        // CRI has maps of texts only.
        _ => None,
    }
}

fn in_enumeration(names: &EnumDescriptor, number: i64, path: &str) -> Option<Unknown> {
    let known = i32::try_from(number).is_ok_and(|number| names.get_value(number).is_some());
    (!known).then(|| Unknown::Value { path: path.to_owned(), number: number.to_string() })
}

fn in_object(descriptor: &MessageDescriptor, json: &Json, path: &str) -> Option<Unknown> {
    json.as_object().into_iter().flatten().find_map(|(name, value)| {
        let path = below(path, name);
        match descriptor.get_field_by_name(name) {
            None if value.is_null() => None,
            None => Some(Unknown::Field { path }),
            Some(field) if field.is_map() => None,
            Some(field) => in_json(&field.kind(), value, &path),
        }
    })
}

fn in_json(kind: &Kind, value: &Json, path: &str) -> Option<Unknown> {
    match (value, kind) {
        (Json::Array(list), _) => {
            (0..).zip(list).find_map(|(index, value)| in_json(kind, value, &format!("{path}[{index}]")))
        }
        (_, Kind::Message(descriptor)) => in_object(descriptor, value, path),
        (Json::Null, _) => None,
        (_, Kind::Enum(names)) => match value.as_i64() {
            Some(number) => in_enumeration(names, number, path),
            None => Some(Unknown::Value { path: path.to_owned(), number: value.to_string() }),
        },
        _ => None,
    }
}

/// For tests: every field of a message, and of the messages in it, that has an enumeration's values: its path, and the
/// message in protobuf's encoding and in JSON with a value there that no enumeration has.
#[cfg(test)]
pub(crate) fn enumerations(kind: &str) -> Vec<(String, Vec<u8>, Json)> {
    use prost::Message as _;
    /// A message in which one field is set.
    fn set(descriptor: &MessageDescriptor, name: &str, value: Value, json: Json) -> (DynamicMessage, Json) {
        let mut message = DynamicMessage::new(descriptor.clone());
        let is_list = descriptor.get_field_by_name(name).unwrap().is_list();
        let (value, json) =
            if is_list { (Value::List(vec![value]), Json::Array(vec![json])) } else { (value, json) };
        message.set_field_by_name(name, value);
        (message, serde_json::json!({ name: json }))
    }
    fn walk(descriptor: &MessageDescriptor) -> Vec<(String, DynamicMessage, Json)> {
        let mut found = Vec::new();
        for field in descriptor.fields() {
            let name = if field.is_list() { format!("{}[0]", field.name()) } else { field.name().to_owned() };
            match field.kind() {
                Kind::Enum(_) => {
                    let (message, json) = set(descriptor, field.name(), Value::EnumNumber(99), 99.into());
                    found.push((name, message, json));
                }
                Kind::Message(inner) if !field.is_map() => {
                    for (path, message, json) in walk(&inner) {
                        let (message, json) = set(descriptor, field.name(), Value::Message(message), json);
                        found.push((format!("{name}.{path}"), message, json));
                    }
                }
                _ => {}
            }
        }
        found
    }
    let descriptor = CRI.get_message_by_name(kind).unwrap();
    walk(&descriptor).into_iter().map(|(path, message, json)| (path, message.encode_to_vec(), json)).collect()
}

#[cfg(test)]
mod tests {
    use pericarp_protos::cri::{LinuxPodSandboxConfig, PodSandboxConfig};
    use prost::Message as _;
    use serde_json::json;

    use super::*;

    const POD: &str = "runtime.v1.PodSandboxConfig";
    const CONTAINER: &str = "runtime.v1.ContainerConfig";

    /// Field 1000, whose value is the number 1.
    const FIELD_1000: [u8; 3] = [0xc0, 0x3e, 1];

    #[test]
    fn a_field_that_has_no_name_is_found_wherever_it_is() {
        let whole = PodSandboxConfig {
            annotations: [("a".to_owned(), String::new())].into(),
            linux: Some(LinuxPodSandboxConfig::default()),
            ..PodSandboxConfig::default()
        };
        assert_eq!(unknown_in_message(POD, &whole.encode_to_vec()), Ok(None));
        let at_the_top = [whole.encode_to_vec(), FIELD_1000.to_vec()].concat();
        let path = "number 1000".to_owned();
        assert_eq!(unknown_in_message(POD, &at_the_top), Ok(Some(Unknown::Field { path })));
        // Field 8, linux, of the three bytes.
        let inside = [&[0x42, 3][..], &FIELD_1000].concat();
        let path = "linux.number 1000".to_owned();
        assert_eq!(unknown_in_message(POD, &inside), Ok(Some(Unknown::Field { path })));
        assert!(unknown_in_message(POD, &[0xff]).is_err());
    }

    #[test]
    fn a_name_in_json_that_is_no_fields_is_found_wherever_it_is() {
        let known = json!({ "labels": { "any": "thing" }, "mounts": [{ "uidMappings": [], "propagation": 1 }],
            "CDI_devices": [{ "name": "x" }], "linux": null });
        assert_eq!(unknown_in_json(CONTAINER, &known), None);
        for (json, path) in [
            (json!({ "hologram": true }), "hologram"),
            (json!({ "linux": { "hologram": 0 } }), "linux.hologram"),
            (json!({ "mounts": [{}, { "hologram": [] }] }), "mounts[1].hologram"),
        ] {
            let path = path.to_owned();
            assert_eq!(unknown_in_json(CONTAINER, &json), Some(Unknown::Field { path }));
        }
        let text = json!({ "mounts": [{ "propagation": "sideways" }] });
        assert!(matches!(unknown_in_json(CONTAINER, &text), Some(Unknown::Value { .. })));
    }
}
