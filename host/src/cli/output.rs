//! How a command answers: in lines for people, or with `--json` in one JSON document. When nobody reads any more, as behind
//! `| head`, the process ends without a word.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

/// What the answer is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

impl Output {
    /// A line for people.
    pub(super) fn line(self, line: impl Display) {
        if self == Self::Text {
            print(line);
        }
    }

    /// The whole answer for programs.
    pub(super) fn json(self, answer: &impl Serialize) {
        if self == Self::Json {
            print(serde_json::to_string_pretty(answer).expect("an answer can always be written as JSON"));
        }
    }

    /// The whole answer, for either.
    pub(super) fn answer(self, answer: &(impl Display + Serialize)) {
        self.line(answer);
        self.json(answer);
    }
}

/// A line on standard output.
pub(super) fn print(line: impl Display) {
    write(io::stdout(), line);
}

/// A line on standard error.
pub(super) fn complain(line: impl Display) {
    write(io::stderr(), line);
}

fn write(mut to: impl Write, line: impl Display) {
    if let Err(error) = writeln!(to, "{line}") {
        // Whoever read has seen enough. Anything else, a full disk for instance, must not look like success.
        std::process::exit(i32::from(error.kind() != io::ErrorKind::BrokenPipe));
    }
}
