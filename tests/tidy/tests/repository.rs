//! The rules, run on this repository: one test for each, so that a failure names what to look up in docs/style.md.

use std::{
    io::{self, Write as _},
    sync::LazyLock,
};

use anyhow::{Result, anyhow};
use pericarp_tidy::{
    RULES, Violation, check, commits, docs,
    exceptions::{self, FILE},
    fault_points,
    modules::PAGE,
    picture,
    repository::Repository,
};

/// Commits that are looked at: those that a change may still be rewritten with, and some more.
const COMMITS: usize = 50;

/// The repository and what violates the rules about files, read once for all tests.
static READ: LazyLock<Result<(Repository, Vec<Violation>)>> = LazyLock::new(|| {
    let repository = Repository::read()?;
    let violations = check(&repository)?;
    Ok((repository, violations))
});

fn read() -> Result<&'static (Repository, Vec<Violation>)> {
    READ.as_ref().map_err(|error| anyhow!("{error:#}"))
}

fn repository() -> Result<&'static Repository> {
    Ok(&read()?.0)
}

/// Fails with what is wrong.
fn assert_nothing(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Fails with the violations of some rules that are not listed, and with exceptions that are not needed any more.
fn assert_kept(rules: &[&str]) -> Result<()> {
    let (repository, violations) = read()?;
    let listed = exceptions::parse(&repository.text(FILE)?)?;
    let complaints = rules.iter().flat_map(|rule| exceptions::complaints(rule, violations, &listed));
    assert_nothing(&complaints.collect::<Vec<_>>());
    Ok(())
}

#[test]
fn lines_have_120_columns_at_most() -> Result<()> {
    assert_kept(&["long-line"])
}

#[test]
fn modules_are_short_and_their_names_say_what_is_in_them() -> Result<()> {
    assert_kept(&["long-module", "vague-module-name"])
}

#[test]
fn nothing_is_left_to_do() -> Result<()> {
    assert_kept(&["todo"])
}

#[test]
fn comments_and_pages_are_in_natural_english() -> Result<()> {
    assert_kept(&["phrase"])
}

#[test]
fn comments_name_what_they_are_about() -> Result<()> {
    assert_kept(&["insider-comment"])
}

#[test]
fn names_are_no_riddles() -> Result<()> {
    assert_kept(&["riddle-type", "riddle-function"])
}

#[test]
fn what_may_panic_says_why_it_does_not() -> Result<()> {
    assert_kept(&["unwrap"])
}

#[test]
fn what_is_unsafe_says_why_it_is_sound() -> Result<()> {
    assert_kept(&["unsafe"])
}

#[test]
fn rooms_use_only_rooms_beside_and_below_them() -> Result<()> {
    assert_kept(&["unlisted-room", "circle", "upward-arrow"])
}

#[test]
fn every_exception_is_for_a_rule_that_exists() -> Result<()> {
    let listed = exceptions::parse(&repository()?.text(FILE)?)?;
    let unknown = listed.keys().filter(|(rule, _)| !RULES.contains(&rule.as_str()));
    assert_nothing(
        &unknown.map(|(rule, place)| format!("{FILE}: no rule {rule}, of {place}")).collect::<Vec<_>>(),
    );
    Ok(())
}

#[test]
fn the_pictures_of_the_modules_are_up_to_date() -> Result<()> {
    let repository = Repository::read()?;
    assert!(
        picture::page(&repository)? == repository.text(PAGE)?,
        "{PAGE} is out of date: run scripts/modules"
    );
    Ok(())
}

#[test]
fn every_field_and_call_has_its_row_and_no_row_is_about_anything_else() -> Result<()> {
    assert_nothing(&docs::compatibility_rows(repository()?)?);
    Ok(())
}

#[test]
fn every_test_that_a_row_names_exists() -> Result<()> {
    assert_nothing(&docs::compatibility_tests(repository()?)?);
    Ok(())
}

#[test]
fn every_boundary_of_the_threat_model_names_tests_that_exist() -> Result<()> {
    assert_nothing(&docs::threat_model_tests(repository()?)?);
    Ok(())
}

#[test]
fn every_path_on_a_page_leads_somewhere() -> Result<()> {
    assert_nothing(&docs::stale_paths(repository()?));
    Ok(())
}

#[test]
fn every_fault_point_is_one_at_which_a_test_stops_the_controller() -> Result<()> {
    assert_nothing(&fault_points::complaints(repository()?)?);
    Ok(())
}

#[test]
fn every_test_whose_duration_is_recorded_exists() -> Result<()> {
    assert_nothing(&docs::durations(repository()?)?);
    Ok(())
}

#[test]
fn commit_messages_are_in_the_repositorys_form() -> Result<()> {
    match commits::last(&repository()?.root, COMMITS) {
        Ok(commits) => assert_nothing(&commits.iter().flat_map(commits::complaints).collect::<Vec<_>>()),
        // The test harness captures what `eprintln!` writes, but not this.
        Err(error) => writeln!(io::stderr(), "\ncommit messages are not checked: {error:#}")?,
    }
    Ok(())
}
