//! Rules about the documentation: docs/compatibility.md has a row for every field and call, and each test that a page
//! names exists.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, Result, bail, ensure};

use crate::repository::{File, Language, Repository};

/// The page that has a row for each field and call.
const COMPATIBILITY: &str = "docs/compatibility.md";
/// The page that has a row for each boundary.
const THREAT_MODEL: &str = "docs/threat-model.md";
/// The heading of its tables.
const BOUNDARIES: &str = "| boundary | what enforces it | test |";
/// The page has at least so many boundaries; fewer mean that they are not found any more.
const BOUNDARIES_MIN: usize = 20;

/// The messages of CRI's `runtime.proto` whose fields all have a row.
const MESSAGES: [&str; 10] = [
    "PodSandboxConfig",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "NamespaceOption",
    "ContainerConfig",
    "LinuxContainerConfig",
    "LinuxContainerSecurityContext",
    "LinuxContainerResources",
    "Capability",
    "Mount",
];

/// The calls of containerd's Task API (`api/runtime/task/v3/shim.proto`).
const CALLS: [&str; 17] = [
    "State",
    "Create",
    "Start",
    "Delete",
    "Pids",
    "Pause",
    "Resume",
    "Checkpoint",
    "Kill",
    "Exec",
    "ResizePty",
    "CloseIO",
    "Update",
    "Wait",
    "Stats",
    "Connect",
    "Shutdown",
];

/// The names of tests in a cell, which are in backquotes.
fn tests_named(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// A row of docs/compatibility.md.
struct Row {
    subject: String,
    tests: Vec<String>,
}

fn rows(page: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [subject, answer, test] = cells[..] else { bail!("{COMPATIBILITY}: not three cells: {line}") };
        ensure!(!answer.is_empty(), "{COMPATIBILITY}: the second cell is empty: {line}");
        rows.push(Row { subject: subject.trim_matches('`').to_owned(), tests: tests_named(test) });
    }
    Ok(rows)
}

/// The fields of one message of a `.proto` file, as `Message.field`.
fn fields(proto: &str, message: &str) -> Result<BTreeSet<String>> {
    let start =
        proto.find(&format!("\nmessage {message} {{")).with_context(|| format!("no message {message}"))?;
    let body = proto[start..].split("\n}").next().unwrap_or_default();
    let field = |line: &str| {
        let line = line.trim();
        let (declaration, number) = line.split_once('=')?;
        number.trim().starts_with(|first: char| first.is_ascii_digit()).then_some(())?;
        Some(format!("{message}.{}", declaration.split_whitespace().last()?))
    };
    Ok(body.lines().filter(|line| !line.trim().starts_with("//")).filter_map(field).collect())
}

/// The names of all tests of the repository: the functions that follow a test's attribute.
pub fn tests(repository: &Repository) -> BTreeSet<String> {
    repository.files.iter().filter(|file| file.language == Language::Rust).flat_map(tests_of).collect()
}

fn tests_of(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.rust.iter().map(|line| line.code.trim()).collect();
    let attributes = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| line.starts_with("#[test]") || line.starts_with("#[tokio::test"));
    let name = |line: &&str| {
        let rest = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")?;
        rest.split('(').next().map(str::to_owned)
    };
    attributes.filter_map(|(number, _)| lines[number..].iter().find_map(name)).collect()
}

/// Fields and calls without a row, and rows about something else.
pub fn compatibility_rows(repository: &Repository) -> Result<Vec<String>> {
    let proto = repository.text("protos/proto/cri/runtime.proto")?;
    let mut expected: BTreeSet<String> = CALLS.iter().map(|call| format!("Task.{call}")).collect();
    for message in MESSAGES {
        let fields = fields(&proto, message)?;
        ensure!(!fields.is_empty(), "no fields in {message}");
        expected.extend(fields);
    }
    let mut complaints = Vec::new();
    let mut listed = BTreeSet::new();
    for row in rows(&repository.text(COMPATIBILITY)?)? {
        if !expected.contains(&row.subject) {
            complaints.push(format!("{COMPATIBILITY}: neither a field nor a call: {}", row.subject));
        }
        if !listed.insert(row.subject.clone()) {
            complaints.push(format!("{COMPATIBILITY}: two rows: {}", row.subject));
        }
    }
    complaints
        .extend(expected.difference(&listed).map(|missing| format!("{COMPATIBILITY}: no row: {missing}")));
    Ok(complaints)
}

/// Rows of docs/compatibility.md that name no test, or one that does not exist.
pub fn compatibility_tests(repository: &Repository) -> Result<Vec<String>> {
    let found = tests(repository);
    let complaint = |row: Row| {
        let missing = missing(&row.tests, &found)?;
        Some(format!("{COMPATIBILITY}: {}: {missing}", row.subject))
    };
    Ok(rows(&repository.text(COMPATIBILITY)?)?.into_iter().filter_map(complaint).collect())
}

/// What is wrong with the tests that a row names.
fn missing(named: &[String], found: &BTreeSet<String>) -> Option<String> {
    if named.is_empty() {
        return Some("names no test".to_owned());
    }
    let missing: Vec<&str> = named.iter().filter(|name| !found.contains(*name)).map(String::as_str).collect();
    (!missing.is_empty()).then(|| format!("no such test: {}", missing.join(", ")))
}

