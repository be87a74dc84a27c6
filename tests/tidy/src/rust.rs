//! Rust source, taken apart into code and comments line by line. It is no parser: it knows comments, strings and
//! braces.

/// One line of Rust source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// The code, with comments left out and the content of strings and characters blanked.
    pub code: String,
    /// The text of the comment, without its marker.
    pub comment: Option<String>,
    /// Whether the comment is documentation (`///` or `//!`).
    pub is_doc: bool,
    /// Whether the line is inside a module that is compiled for tests only.
    pub is_test: bool,
}

impl Line {
    /// Whether there is nothing on the line but a comment.
    pub fn is_comment_only(&self) -> bool {
        self.comment.is_some() && self.code.trim().is_empty()
    }
}

/// Where the text of a file is at a character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Code,
    LineComment,
    /// Block comments nest.
    BlockComment(usize),
    String,
    /// A raw string that ends with a quote and this many hashes.
    RawString(usize),
}

/// Takes a file apart.
pub fn lines(text: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut state = State::Code;
    for line in text.lines() {
        let mut split = Line::default();
        state = split_line(line, state, &mut split);
        lines.push(split);
    }
    mark_test_modules(&mut lines);
    lines
}

/// Splits one line that begins in `state`; returns the state at its end.
fn split_line(line: &str, mut state: State, split: &mut Line) -> State {
    let characters: Vec<char> = line.chars().collect();
    let at = |index: usize| characters.get(index).copied().unwrap_or('\n');
    let mut comment = String::new();
    if matches!(state, State::BlockComment(_)) {
        split.comment = Some(String::new());
    }
    let mut index = 0;
    while index < characters.len() {
        let character = characters[index];
        match state {
            State::Code if character == '/' && at(index + 1) == '/' => {
                split.is_doc = at(index + 2) == '!' || (at(index + 2) == '/' && at(index + 3) != '/');
                split.comment = Some(String::new());
                index += if split.is_doc { 2 } else { 1 };
                state = State::LineComment;
            }
            State::Code if character == '/' && at(index + 1) == '*' => {
                split.comment = Some(String::new());
                index += 1;
                state = State::BlockComment(1);
            }
            State::Code if character == '"' => {
                split.code.push('"');
                state = State::String;
            }
            State::Code if character == 'r' && !is_word(split.code.chars().last()) => {
                let hashes = characters[index + 1..].iter().take_while(|next| **next == '#').count();
                split.code.push('r');
                if at(index + 1 + hashes) == '"' {
                    split.code.push('"');
                    index += 1 + hashes;
                    state = State::RawString(hashes);
                }
            }
            // A lifetime has no second quote; a character has one, after an escape or right away.
            State::Code if character == '\'' && (at(index + 1) == '\\' || at(index + 2) == '\'') => {
                split.code.push_str("' '");
                index += if at(index + 1) == '\\' { 3 } else { 2 };
                while index < characters.len() && characters[index] != '\'' {
                    index += 1;
                }
            }
            State::Code => split.code.push(character),
            State::BlockComment(depth) if character == '*' && at(index + 1) == '/' => {
                index += 1;
                state = if depth == 1 { State::Code } else { State::BlockComment(depth - 1) };
            }
            State::BlockComment(depth) if character == '/' && at(index + 1) == '*' => {
                index += 1;
                state = State::BlockComment(depth + 1);
            }
            State::LineComment | State::BlockComment(_) => comment.push(character),
            State::String if character == '\\' => index += 1,
            State::String if character == '"' => {
                split.code.push('"');
                state = State::Code;
            }
            State::RawString(hashes)
                if character == '"' && (1..=hashes).all(|offset| at(index + offset) == '#') =>
            {
                split.code.push('"');
                index += hashes;
                state = State::Code;
            }
            State::String | State::RawString(_) => {}
        }
        index += 1;
    }
    if split.comment.is_some() {
        split.comment = Some(comment.trim().to_owned());
    }
    if state == State::LineComment { State::Code } else { state }
}

fn is_word(character: Option<char>) -> bool {
    character.is_some_and(|character| character.is_alphanumeric() || character == '_')
}

/// The words of a line of code, each with its position.
pub fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|character: char| !is_word(Some(character))).filter(|word| !word.is_empty())
}

/// Marks the lines of modules and functions behind `#[cfg(test)]`.
fn mark_test_modules(lines: &mut [Line]) {
    let mut depth = 0_usize;
    let mut is_pending = false;
    let mut test_until = None;
    for line in lines {
        if test_until.is_none() && line.code.contains("#[cfg(test)]") {
            is_pending = true;
        }
        line.is_test = is_pending || test_until.is_some();
        for character in line.code.chars() {
            match character {
                '{' => {
                    if is_pending {
                        is_pending = false;
                        test_until = Some(depth);
                    }
                    depth += 1;
                }
                '}' => {
                    depth = depth.saturating_sub(1);
                    if test_until == Some(depth) {
                        test_until = None;
                    }
                }
                ';' => is_pending = false,
                _ => {}
            }
        }
    }
}

/// The names of modules in files of their own that are compiled for tests only.
pub fn test_modules(lines: &[Line]) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_pending = false;
    for line in lines {
        let code = line.code.trim();
        if code == "#[cfg(test)]" {
            is_pending = true;
        } else if is_pending && !code.starts_with('#') && !code.is_empty() {
            is_pending = false;
            let declared = code.strip_suffix(';').and_then(|code| code.rsplit_once("mod "));
            names.extend(declared.map(|(_, name)| name.to_owned()));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(text: &str) -> Vec<String> {
        lines(text).into_iter().map(|line| line.code).collect()
    }

    #[test]
    fn strings_and_characters_are_blanked_and_comments_left_out() {
        assert_eq!(codes("f(\"unsafe // {\"); // unsafe"), ["f(\"\"); "]);
        assert_eq!(
            codes("f(r#\"a \" {\"#, '\\'', '{', b'\"'); let x: &'a str;"),
            ["f(r\"\", ' ', ' ', b' '); let x: &'a str;"]
        );
        assert_eq!(codes("one /* two\nthree */ four"), ["one ", " four"]);
        assert_eq!(codes("\"two\nlines {\" }"), ["\"", "\" }"]);
    }

    #[test]
    fn documentation_is_told_from_other_comments() {
        let of = |text: &str| lines(text).remove(0);
        assert_eq!((of("/// a").comment.as_deref(), of("/// a").is_doc), (Some("a"), true));
        assert_eq!((of("//! a").comment.as_deref(), of("//! a").is_doc), (Some("a"), true));
        assert_eq!((of("x // a").comment.as_deref(), of("x // a").is_doc), (Some("a"), false));
        assert!(!of("//// a").is_doc && of("x").comment.is_none());
    }

    #[test]
    fn lines_of_a_test_module_are_marked() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() { }\n}\nfn c() {}\n\
            #[cfg(test)]\nmod d;\nfn e() {}";
        let marked: Vec<bool> = lines(text).into_iter().map(|line| line.is_test).collect();
        assert_eq!(marked, [false, true, true, true, true, false, true, true, false]);
        assert_eq!(test_modules(&lines(text)), ["d"]);
    }
}
