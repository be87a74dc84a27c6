//! Ids, as containerd gives them. Each is parsed where it comes in; what makes a path, a name or a look-up of one takes
//! the parsed value, so that nobody has to check again.
//!
//! The form is that of containerd's `identifiers.Validate`: letters and digits, with single dots, dashes and
//! underscores between them. So an id is one plain component of a path: never empty, hidden, `.` or `..`.

use std::{borrow::Borrow, fmt, path::Path, str::FromStr};

/// Characters of a refused id that an error quotes.
const QUOTE_MAX: usize = 32;

/// What was given is no id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no id of {of}: 1 to {longest} letters and digits, with single '.', '-' and '_' between them"
)]
pub struct InvalidId {
    /// What it was to be the id of.
    of: &'static str,
    /// The beginning of what was given.
    text: String,
    longest: usize,
}

/// Letters and digits in groups of at least one, with one separator between two groups.
fn is_id(text: &str, longest: usize) -> bool {
    let group = |group: &str| !group.is_empty() && group.bytes().all(|byte| byte.is_ascii_alphanumeric());
    text.len() <= longest && text.split(['.', '-', '_']).all(group)
}

macro_rules! id {
    ($(#[$documentation:meta])* $name:ident, $of:literal, $longest:literal) => {
        $(#[$documentation])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "grpc", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "grpc", serde(try_from = "String", into = "String"))]
        pub struct $name(String);

        impl $name {
            /// Bytes of the longest.
            pub const LONGEST: usize = $longest;

            /// The id's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// Whether a text is of this form.
            fn parse(text: &str) -> Result<(), InvalidId> {
                if is_id(text, Self::LONGEST) {
                    return Ok(());
                }
                let text = text.chars().take(QUOTE_MAX).collect();
                Err(InvalidId { of: $of, text, longest: Self::LONGEST })
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::parse(text).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::parse(&text).map(|()| Self(text))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, formatter)
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                Path::new(&self.0)
            }
        }

        // So that a map with such keys can be asked for what nobody has parsed.
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

id!(
    /// A container.
    ContainerId,
    "a container",
    76
);
id!(
    /// A pod: containerd's sandbox. Shorter than containerd's longest, because sockets lie in a directory of that name
    /// and a socket's path has 107 bytes; containerd's own have 64.
    SandboxId,
    "a pod sandbox",
    64
);
id!(
    /// One more process in a container.
    ExecId,
    "an exec",
    76
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_what_containerd_takes_for_one() {
        let longest = "x".repeat(76);
        for id in ["a", "0", "0123abcdef", "web-1_x.y", "A.b", &longest] {
            assert_eq!(id.parse::<ContainerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn what_could_be_more_or_less_than_one_component_of_a_path_is_no_id() {
        let long = "x".repeat(77);
        for text in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "/etc",
            ".hidden",
            "a\0b",
            "a b",
            "a\nb",
            "-a",
            "a-",
            "_",
            "a..b",
            "a--b",
            "a.-b",
            "ä",
            "a\u{200b}",
            "%2e",
            &long,
        ] {
            let error = text.parse::<ContainerId>().unwrap_err();
            assert!(error.to_string().contains("a container"), "{text:?}: {error}");
            assert!(ExecId::try_from(text.to_owned()).is_err(), "{text:?}");
        }
        assert!("x".repeat(65).parse::<SandboxId>().is_err() && "x".repeat(64).parse::<SandboxId>().is_ok());
    }

    #[test]
    fn a_refused_text_does_not_come_back_whole() {
        let error = "/".repeat(5000).parse::<ContainerId>().unwrap_err();
        assert!(error.to_string().len() < 200, "{error}");
    }
}
