//! CRI's log format: `<RFC 3339 time> <stream> <P|F> <text>`, one line per line of output; P marks a part of a longer
//! one.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

/// The stream of a container that a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line of a log file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339 with nanoseconds.
    pub time: String,
    /// The stream that it came from.
    pub stream: Stream,
    /// Whether the container's line goes on in the next one of this stream.
    pub partial: bool,
    /// The text without its line end.
    pub text: String,
}

/// A container's log.
#[derive(Clone, Debug)]
pub struct Log {
    /// Its lines, in the order of the file.
    pub lines: Vec<Line>,
}

impl Log {
    /// Reads a log file. Every line of it must be well formed.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("read the log {}", path.display()))?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// Parses the content of a log file.
    pub fn parse(content: &str) -> Result<Self> {
        let lines = content.lines().map(parse_line).collect::<Result<_>>()?;
        Ok(Self { lines })
    }

    /// What the container wrote to its standard output.
    pub fn stdout(&self) -> String {
        self.joined(Stream::Stdout)
    }

    /// What the container wrote to its standard error.
    pub fn stderr(&self) -> String {
        self.joined(Stream::Stderr)
    }

    fn joined(&self, stream: Stream) -> String {
        let mut text = String::new();
        for line in self.lines.iter().filter(|line| line.stream == stream) {
            text += &line.text;
            if !line.partial {
                text.push('\n');
            }
        }
        text
    }
}

fn parse_line(line: &str) -> Result<Line> {
    let mut fields = line.splitn(4, ' ');
    let mut next = || fields.next().with_context(|| format!("not a line of a CRI log: {line:?}"));
    let time = next()?.to_owned();
    let stream = match next()? {
        "stdout" => Stream::Stdout,
        "stderr" => Stream::Stderr,
        other => bail!("{other:?} is not a stream: {line:?}"),
    };
    let partial = match next()? {
        "P" => true,
        "F" => false,
        other => bail!("{other:?} is not a tag: {line:?}"),
    };
    Ok(Line { time, stream, partial, text: next()?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_line_are_joined_within_their_stream() {
        let log = Log::parse("t stdout P one \nt stderr F err\nt stdout F two\nt stdout F \n").unwrap();
        assert_eq!(log.stdout(), "one two\n\n");
        assert_eq!(log.stderr(), "err\n");
    }

    #[test]
    fn a_line_that_is_not_in_the_format_is_an_error() {
        assert!(Log::parse("just text\n").is_err());
        assert!(Log::parse("t stdout X text\n").is_err());
    }
}
