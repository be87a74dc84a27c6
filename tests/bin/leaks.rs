//! Says what a run left behind on a node.
//!
//! `leaks save FILE` before it, `leaks compare FILE` after it: removes the pods that tests had one after the other,
//! prints what is new, and fails if there is anything.

use std::{collections::BTreeSet, env, fs, process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, bail};
use pericarp_tests::node::{leaks, pool};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["save", file] => {
            fs::write(file, serde_json::to_vec(&leaks::snapshot()?)?)
                .with_context(|| format!("write {file}"))?;
            Ok(ExitCode::SUCCESS)
        }
        ["compare", file] => {
            pool::remove_all().await?;
            let before = fs::read(file).with_context(|| format!("read {file}"))?;
            compare(&serde_json::from_slice(&before)?)
        }
        _ => bail!("usage: leaks save|compare FILE"),
    }
}

fn compare(before: &BTreeSet<String>) -> Result<ExitCode> {
    // A shim of containerd's ends a moment after its pod was removed.
    let mut left = leaks::new_since(before, &leaks::snapshot()?);
    for _ in 0..20 {
        if left.is_empty() {
            println!("leaks: nothing is left behind");
            return Ok(ExitCode::SUCCESS);
        }
        thread::sleep(Duration::from_millis(250));
        left = leaks::new_since(before, &leaks::snapshot()?);
    }
    println!("leaks: left behind:");
    for line in left {
        println!("leaks:   {line}");
    }
    Ok(ExitCode::FAILURE)
}
