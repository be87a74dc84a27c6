//! docs/seccomp.md, made from the tables.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use super::{
    calls,
    filter::allowed_calls,
    needs::{self, AllowedCall, Need},
};
use crate::thread_kind::ThreadKind;

/// With this environment variable, the test writes the page instead of comparing it.
const WRITE: &str = "PERICARP_WRITE_PAGES";

const START: &str = "\
# System calls of a machine

Each thread of a machine has a filter of its own (seccomp(2)), which it installs before it sees anything of a guest's. A
call that is not in the thread's rows ends the machine. Why it is so is in
[ARCHITECTURE.md](../ARCHITECTURE.md#each-thread-of-a-machine-has-a-filter-of-its-system-calls), and what an operator
sees then in [operators.md](operators.md#a-machine-that-its-filter-has-ended).

This page is made from the tables in `host/vmm/src/seccomp/needs.rs`. A test compares the two. This writes it again:

```
PERICARP_WRITE_PAGES=1 cargo test -p pericarp-vmm the_page_of_system_calls
```

In parentheses is what is checked of a call's arguments: one of the conditions between the semicolons must be met. A
call without parentheses may have any arguments. No call that takes a path, a number of another process or an address in
a network is possible except on the threads in whose rows it is.
";

fn call_with_conditions(call: &AllowedCall) -> String {
    let name = calls::name(call.number).unwrap();
    if call.number == libc::SYS_clone3 {
        return format!("`{name}` (fails with ENOSYS)");
    }
    if call.when.is_empty() {
        return format!("`{name}`");
    }
    let conditions: Vec<_> = call
        .when
        .iter()
        .map(|alternative| alternative.0.iter().map(|check| check.name).collect::<Vec<_>>().join(" and "))
        .collect();
    format!("`{name}` ({})", conditions.join("; "))
}

fn rows(page: &mut String, needs: &[&Need]) {
    page.push_str("\n| what for | calls |\n|---|---|\n");
    for need in needs {
        let calls: Vec<_> = need.calls.iter().map(call_with_conditions).collect();
        writeln!(page, "| {} | {} |", need.purpose, calls.join(", ")).unwrap();
    }
}

fn page() -> String {
    let mut page = START.to_owned();
    page.push_str("\n## Every thread\n");
    rows(&mut page, &needs::EVERY_THREAD);
    for kind in ThreadKind::ALL {
        writeln!(page, "\n## {}\n\n{}", kind.name(), about(kind)).unwrap();
        let own = needs::own(kind);
        if !own.is_empty() {
            rows(&mut page, own);
        }
    }
    page.push_str("\n## Which thread may make which call\n\n");
    page.push_str(
        "`x`: with any arguments. `a`: its arguments are checked, as above. The spawner may do all that the threads \
         may do\nthat it starts, and no thread may do more.\n\n",
    );
    let tables: Vec<_> = ThreadKind::ALL.into_iter().map(allowed_calls).collect();
    let all: BTreeMap<_, _> = tables
        .iter()
        .flat_map(|table| table.keys())
        .map(|call| (calls::name(*call).unwrap(), *call))
        .collect();
    let names: Vec<_> = ThreadKind::ALL.iter().map(|kind| kind.name()).collect();
    writeln!(page, "| call | {} |", names.join(" | ")).unwrap();
    writeln!(page, "|---|{}", "---|".repeat(names.len())).unwrap();
    for (name, number) in all {
        let cells = tables.iter().map(|table| match table.get(&number) {
            None => "",
            Some(_) if number == libc::SYS_clone3 => "fails",
            Some(conditions) if conditions.is_empty() => "x",
            Some(_) => "a",
        });
        writeln!(page, "| `{name}` | {} |", cells.collect::<Vec<_>>().join(" | ")).unwrap();
    }
    page
}

fn about(kind: ThreadKind) -> &'static str {
    match kind {
        ThreadKind::Main => "Has put the machine together, and waits for its end. It needs nothing else.",
        ThreadKind::Spawner => {
            "Starts the other threads, which begin with its filter and add their own. So it may also do all that those \
             of the\nother sections may do, except `main`. `clone3` fails as on a kernel that does not know it: its \
             flags are in\nmemory, where a filter cannot see them, and `clone` is used instead."
        }
        ThreadKind::Vcpu => {
            "Runs a vCPU, and serves the devices that have no thread: the console, virtio-rng, virtio-mem."
        }
        ThreadKind::Vsock => "Moves the streams of the vsock device.",
        ThreadKind::Net => {
            "Moves the frames of a pair of a network device's queues, or serves its control queue."
        }
        ThreadKind::Blk => "Serves a disk.",
        ThreadKind::Fs => "Serves the share. It is the only one that opens files.",
        ThreadKind::Descriptors => "Takes the files of disks that are inserted later.",
        ThreadKind::DiskRemoval => "Takes a disk out and closes its files.",
        ThreadKind::Control => {
            "Serves the controller's calls, with threads that it starts itself. They have its filter."
        }
    }
}

#[test]
fn the_page_of_system_calls_is_what_the_filters_allow() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/seccomp.md");
    let page = page();
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &page).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(written == page, "docs/seccomp.md is out of date; it says itself how to write it again");
}
