//! Error chains as one line.

use std::error::Error;

/// The error and its causes, outermost first, parted by colons: what containerd's user sees. A cause that only
/// repeats what was said before it is left out.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    #[error("{text}")]
    struct Link {
        text: &'static str,
        source: io::Error,
    }

    fn link(text: &'static str) -> String {
        chain(&Link { text, source: io::ErrorKind::NotFound.into() })
    }

    #[test]
    fn causes_follow_the_error() {
        assert_eq!(link("cannot open x"), "cannot open x: entity not found");
    }

    #[test]
    fn a_cause_that_repeats_what_was_said_is_left_out() {
        assert_eq!(link("entity not found"), "entity not found");
        assert_eq!(link("cannot open x: entity not found"), "cannot open x: entity not found");
    }
}
