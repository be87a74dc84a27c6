//! Names that the guest gives to files. Each must be one step from a directory that the guest knows.
//!
//! virtiofsd passes names to the host's kernel as they are (`symlinkat`, `unlinkat`, `renameat2` …), and relies on
//! there being nothing outside its root directory. Here the whole host is outside it, so a name that could lead out of
//! the share is refused.

use std::{ffi::CStr, io};

use thiserror::Error;

/// Longest name of a file or of an extended attribute in bytes (`NAME_MAX`, `XATTR_NAME_MAX`).
const NAME_MAX: usize = 255;

/// A name is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NameError {
    #[error("the guest gives an empty name")]
    Empty,
    #[error("the guest names a directory as \".\" or \"..\" instead of by its number")]
    Dots,
    #[error("the guest gives a path where a name is needed")]
    Path,
    #[error("the guest gives a name of {length} bytes; the longest has {NAME_MAX}")]
    Long { length: usize },
}

impl From<NameError> for io::Error {
    fn from(error: NameError) -> Self {
        let number = match &error {
            NameError::Long { .. } => libc::ENAMETOOLONG,
            NameError::Empty | NameError::Dots | NameError::Path => libc::EINVAL,
        };
        tracing::debug!(%error, "fs: a request is refused");
        // virtiofsd sends the guest the number only.
        Self::from_raw_os_error(number)
    }
}

/// Checks the name of a file in a directory.
pub fn check(name: &CStr) -> Result<(), NameError> {
    let name = name.to_bytes();
    match name {
        b"." | b".." => Err(NameError::Dots),
        _ if name.contains(&b'/') => Err(NameError::Path),
        _ => check_length(name),
    }
}

/// Checks the name of an extended attribute, which may contain any characters.
pub fn check_attribute(name: &CStr) -> Result<(), NameError> {
    check_length(name.to_bytes())
}

fn check_length(name: &[u8]) -> Result<(), NameError> {
    match name.len() {
        0 => Err(NameError::Empty),
        1..=NAME_MAX => Ok(()),
        length => Err(NameError::Long { length }),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    fn checked(name: &str) -> Result<(), NameError> {
        check(&CString::new(name).unwrap())
    }

    #[test]
    fn a_name_is_one_step_from_a_directory() {
        for name in ["a", "...", ".hidden", "a b", "-", "\u{fc}", &"x".repeat(255)] {
            assert_eq!(checked(name), Ok(()), "{name}");
        }
        assert_eq!(checked(""), Err(NameError::Empty));
        assert_eq!(checked("."), Err(NameError::Dots));
        assert_eq!(checked(".."), Err(NameError::Dots));
        for path in ["/", "/etc/passwd", "../x", "a/b", "a/"] {
            assert_eq!(checked(path), Err(NameError::Path), "{path}");
        }
        assert_eq!(checked(&"x".repeat(256)), Err(NameError::Long { length: 256 }));
    }

    #[test]
    fn an_attributes_name_is_neither_empty_nor_long() {
        assert_eq!(check_attribute(c"user.a/b"), Ok(()));
        assert_eq!(check_attribute(c""), Err(NameError::Empty));
        let long = CString::new("x".repeat(300)).unwrap();
        assert_eq!(check_attribute(&long), Err(NameError::Long { length: 300 }));
    }
}
