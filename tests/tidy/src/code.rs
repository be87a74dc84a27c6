//! Rules about code that may panic or that the compiler does not check.

use crate::{
    Violation,
    repository::{File, Language},
    rust::{self, Line},
};

/// How many lines above `unsafe` its SAFETY comment may begin.
const SAFETY_DISTANCE: usize = 10;

/// Checks one file.
pub fn check(file: &File) -> Vec<Violation> {
    if file.language != Language::Rust {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in file.rust.iter().enumerate() {
        let before = &file.rust[..number];
        if !file.is_test && !line.is_test && may_panic(line) && !has_reason(line, before.last()) {
            let message = "say on this line or the one above why it cannot fail".to_owned();
            found.push(Violation { rule: "unwrap", place: file.path.clone(), line: number + 1, message });
        }
        let is_unsafe = rust::words(&line.code).any(|word| word == "unsafe");
        if is_unsafe && !has_safety(line, &before[number.saturating_sub(SAFETY_DISTANCE)..]) {
            let message = "say in a SAFETY comment why it is sound".to_owned();
            found.push(Violation { rule: "unsafe", place: file.path.clone(), line: number + 1, message });
        }
    }
    found
}

fn may_panic(line: &Line) -> bool {
    line.code.contains(".unwrap()") || line.code.contains(".expect(")
}

fn has_reason(line: &Line, before: Option<&Line>) -> bool {
    [Some(line), before]
        .into_iter()
        .flatten()
        .any(|line| line.comment.is_some() || line.code.contains("reason ="))
}

fn has_safety(line: &Line, before: &[Line]) -> bool {
    let comments = before.iter().chain([line]).filter_map(|line| line.comment.as_deref());
    comments.into_iter().any(|comment| comment.contains("SAFETY") || comment.contains("# Safety"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str, is_test: bool) -> Vec<&'static str> {
        let violations = check(&File::new("a.rs", Language::Rust, text, is_test));
        violations.into_iter().map(|violation| violation.rule).collect()
    }

    #[test]
    fn what_may_panic_has_its_reason_beside_it() {
        assert_eq!(rules("x.unwrap();\ny.expect(\"\");", false), ["unwrap", "unwrap"]);
        assert!(rules("x.unwrap(); // It was checked above.", false).is_empty());
        assert!(rules("// It was checked above.\nx.unwrap();", false).is_empty());
        assert!(rules("x.unwrap_or(1); \".unwrap()\"", false).is_empty());
        assert!(rules("x.unwrap();", true).is_empty());
        assert!(rules("#[cfg(test)]\nmod tests {\n\n    fn f() { x.unwrap() }\n}", false).is_empty());
    }

    #[test]
    fn what_is_unsafe_says_why_it_is_sound_in_tests_too() {
        assert_eq!(rules("unsafe { f() }", true), ["unsafe"]);
        assert!(rules("// SAFETY: f has no conditions.\nlet x =\n    unsafe { f() };", true).is_empty());
        assert!(rules("unshare_unsafe(); // nothing\n\"unsafe\"", true).is_empty());
    }
}
