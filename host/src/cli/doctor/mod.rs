//! `tidings doctor`: looks at a deployment from outside, whether the daemon runs or not, and prints one line for each
//! check: what is well, and what is not and what to do about it.
//!
//! Must never change anything, read more than a few thousand rows, or wait without a deadline.
//!
//! To change it, know: the checks are here, the statements and requests that they need are in `store` and `broker`. A
//! check that cannot be made because an earlier one failed is left out.

mod daemon;
mod postgres;
mod rabbitmq;

use std::fmt::Display;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::fail_usage;
use crate::cli::output::Output;
use crate::config::DoctorArgs;
use crate::model::error_chain::error_chain;

/// How serious a line is; the line begins with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// It is as it should be.
    Ok,
    /// Worth knowing; nothing to do.
    Note,
    /// It works, but the operator should do something.
    Warn,
    /// It does not work.
    Fail,
}

/// The results so far. In the form for people, each is printed at once.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(skip)]
    output: Output,
    failed: bool,
    checks: Vec<Check>,
}

/// The result of one check.
#[derive(Debug, Serialize)]
struct Check {
    level: Level,
    says: String,
}

/// Makes all checks. The exit code is 1 if one failed.
pub(super) async fn run(args: DoctorArgs, output: Output) -> ExitCode {
    let config = match args.check() {
        Ok(config) => config,
        Err(errors) => return fail_usage(&errors),
    };
    let mut report = Report { output, failed: false, checks: Vec::new() };
    postgres::check(&mut report, &config).await;
    rabbitmq::check(&mut report, &config.servers.broker, config.management_url.as_ref()).await;
    daemon::check(&mut report, &config).await;
    output.json(&report);
    ExitCode::from(u8::from(report.failed))
}

impl Level {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

impl Report {
    fn ok(&mut self, sentence: impl Display) {
        self.add(Level::Ok, sentence);
    }

    fn note(&mut self, sentence: impl Display) {
        self.add(Level::Note, sentence);
    }

    fn warn(&mut self, sentence: impl Display) {
        self.add(Level::Warn, sentence);
    }

    fn fail(&mut self, sentence: impl Display) {
        self.add(Level::Fail, sentence);
    }

    fn add(&mut self, level: Level, sentence: impl Display) {
        self.failed |= level == Level::Fail;
        let says = one_line(&sentence.to_string());
        self.output.line(format_line(level, &says));
        self.checks.push(Check { level, says });
    }

    /// Returns the answer of a server. For an error, adds a failed check with the error and `advice`.
    fn answer_or_fail<T>(&mut self, answer: Result<T, impl Into<anyhow::Error>>, advice: &str) -> Option<T> {
        match answer {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.fail(format_args!("{}; {advice}", error_chain(&*error.into())));
                None
            }
        }
    }
}

/// Joins the lines of a text into one: texts from servers and rows may have line breaks.
fn one_line(sentence: &str) -> String {
    let words: Vec<&str> = sentence.split(char::is_control).map(str::trim).filter(|part| !part.is_empty()).collect();
    words.join(" ")
}

fn format_line(level: Level, says: &str) -> String {
    format!("{:<4}  {says}", level.word())
}

/// Writes a number of rows that were counted only up to a limit.
fn format_count(rows: i64) -> String {
    if rows > crate::store::COUNT_LIMIT { format!("more than {}", crate::store::COUNT_LIMIT) } else { rows.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_becomes_one_line_that_begins_with_its_level() {
        assert_eq!(format_line(Level::Ok, "well"), "ok    well");
        assert_eq!(format_line(Level::Fail, &one_line("two\n lines\r\n\tof it")), "FAIL  two lines of it");
    }

    #[test]
    fn only_a_failure_makes_the_doctor_fail() {
        let mut report = Report { output: Output::Json, failed: false, checks: Vec::new() };
        report.ok("a");
        report.note("b");
        report.warn("c");
        assert!(!report.failed);
        assert_eq!(report.answer_or_fail::<()>(Err(anyhow::anyhow!("d")), "do this"), None);
        assert!(report.failed);
    }

    #[test]
    fn a_count_beyond_the_limit_is_shown_as_more_than_the_limit() {
        assert_eq!(format_count(1_000), "1000");
        assert_eq!(format_count(1_001), "more than 1000");
    }
}
