//! The rules as a command, for whoever has changed something: `scripts/tidy` and `scripts/modules` run it.

use std::{env, fs, process::ExitCode};

use anyhow::{Context, Result, bail};
use pericarp_tidy::{
    RULES, check,
    exceptions::{self, FILE},
    modules::PAGE,
    picture,
    repository::Repository,
};

fn main() -> Result<ExitCode> {
    let repository = Repository::read()?;
    match env::args().nth(1).as_deref() {
        None | Some("check") => report(&repository),
        Some("shrink") => rewrite(&repository, false),
        Some("accept") => rewrite(&repository, true),
        Some("modules") => {
            let page = picture::page(&repository)?;
            fs::write(repository.root.join(PAGE), page).with_context(|| format!("write {PAGE}"))?;
            Ok(ExitCode::SUCCESS)
        }
        Some(other) => bail!("{other}: not one of check, shrink, accept, modules"),
    }
}

/// Prints every complaint; fails if there is one.
fn report(repository: &Repository) -> Result<ExitCode> {
    let violations = check(repository)?;
    let listed = exceptions::parse(&repository.text(FILE)?)?;
    let complaints: Vec<String> =
        RULES.iter().flat_map(|rule| exceptions::complaints(rule, &violations, &listed)).collect();
    for complaint in &complaints {
        println!("{complaint}");
    }
    println!(
        "{} complaints; {} exceptions are listed in {FILE}",
        complaints.len(),
        listed.values().sum::<usize>()
    );
    Ok(if complaints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Writes the exceptions anew: without those that are not needed, and with new ones only if `accepts_new`.
fn rewrite(repository: &Repository, accepts_new: bool) -> Result<ExitCode> {
    let violations = check(repository)?;
    let path = repository.root.join(FILE);
    let exceptions = if accepts_new {
        exceptions::count(&violations)
    } else {
        exceptions::shrunk(&violations, &exceptions::parse(&repository.text(FILE)?)?)
    };
    fs::write(&path, exceptions::render(&exceptions)).with_context(|| format!("write {FILE}"))?;
    println!("{} exceptions are listed in {FILE}", exceptions.values().sum::<usize>());
    Ok(ExitCode::SUCCESS)
}