/// Boundaries of docs/threat-model.md that name no test, or one that does not exist.
pub fn threat_model_tests(repository: &Repository) -> Result<Vec<String>> {
    let (page, found) = (repository.text(THREAT_MODEL)?, tests(repository));
    let (mut boundaries, mut complaints) = (0, Vec::new());
    for table in page.split(BOUNDARIES).skip(1) {
        for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
            boundaries += 1;
            let named = tests_named(row.trim_end_matches('|').rsplit('|').next().unwrap_or_default());
            complaints
                .extend(missing(&named, &found).map(|missing| format!("{THREAT_MODEL}: {missing}: {row}")));
        }
    }
    ensure!(boundaries >= BOUNDARIES_MIN, "only {boundaries} boundaries were found on {THREAT_MODEL}");
    Ok(complaints)
}

/// Tests in `tests/durations` that do not exist as end-to-end tests under that path: `tests/node/deal` would take their
/// names for unknown ones and forget that they need a node alone.
pub fn durations(repository: &Repository) -> Result<Vec<String>> {
    let paths: BTreeSet<String> = repository.files.iter().flat_map(e2e_paths).collect();
    let mut complaints = Vec::new();
    for line in repository.text("tests/durations")?.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_seconds, "alone" | "shared", program, name] = words[..] else {
            bail!("tests/durations: not \"SECONDS PHASE PROGRAM NAME\": {line}")
        };
        if program == "e2e" && !paths.contains(name) {
            complaints.push(format!("tests/durations: no such test: {name}"));
        }
    }
    Ok(complaints)
}

/// The tests of a file of the end-to-end tests, by their paths.
fn e2e_paths(file: &File) -> Vec<String> {
    let Some(path) = file.path.strip_prefix("tests/e2e/") else { return Vec::new() };
    let module = path.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
    tests_of(file).into_iter().map(|name| format!("{module}::{name}")).collect()
}

/// Directories at the top of the repository, with which a path in a page begins.
const TOP: [&str; 10] = [
    "agent/",
    "bpf/",
    "cgroup-stats/",
    "dist/",
    "docs/",
    "guest-image/",
    "host/",
    "protos/",
    "scripts/",
    "tests/",
];

/// Paths in backquotes on a page that lead to nothing. A path to a Rust file may leave its beginning out
/// (`pod/health.rs`).
pub fn stale_paths(repository: &Repository) -> Vec<String> {
    let known: Vec<&str> = repository.files.iter().map(|file| file.path.as_str()).collect();
    let pages = repository.files.iter().filter(|file| file.language == Language::Markdown);
    let mut complaints = Vec::new();
    for page in pages {
        for (number, line) in page.text.lines().enumerate() {
            for path in line.split('`').skip(1).step_by(2).filter(|quoted| is_path(quoted)) {
                let is_end = |file: &&str| file.ends_with(&format!("/{path}"));
                if !repository.root.join(path).exists() && !known.iter().any(is_end) {
                    complaints.push(format!("{}:{}: there is no {path}", page.path, number + 1));
                }
            }
        }
    }
    complaints
}

fn is_path(quoted: &str) -> bool {
    let is_plain = quoted.chars().all(|character| character.is_alphanumeric() || "/._-".contains(character));
    let is_rust = Path::new(quoted).extension().is_some_and(|extension| extension == "rs");
    is_plain && (TOP.iter().any(|top| quoted.starts_with(top)) || is_rust)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_other_words() {
        assert!(["tests/e2e", "pod/health.rs", "rate.rs"].into_iter().all(is_path));
        assert!(!["scripts/test e2e", "a/b", "/run/x.rs/<id>", "tests::e2e"].into_iter().any(is_path));
    }

    #[test]
    fn tests_and_fields_are_found() {
        let text = "#[test]\n#[ignore]\nfn one() {}\nfn two() {}\n#[tokio::test]\nasync fn three() {}\n\
            // #[test]\nfn four() {}";
        let file = File::new("tests/e2e/a/b.rs", Language::Rust, text, true);
        assert_eq!(tests_of(&file), ["one", "three"]);
        assert_eq!(e2e_paths(&file), ["a::b::one", "a::b::three"]);
        let proto = "\nmessage A {\n  // b = 1\n  string c = 2;\n  repeated D d = 3;\n}\n\
            message E {\n  int f = 1;\n}\n";
        assert_eq!(fields(proto, "A").unwrap(), ["A.c", "A.d"].map(str::to_owned).into());
        assert!(fields(proto, "G").is_err());
    }

    #[test]
    fn a_row_names_tests_that_exist() {
        let found: BTreeSet<String> = ["one".to_owned()].into();
        assert_eq!(missing(&tests_named("`one`"), &found), None);
        assert_eq!(missing(&tests_named("`one`, `two`"), &found).unwrap(), "no such test: two");
        assert_eq!(missing(&tests_named("one"), &found).unwrap(), "names no test");
        assert!(rows("| `a` | works |\n").is_err());
    }
}
