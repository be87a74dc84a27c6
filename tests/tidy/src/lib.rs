//! Checks the repository itself, as rustc's `tidy` does: what docs/style.md demands and a program can see.
//!
//! Every rule is a function that returns [`Violation`]s. `tests/repository.rs` runs the rules on this repository as
//! ordinary tests, and each rule has tests of its own that show what it finds. What still violates a rule is listed in
//! `tests/tidy/exceptions`, which can only become shorter ([`exceptions`]).
//!
//! The lists of words that the rules look for are in docs/style.md, so that the page and the check cannot differ.

pub mod code;
pub mod commits;
pub mod docs;
pub mod exceptions;
pub mod fault_points;
pub mod layout;
pub mod modules;
pub mod names;
pub mod picture;
pub mod prose;
pub mod repository;
pub mod rust;
pub mod style;

use std::fmt;

use anyhow::Result;

use crate::{repository::Repository, style::Style};

/// One place that violates one rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// The rule's name, as `tests/tidy/exceptions` has it.
    pub rule: &'static str,
    /// A file's path in the repository, or the name of what violates the rule.
    pub place: String,
    /// A line of the file, counted from 1; 0 if the rule is about the whole of it.
    pub line: usize,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}: {}", self.place, self.line, self.rule, self.message)
    }
}

/// The rules that are about files, by name.
pub const RULES: [&str; 13] = [
    "long-line",
    "long-module",
    "vague-module-name",
    "todo",
    "phrase",
    "insider-comment",
    "riddle-type",
    "riddle-function",
    "unwrap",
    "unsafe",
    "unlisted-room",
    "circle",
    "upward-arrow",
];

/// All violations of the rules that are about files, without regard to exceptions.
pub fn check(repository: &Repository) -> Result<Vec<Violation>> {
    let style = Style::read(repository)?;
    let mut found = Vec::new();
    for file in &repository.files {
        found.extend(layout::check(file));
        found.extend(prose::check(file, &style));
        found.extend(names::check(file, &style));
        found.extend(code::check(file));
    }
    found.extend(modules::check(repository)?);
    found.sort();
    Ok(found)
}
