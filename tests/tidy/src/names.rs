//! Rules about names: those that docs/style.md calls riddles.

use crate::{
    Violation,
    repository::{File, Language},
    rust,
    style::Style,
};

/// Checks one file.
pub fn check(file: &File, style: &Style) -> Vec<Violation> {
    if file.language != Language::Rust {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (number, line) in file.rust.iter().enumerate() {
        let words: Vec<&str> = rust::words(&line.code).collect();
        for pair in words.windows(2) {
            let (rule, names) = match pair[0] {
                "struct" | "enum" | "trait" | "type" | "union" => ("riddle-type", &style.riddle_types),
                "fn" => ("riddle-function", &style.riddle_functions),
                _ => continue,
            };
            if names.iter().any(|name| name == pair[1]) {
                let message = format!("`{}`: use the field's term for it, or say what it does", pair[1]);
                found.push(Violation { rule, place: file.path.clone(), line: number + 1, message });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn riddles_are_found_where_they_are_defined() {
        let style = Style {
            riddle_types: vec!["Kept".to_owned()],
            riddle_functions: vec!["fit".to_owned()],
            ..Style::default()
        };
        let text =
            "pub(crate) struct Kept;\nenum Keptness {}\nasync fn fit() {}\nfn fit_all() { Kept; fit() }\n";
        let found = check(&File::new("a.rs", Language::Rust, text, false), &style);
        let places: Vec<_> = found.iter().map(|violation| (violation.rule, violation.line)).collect();
        assert_eq!(places, [("riddle-type", 1), ("riddle-function", 3)]);
    }
}
