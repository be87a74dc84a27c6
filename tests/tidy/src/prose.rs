//! Rules about the English of comments and documentation.

use crate::{
    Violation,
    repository::{File, Language},
    rust::Line,
    style::{PAGE, Style},
};

/// A paragraph: the text of successive lines, which begins at a line.
struct Paragraph {
    line: usize,
    text: String,
}

/// Checks one file.
pub fn check(file: &File, style: &Style) -> Vec<Violation> {
    if file.path == PAGE {
        return Vec::new();
    }
    let mut found = Vec::new();
    for paragraph in paragraphs(file) {
        phrases(file, &paragraph, style, &mut found);
        if file.language == Language::Rust {
            insider(file, &paragraph, style, &mut found);
        }
    }
    found
}

fn paragraphs(file: &File) -> Vec<Paragraph> {
    let line_text = |number: usize, line: &str| -> Option<String> {
        match file.language {
            Language::Rust => file.rust.get(number)?.comment.clone(),
            Language::Markdown => Some(line.trim().to_owned()),
            Language::Shell => line.trim_start().strip_prefix('#').map(|text| text.trim().to_owned()),
        }
    };
    let mut paragraphs: Vec<Paragraph> = Vec::new();
    let mut goes_on = false;
    for (number, line) in file.text.lines().enumerate() {
        let text = line_text(number, line).filter(|text| !text.is_empty());
        let is_alone =
            file.language != Language::Rust || file.rust.get(number).is_some_and(Line::is_comment_only);
        match (text, paragraphs.last_mut()) {
            (Some(text), Some(last)) if goes_on && is_alone => {
                last.text.push(' ');
                last.text.push_str(&text);
            }
            (Some(text), _) => {
                paragraphs.push(Paragraph { line: number + 1, text });
                goes_on = is_alone;
            }
            (None, _) => goes_on = false,
        }
    }
    paragraphs
}

fn phrases(file: &File, paragraph: &Paragraph, style: &Style, found: &mut Vec<Violation>) {
    // What is quoted from code is a name, not English.
    let prose: Vec<&str> = paragraph.text.split('`').step_by(2).collect();
    let text = format!(" {} ", spaced(&prose.join(" ` ")));
    for phrase in &style.phrases {
        for _ in text.matches(&format!(" {} ", spaced(phrase))) {
            let message = format!("\"{phrase}\": see {PAGE} for what to write instead");
            let (place, line) = (file.path.clone(), paragraph.line);
            found.push(Violation { rule: "phrase", place, line, message });
        }
    }
}

/// The words of a text in small letters, with one space between them. Where a sentence, a part of it or a cell of a
/// table ends, `x0` stands between them.
fn spaced(text: &str) -> String {
    let lower = text.to_lowercase().replace(['.', ',', ';', ':', '|', '`'], " x0 ");
    let words = lower.split(|character: char| !character.is_alphanumeric() && character != '\'');
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn insider(file: &File, paragraph: &Paragraph, style: &Style, found: &mut Vec<Violation>) {
    let is_one = |beginning: &String| {
        // A beginning that ends with a full stop is the whole comment.
        paragraph.text.strip_prefix(beginning.as_str()).is_some_and(|rest| {
            if beginning.ends_with('.') { rest.is_empty() } else { !rest.starts_with(char::is_alphanumeric) }
        })
    };
    if let Some(beginning) = style.insider_beginnings.iter().find(|beginning| is_one(beginning)) {
        let message = format!("a comment that begins with \"{beginning}\" does not say what it is about");
        let (place, line) = (file.path.clone(), paragraph.line);
        found.push(Violation { rule: "insider-comment", place, line, message });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, language: Language, text: &str) -> Vec<&'static str> {
        let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect();
        let style = Style {
            phrases: list(&["but for"]),
            insider_beginnings: list(&["The same", "Undoes it."]),
            ..Style::default()
        };
        let violations = check(&File::new(path, language, text, false), &style);
        violations.into_iter().map(|violation| violation.rule).collect()
    }

    #[test]
    fn a_phrase_is_found_in_comments_and_pages_also_across_lines() {
        assert_eq!(rules("a.rs", Language::Rust, "/// all but for one"), ["phrase"]);
        assert_eq!(
            rules("a.rs", Language::Rust, "// All but\n// for one, but for two."),
            ["phrase", "phrase"]
        );
        assert_eq!(rules("a.md", Language::Markdown, "Nothing But\nfor it."), ["phrase"]);
        assert_eq!(rules("a.sh", Language::Shell, "# all but for one"), ["phrase"]);
    }

    #[test]
    fn a_phrase_is_not_found_in_code_in_parts_of_words_or_across_paragraphs() {
        assert!(rules("a.rs", Language::Rust, "f(\"but for\"); // but\nlet x = 1; // for").is_empty());
        assert!(rules("a.rs", Language::Rust, "// tribut for butform, or `all_but_for`").is_empty());
        assert!(rules("a.md", Language::Markdown, "but\n\nfor, but. For | but | for").is_empty());
        assert!(rules(PAGE, Language::Markdown, "but for").is_empty());
    }

    #[test]
    fn a_comment_that_only_insiders_understand_is_found() {
        assert_eq!(rules("a.rs", Language::Rust, "/// The same, for reading."), ["insider-comment"]);
        assert_eq!(rules("a.rs", Language::Rust, "/// Undoes it."), ["insider-comment"]);
        assert!(rules("a.rs", Language::Rust, "/// Undoes it. But how?\n\n// The sameness").is_empty());
    }
}
