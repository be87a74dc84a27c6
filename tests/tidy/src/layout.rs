//! Rules about the shape of files: columns, lengths, names of modules, and notes about work to be done.

use crate::{
    Violation,
    repository::{File, Language},
    rust,
};

/// Columns of a line, comments included.
const COLUMNS_MAX: usize = 120;
/// Lines of a Rust module.
const LINES_MAX: usize = 500;
/// A module that is longer says so in one of its first lines, with the reason.
const REASON: &str = "This module is long because";
const REASON_LINES: usize = 10;
/// Names of modules that say nothing about what is in them.
const VAGUE: [&str; 5] = ["utils", "util", "helpers", "misc", "common"];
/// Words that mark work to be done, which belongs into the tracker.
const TO_DO: [&str; 3] = ["TODO", "FIXME", "XXX"];

/// Checks one file.
pub fn check(file: &File) -> Vec<Violation> {
    let mut found = Vec::new();
    long_lines(file, &mut found);
    if file.language == Language::Rust {
        long_module(file, &mut found);
        vague_name(file, &mut found);
        to_do(file, &mut found);
    }
    found
}

fn long_lines(file: &File, found: &mut Vec<Violation>) {
    let mut is_fenced = false;
    for (number, line) in file.text.lines().enumerate() {
        if file.language == Language::Markdown {
            is_fenced ^= line.trim_start().starts_with("```");
            // Rows, addresses and programs' output cannot be wrapped.
            if is_fenced || line.starts_with('|') || line.contains("](") || line.contains("://") {
                continue;
            }
        }
        let columns = line.chars().count();
        if columns > COLUMNS_MAX {
            let message = format!("{columns} columns; wrap it at {COLUMNS_MAX}");
            found.push(Violation { rule: "long-line", place: file.path.clone(), line: number + 1, message });
        }
    }
}

fn long_module(file: &File, found: &mut Vec<Violation>) {
    let lines = file.text.lines().count();
    let has_reason = file.text.lines().take(REASON_LINES).any(|line| line.contains(REASON));
    if lines > LINES_MAX && !has_reason {
        let message = format!(
            "{lines} lines; split it, or say `{REASON} …` within its first {REASON_LINES} lines if that helps nobody"
        );
        found.push(Violation { rule: "long-module", place: file.path.clone(), line: 0, message });
    }
}

fn vague_name(file: &File, found: &mut Vec<Violation>) {
    let mut parts = file.path.trim_end_matches(".rs").split('/');
    if let Some(part) = parts.find(|part| VAGUE.contains(part)) {
        let message = format!("`{part}` does not say what is in the module");
        found.push(Violation { rule: "vague-module-name", place: file.path.clone(), line: 0, message });
    }
}

fn to_do(file: &File, found: &mut Vec<Violation>) {
    for (number, line) in file.rust.iter().enumerate() {
        let words = line.comment.as_deref().map(rust::words).into_iter().flatten();
        if let Some(word) = words.into_iter().find(|word| TO_DO.contains(word)) {
            let message = format!("{word}: do it, or open an issue");
            found.push(Violation { rule: "todo", place: file.path.clone(), line: number + 1, message });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, language: Language, text: &str) -> Vec<&'static str> {
        check(&File::new(path, language, text, false)).into_iter().map(|violation| violation.rule).collect()
    }

    #[test]
    fn a_line_has_120_columns_at_most() {
        let (fits, long) = ("ü".repeat(120), "x".repeat(121));
        assert!(rules("a.sh", Language::Shell, &fits).is_empty());
        assert_eq!(rules("a.sh", Language::Shell, &long), ["long-line"]);
        assert_eq!(rules("a.rs", Language::Rust, &format!("// {long}")), ["long-line"]);
    }

    #[test]
    fn tables_links_and_examples_of_markdown_may_be_longer() {
        let long = "x".repeat(121);
        let page = format!("| {long} |\n[a]({long})\n```\n{long}\n```\n");
        assert!(rules("a.md", Language::Markdown, &page).is_empty());
        assert_eq!(rules("a.md", Language::Markdown, &format!("{page}{long}\n")), ["long-line"]);
    }

    #[test]
    fn a_module_over_500_lines_says_why() {
        let body = "\n".repeat(501);
        assert_eq!(rules("a.rs", Language::Rust, &body), ["long-module"]);
        assert!(rules("a.rs", Language::Rust, &format!("//! {REASON} it is a table.\n{body}")).is_empty());
        assert!(rules("a.rs", Language::Rust, &"\n".repeat(500)).is_empty());
    }

    #[test]
    fn a_module_is_not_called_utils_and_has_no_to_do() {
        assert_eq!(rules("a/utils.rs", Language::Rust, ""), ["vague-module-name"]);
        assert_eq!(rules("a/helpers/x.rs", Language::Rust, ""), ["vague-module-name"]);
        assert_eq!(rules("a.rs", Language::Rust, "// TODO: later"), ["todo"]);
        assert!(rules("a.rs", Language::Rust, "f(\"TODO\")").is_empty());
    }
}
