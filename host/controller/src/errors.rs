//! Error chains as one line.

use std::error::Error;

/// The error and its causes, outermost first, parted by colons: what containerd's user sees.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
