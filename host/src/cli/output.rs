//! How a command answers: in lines for people, or with `--json` in one JSON document. When the reader of standard
//! output has closed the pipe, as `| head` does, the process ends silently, like other programs in a pipeline.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

/// The exit code with which a shell reports a process that SIGPIPE has ended: 128 + 13.
const BROKEN_PIPE: i32 = 141;

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// Lines for people.
    Text,
    /// One JSON document for programs.
    Json,
}

impl Output {
    /// Prints a line, if the answer is for people.
    pub(super) fn line(self, line: impl Display) {
        if self == Self::Text {
            print(line);
        }
    }

    /// Prints the whole answer, if it is for programs.
    pub(super) fn json(self, answer: &impl Serialize) {
        if self == Self::Json {
            print(serde_json::to_string_pretty(answer).expect("an answer can always be written as JSON"));
        }
    }

    /// Prints the whole answer in the form that was asked for.
    pub(super) fn answer(self, answer: &(impl Display + Serialize)) {
        self.line(answer);
        self.json(answer);
    }
}

/// Prints a line on standard output; ends the process if that fails.
pub(super) fn print(line: impl Display) {
    match writeln!(io::stdout(), "{line}") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(BROKEN_PIPE),
        // A full disk, for instance.
        Err(error) => {
            complain(format_args!("tidings: could not write the answer: {error}"));
            std::process::exit(1)
        }
    }
}

/// Prints a line on standard error. A failure to do so is ignored: the exit code tells the result as well.
pub(super) fn complain(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}
