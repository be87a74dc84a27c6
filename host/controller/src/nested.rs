//! Nested virtualization: whether a pod may have virtual machines of its own. The pod asks, and the operator allows
//! it, because KVM's code for it is large and the guest's kernel can reach all of it.

use pericarp_protos::cri::PodSandboxConfig;

use crate::config::Config;

/// Asks for it: "true" or "false".
pub const ANNOTATION: &str = "io.pericarp.nested-virtualization";

/// Why a pod cannot have what its annotation says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither of the two words.
    #[error("annotation {ANNOTATION} is {value:?}; it must be \"true\" or \"false\"")]
    Annotation {
        /// What the pod has there.
        value: String,
    },
    /// The operator has not allowed it.
    #[error(
        "annotation {ANNOTATION} asks for virtual machines inside of the pod, and this node does not allow them; remove \
         it, or set nested_virtualization = true in the controller's configuration"
    )]
    NotAllowed,
}

/// Whether a pod has nested virtualization.
pub fn of(pod: &PodSandboxConfig, config: &Config) -> Result<bool, Error> {
    match pod.annotations.get(ANNOTATION).map(String::as_str) {
        None | Some("false") => Ok(false),
        Some("true") if config.nested_virtualization => Ok(true),
        Some("true") => Err(Error::NotAllowed),
        Some(value) => Err(Error::Annotation { value: value.chars().take(64).collect() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(value: Option<&str>, allowed: bool) -> Result<bool, Error> {
        let annotations = value.map(|value| (ANNOTATION.to_owned(), value.to_owned()));
        let pod = PodSandboxConfig { annotations: annotations.into_iter().collect(), ..Default::default() };
        of(&pod, &Config { nested_virtualization: allowed, ..Config::default() })
    }

    #[test]
    fn a_pod_has_nested_virtualization_only_if_it_asks_and_the_operator_allows_it() {
        assert_eq!(nested(None, false), Ok(false));
        assert_eq!(nested(None, true), Ok(false));
        assert_eq!(nested(Some("true"), true), Ok(true));
        assert_eq!(nested(Some("false"), true), Ok(false));
        assert_eq!(nested(Some("false"), false), Ok(false));
        let refused = nested(Some("true"), false).unwrap_err();
        assert!(refused.to_string().contains("nested_virtualization = true"), "{refused}");
    }

    #[test]
    fn other_values_of_the_annotation_are_refused() {
        for value in ["", "True", "1", "yes", "true "] {
            assert_eq!(nested(Some(value), true), Err(Error::Annotation { value: value.to_owned() }));
        }
    }
}
