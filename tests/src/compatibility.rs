//! `docs/compatibility.md` speaks of every field and call, and it and `docs/threat-model.md` name tests that exist.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, ensure};

/// Messages of CRI's `runtime.proto` every field of which is in the page.
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

/// containerd's `api/runtime/task/v3/shim.proto`.
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

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The names in a row's last cell, which are tests'.
fn tests_named(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Subject and tests of each row.
fn rows() -> Result<Vec<(String, Vec<String>)>> {
    let page = fs::read_to_string(root().join("docs/compatibility.md"))?;
    let mut rows = Vec::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [subject, answer, test] = cells[..] else { anyhow::bail!("not three cells: {line}") };
        ensure!(!answer.is_empty(), "no answer: {line}");
        rows.push((subject.trim_matches('`').to_owned(), tests_named(test)));
    }
    Ok(rows)
}

/// The fields of one message, as `Message.field`.
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

/// The tests in all files of a directory.
fn tests_in(directory: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            tests_in(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.extend(tests_of(&fs::read_to_string(&path)?));
        }
    }
    Ok(())
}

/// The functions that follow a test's attribute.
fn tests_of(source: &str) -> Vec<String> {
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
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

#[test]
fn every_field_and_call_has_its_row_and_no_row_is_about_anything_else() -> Result<()> {
    let proto = fs::read_to_string(root().join("protos/proto/cri/runtime.proto"))?;
    let mut expected: BTreeSet<String> = CALLS.iter().map(|call| format!("Task.{call}")).collect();
    for message in MESSAGES {
        let fields = fields(&proto, message)?;
        ensure!(!fields.is_empty(), "no fields in {message}");
        expected.extend(fields);
    }
    let rows: Vec<String> = rows()?.into_iter().map(|(subject, _)| subject).collect();
    let listed: BTreeSet<String> = rows.iter().cloned().collect();
    assert_eq!(rows.len(), listed.len(), "a row is there twice");
    let missing: Vec<_> = expected.difference(&listed).collect();
    let unknown: Vec<_> = listed.difference(&expected).collect();
    assert!(missing.is_empty() && unknown.is_empty(), "missing: {missing:?}; unknown: {unknown:?}");
    Ok(())
}

fn all_tests() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for directory in ["tests/e2e", "tests/src", "agent", "host", "protos"] {
        tests_in(&root().join(directory), &mut found)?;
    }
    Ok(found)
}

#[test]
fn every_boundary_of_the_threat_model_names_tests_that_exist() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/threat-model.md"))?;
    let found = all_tests()?;
    let (mut boundaries, mut wrong) = (0, Vec::new());
    for table in page.split("| boundary | what enforces it | test |").skip(1) {
        for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
            boundaries += 1;
            let names = tests_named(row.trim_end_matches('|').rsplit('|').next().unwrap_or_default());
            if names.is_empty() || names.iter().any(|name| !found.contains(name)) {
                wrong.push(row.to_owned());
            }
        }
    }
    assert!(wrong.is_empty(), "without tests, or with some that do not exist: {wrong:#?}");
    ensure!(boundaries >= 20, "only {boundaries} boundaries were found on the page");
    Ok(())
}

#[test]
fn every_test_that_a_row_names_exists() -> Result<()> {
    let found = all_tests()?;
    let rows = rows()?;
    let missing: Vec<_> = rows
        .iter()
        .filter(|(_, tests)| tests.is_empty() || tests.iter().any(|test| !found.contains(test)))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
    Ok(())
}
