//! The files of the repository that the rules look at.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::rust::{self, Line};

/// Directories that hold nothing of ours: what is built, what git keeps, and `.proto` files of other projects.
const SKIPPED: [&str; 3] = ["target", ".git", "proto"];

/// What a file is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    Rust,
    Markdown,
    Shell,
}

/// A text file of the repository.
#[derive(Clone, Debug)]
pub struct File {
    /// Its path from the root of the repository.
    pub path: String,
    pub language: Language,
    pub text: String,
    /// Its lines of Rust, taken apart; empty for other languages.
    pub rust: Vec<Line>,
    /// Whether all of a Rust file is compiled for tests only.
    pub is_test: bool,
}

impl File {
    /// Takes a file's text apart. `is_test` matters for Rust only.
    pub fn new(path: &str, language: Language, text: &str, is_test: bool) -> Self {
        let rust = if language == Language::Rust { rust::lines(text) } else { Vec::new() };
        Self { path: path.to_owned(), language, text: text.to_owned(), rust, is_test }
    }
}

/// The repository's files, sorted by path.
#[derive(Clone, Debug)]
pub struct Repository {
    pub root: PathBuf,
    pub files: Vec<File>,
}

impl Repository {
    /// Reads the repository that this crate is part of.
    pub fn read() -> Result<Self> {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).canonicalize()?;
        let mut paths = Vec::new();
        walk(&root, &mut paths)?;
        paths.sort();
        let mut files = Vec::new();
        for path in paths {
            let text = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            let Ok(text) = String::from_utf8(text) else { continue };
            let Some(language) = language(&path, &text) else { continue };
            let name = path.strip_prefix(&root)?.display().to_string();
            files.push(File::new(&name, language, &text, false));
        }
        mark_tests(&mut files);
        Ok(Self { root, files })
    }

    /// Reads one file by its path from the root.
    pub fn text(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.root.join(path)).with_context(|| format!("read {path}"))
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if !SKIPPED.iter().any(|skipped| entry.file_name() == *skipped) {
                walk(&entry.path(), found)?;
            }
        } else if kind.is_file() {
            found.push(entry.path());
        }
    }
    Ok(())
}

fn language(path: &Path, text: &str) -> Option<Language> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => Some(Language::Rust),
        Some("md") => Some(Language::Markdown),
        Some("sh") => Some(Language::Shell),
        None if text.starts_with("#!") => Some(Language::Shell),
        _ => None,
    }
}

/// Finds the files that are compiled for tests only: the test targets, and modules below `#[cfg(test)] mod name;`.
fn mark_tests(files: &mut [File]) {
    let mut prefixes = Vec::new();
    for file in files.iter().filter(|file| file.language == Language::Rust) {
        let directory = match file.path.rsplit_once('/') {
            Some((directory, "mod.rs" | "lib.rs" | "main.rs")) => directory.to_owned(),
            _ => file.path.trim_end_matches(".rs").to_owned(),
        };
        for name in rust::test_modules(&file.rust) {
            prefixes.push(format!("{directory}/{name}.rs"));
            prefixes.push(format!("{directory}/{name}/"));
        }
    }
    for file in files {
        let stem = file.path.trim_end_matches(".rs").rsplit('/').next().unwrap_or_default();
        // By name too, because a module may be declared with a `#[path]`.
        let is_called_so = stem.ends_with("_tests") || ["tests", "testing"].contains(&stem);
        let is_of_target = is_called_so || file.path.starts_with("tests/") || file.path.contains("/tests/");
        file.is_test = is_of_target || prefixes.iter().any(|prefix| file.path.starts_with(prefix));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_that_are_declared_for_tests_are_tests() {
        let file = |path: &str, text: &str| File::new(path, Language::Rust, text, false);
        let mut files = [
            file("a/src/lib.rs", "mod one;\n#[cfg(test)]\nmod two;\n"),
            file("a/src/one.rs", "#[cfg(test)]\n#[path = \"x.rs\"]\nmod three;\n"),
            file("a/src/one/three.rs", ""),
            file("a/src/two.rs", ""),
            file("a/tests/all.rs", ""),
            file("a/src/one_tests.rs", ""),
        ];
        mark_tests(&mut files);
        assert_eq!(files.map(|file| file.is_test), [false, false, true, true, true, true]);
    }
}
