//! How a command answers: in lines for people, or with `--json` in one JSON document. When nobody reads any more, as behind
//! `| head`, the process ends without a word, as programs do there.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

/// How a shell reports a process that SIGPIPE has ended, which is what happens to others behind `| head`.
const UNREAD: i32 = 141;

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
    match writeln!(io::stdout(), "{line}") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(UNREAD),
        // A full disk, for instance.
        Err(error) => {
            complain(format_args!("tidings: could not write the answer: {error}"));
            std::process::exit(1)
        }
    }
}

/// A line on standard error. If nobody reads it, the exit code says what there is to say.
pub(super) fn complain(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
