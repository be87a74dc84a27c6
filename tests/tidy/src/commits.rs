//! Rules about commit messages (CONTRIBUTING.md).

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

/// Characters of a subject.
const SUBJECT_MAX: usize = 100;
/// Words of a subject that says enough without a body.
const WORDS_MIN: usize = 4;
/// First words that end like a past, a participle or a third person and are imperatives.
const IMPERATIVES: [&str; 12] = [
    "Address", "Bring", "Discuss", "Dismiss", "Embed", "Express", "Feed", "Need", "Pass", "Process", "Shed",
    "Speed",
];

/// A commit's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    pub id: String,
    pub subject: String,
    pub body: String,
}

/// The last commits of a repository, merges left out; an error, which says why, where git knows none.
pub fn last(root: &Path, count: usize) -> Result<Vec<Commit>> {
    if !root.join(".git").exists() {
        bail!("there is no .git in {}", root.display());
    }
    let count = format!("--max-count={count}");
    let arguments = ["log", "--no-merges", &count, "--format=%h%x00%s%x00%b%x01"];
    let output = match Command::new("git").arg("-C").arg(root).args(arguments).output() {
        Ok(output) => output,
        Err(error) => bail!("git cannot be run: {error}"),
    };
    if !output.status.success() {
        bail!("git log: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

fn parse(log: &str) -> Vec<Commit> {
    let commit = |record: &str| {
        let mut fields = record.trim_start().splitn(3, '\0').map(str::to_owned);
        Some(Commit { id: fields.next()?, subject: fields.next()?, body: fields.next()? })
    };
    log.split('\u{1}').filter_map(commit).collect()
}

/// What is wrong with a message.
pub fn complaints(commit: &Commit) -> Vec<String> {
    let Commit { id, subject, body } = commit;
    let mut found = Vec::new();
    let length = subject.chars().count();
    if length > SUBJECT_MAX {
        found.push(format!("the subject has {length} characters, more than {SUBJECT_MAX}"));
    }
    if subject.ends_with('.') {
        found.push("the subject ends with a full stop".to_owned());
    }
    if !is_imperative(subject) {
        found.push(
            "the subject does not begin with a capitalised imperative (\"Add\", not \"Added\" or \"adds\")"
                .to_owned(),
        );
    }
    if body.trim().is_empty() && subject.split_whitespace().count() < WORDS_MIN {
        found.push("the subject is too short to say why by itself; add a body".to_owned());
    }
    found.into_iter().map(|complaint| format!("{id} {subject:?}: {complaint}")).collect()
}

fn is_imperative(subject: &str) -> bool {
    let word: String = subject.chars().take_while(|character| character.is_alphabetic()).collect();
    let is_other_form = ["ed", "ing", "s"].iter().any(|ending| word.ends_with(ending));
    let is_article = ["A", "An", "It", "The", "These", "This", "We"].contains(&word.as_str());
    word.starts_with(char::is_uppercase)
        && !is_article
        && (!is_other_form || IMPERATIVES.contains(&word.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(subject: &str, body: &str) -> usize {
        complaints(&Commit { id: "1".to_owned(), subject: subject.to_owned(), body: body.to_owned() }).len()
    }

    #[test]
    fn a_good_message_is_not_complained_of() {
        assert_eq!(count("Keep one file from holding up a pod's files", ""), 0);
        assert_eq!(count("Fix typo", "It was wrong."), 0);
        assert_eq!(count("Pass the limit on to the guest", ""), 0);
    }

    #[test]
    fn each_fault_of_a_message_is_found() {
        assert_eq!(count(&format!("Add {}", "x ".repeat(60)), ""), 1);
        assert_eq!(count("Add a limit to the guest.", ""), 1);
        for subject in
            ["add a limit to it", "Added a limit to it", "Adds a limit to it", "The limit is added"]
        {
            assert_eq!(count(subject, ""), 1, "{subject}");
        }
        assert_eq!(count("Fix typo", ""), 1);
    }

    #[test]
    fn messages_are_read_from_the_log() {
        let commits = parse("1\0Add one\0Why.\n\u{1}\n2\0Add two\0\u{1}\n");
        let read: Vec<_> =
            commits.iter().map(|commit| (commit.subject.as_str(), commit.body.as_str())).collect();
        assert_eq!(read, [("Add one", "Why.\n"), ("Add two", "")]);
    }
}
