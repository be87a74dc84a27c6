//! What still violates the rules: a ratchet, which can only be tightened.
//!
//! Each line of `tests/tidy/exceptions` is "RULE COUNT PLACE": this many violations of the rule are in the place. More
//! of them fail the check as anywhere else. Fewer fail it as well, until the file has been rewritten (`scripts/tidy
//! shrink`), so that a place that has become better stays so.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context, Result, ensure};

use crate::Violation;

/// Where the exceptions are listed.
pub const FILE: &str = "tests/tidy/exceptions";

const HEADING: &str = "\
# What still violates docs/style.md: RULE COUNT PLACE. The list may only become shorter (scripts/tidy shrink).
";

/// How many violations of a rule there are in a place.
pub type Exceptions = BTreeMap<(String, String), usize>;

/// Reads the file's text.
pub fn parse(text: &str) -> Result<Exceptions> {
    let mut exceptions = Exceptions::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let context = || format!("{FILE}: not \"RULE COUNT PLACE\": {line}");
        let mut parts = line.splitn(3, ' ');
        let mut next = || parts.next().with_context(context);
        let (rule, count, place) = (next()?, next()?.parse().with_context(context)?, next()?);
        ensure!(count > 0, context());
        let earlier = exceptions.insert((rule.to_owned(), place.to_owned()), count);
        ensure!(earlier.is_none(), "{FILE}: listed twice: {line}");
    }
    Ok(exceptions)
}

/// The file's text.
pub fn render(exceptions: &Exceptions) -> String {
    let mut text = HEADING.to_owned();
    for ((rule, place), count) in exceptions {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{rule} {count} {place}");
    }
    text
}

/// How many violations of each rule there are in each place.
pub fn count(violations: &[Violation]) -> Exceptions {
    let mut exceptions = Exceptions::new();
    for violation in violations {
        *exceptions.entry((violation.rule.to_owned(), violation.place.clone())).or_default() += 1;
    }
    exceptions
}

/// What is wrong with a rule in the repository: violations beyond the listed ones, and exceptions that are not needed.
pub fn complaints(rule: &str, violations: &[Violation], listed: &Exceptions) -> Vec<String> {
    let found = count(violations);
    let mut complaints = Vec::new();
    for violation in violations.iter().filter(|violation| violation.rule == rule) {
        let key = (rule.to_owned(), violation.place.clone());
        let (now, allowed) = (found[&key], listed.get(&key).copied().unwrap_or_default());
        if now > allowed {
            let note =
                if allowed > 0 { format!(" ({now} are here, {allowed} are listed)") } else { String::new() };
            complaints.push(format!("{violation}{note}"));
        }
    }
    for ((listed_rule, place), allowed) in listed.iter().filter(|((listed_rule, _), _)| listed_rule == rule) {
        let now = found.get(&(listed_rule.clone(), place.clone())).copied().unwrap_or_default();
        if now < *allowed {
            complaints.push(format!(
                "{FILE} lists {allowed} of {rule} in {place}, and {now} are left: scripts/tidy shrink"
            ));
        }
    }
    complaints
}

/// The exceptions after the file has been rewritten: never more than are listed.
pub fn shrunk(violations: &[Violation], listed: &Exceptions) -> Exceptions {
    let found = count(violations);
    let smaller = |((rule, place), allowed): (&(String, String), &usize)| {
        let key = (rule.clone(), place.clone());
        let now = found.get(&key).copied().unwrap_or_default().min(*allowed);
        (now > 0).then_some((key, now))
    };
    listed.iter().filter_map(smaller).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(place: &str) -> Violation {
        Violation { rule: "phrase", place: place.to_owned(), line: 1, message: "m".to_owned() }
    }

    #[test]
    fn more_than_is_listed_and_less_than_is_listed_are_both_complained_of() {
        let listed = parse("# heading\nphrase 1 a.rs\nphrase 1 b.rs\ntodo 1 a.rs\n").unwrap();
        let violations = [violation("a.rs"), violation("a.rs"), violation("c.rs")];
        let complaints = complaints("phrase", &violations, &listed);
        assert_eq!(complaints.len(), 4, "{complaints:?}");
        assert!(complaints[0].contains("2 are here, 1 are listed"), "{complaints:?}");
        assert!(complaints[3].contains("b.rs, and 0 are left"), "{complaints:?}");
    }

    #[test]
    fn what_is_listed_exactly_is_not_complained_of() {
        let listed = parse("phrase 1 a.rs\n").unwrap();
        assert_eq!(complaints("phrase", &[violation("a.rs")], &listed), Vec::<String>::new());
    }

    #[test]
    fn shrinking_never_adds_anything() {
        let listed = parse("phrase 2 a.rs\nphrase 1 b.rs\n").unwrap();
        let shrunk = shrunk(&[violation("a.rs"), violation("c.rs")], &listed);
        assert_eq!(parse(&render(&shrunk)).unwrap(), parse("phrase 1 a.rs\n").unwrap());
    }

    #[test]
    fn a_line_that_is_not_in_the_format_is_an_error() {
        for text in ["phrase a.rs", "phrase 0 a.rs", "phrase 1 a.rs\nphrase 2 a.rs"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
