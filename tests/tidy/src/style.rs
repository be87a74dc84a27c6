//! The lists of docs/style.md that the rules read.

use anyhow::{Context, Result, ensure};

use crate::repository::Repository;

/// The page itself, which has to quote what it forbids.
pub const PAGE: &str = "docs/style.md";

/// The lists of the style page.
#[derive(Clone, Debug, Default)]
pub struct Style {
    /// Phrases that are not used in comments and documentation.
    pub phrases: Vec<String>,
    /// Words with which no comment begins, because its subject is missing.
    pub insider_beginnings: Vec<String>,
    /// Names that no type has.
    pub riddle_types: Vec<String>,
    /// Names that no function has.
    pub riddle_functions: Vec<String>,
}

impl Style {
    /// Reads the lists of the page.
    pub fn read(repository: &Repository) -> Result<Self> {
        Self::parse(&repository.text(PAGE)?)
    }

    /// Reads the lists: each is what stands between backquotes in the paragraph or table after its marker.
    pub fn parse(page: &str) -> Result<Self> {
        let list = |name: &str| -> Result<Vec<String>> {
            let marker = format!("<!-- list: {name} -->");
            let (_, rest) = page.split_once(&marker).with_context(|| format!("no {marker} in {PAGE}"))?;
            let block = rest.trim_start().split("\n\n").next().unwrap_or_default();
            // Only the first column of a table counts; the second says what to write instead.
            let counts = |line: &str| -> String {
                let cell = line.strip_prefix('|').and_then(|cells| cells.split('|').next());
                cell.unwrap_or(line).to_owned()
            };
            let text = block.lines().map(counts).collect::<Vec<_>>().join(" ");
            let items: Vec<String> = text.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            ensure!(!items.is_empty(), "nothing is listed after {marker} in {PAGE}");
            Ok(items)
        };
        Ok(Self {
            phrases: list("phrases")?,
            insider_beginnings: list("insider beginnings")?,
            riddle_types: list("riddle types")?,
            riddle_functions: list("riddle functions")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_from_paragraphs_and_from_the_first_column_of_tables() {
        let page = "<!-- list: phrases -->\n| not | but |\n|---|---|\n| `a`, `b` | `c` |\n\n\
            <!-- list: insider beginnings -->\n\
            `d`\n\n<!-- list: riddle types -->\n`E\nE`,\n`F`\n\n<!-- list: riddle functions -->\n`g`\n";
        let style = Style::parse(page).unwrap();
        assert_eq!(style.phrases, ["a", "b"]);
        assert_eq!(style.insider_beginnings, ["d"]);
        assert_eq!(style.riddle_types, ["E E", "F"]);
        assert_eq!(style.riddle_functions, ["g"]);
        assert!(Style::parse("").is_err());
    }
}
