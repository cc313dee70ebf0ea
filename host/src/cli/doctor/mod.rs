//! `tidings doctor`: looks at a deployment from outside, whether the daemon runs or not, and says what is well and what is
//! not, one line each. It changes nothing. A check that cannot be made because an earlier one failed is left out.

mod daemon;
mod postgres;
mod rabbitmq;

use std::fmt::Display;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::output::Output;
use crate::cli::usage;
use crate::config::DoctorArgs;
use crate::model::error_chain::error_chain;

/// How bad it is, as each line begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing to do.
    Note,
    /// It works, and somebody should do something.
    Warn,
    /// It does not work.
    Fail,
}

/// What was found; for people printed as it is found.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(skip)]
    output: Output,
    failed: bool,
    checks: Vec<Check>,
}

/// What one check found.
#[derive(Debug, Serialize)]
struct Check {
    level: Level,
    says: String,
}

/// Checks everything, and says with its exit code whether something failed.
pub(super) async fn run(args: DoctorArgs, output: Output) -> ExitCode {
    let config = match args.check() {
        Ok(config) => config,
        Err(mistakes) => return usage(&mistakes),
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
        self.line(Level::Ok, sentence);
    }

    fn note(&mut self, sentence: impl Display) {
        self.line(Level::Note, sentence);
    }

    fn warn(&mut self, sentence: impl Display) {
        self.line(Level::Warn, sentence);
    }

    fn fail(&mut self, sentence: impl Display) {
        self.line(Level::Fail, sentence);
    }

    fn line(&mut self, level: Level, sentence: impl Display) {
        self.failed |= level == Level::Fail;
        let says = one_line(&sentence.to_string());
        self.output.line(line(level, &says));
        self.checks.push(Check { level, says });
    }

    /// What was asked for; without an answer, a line that says so with `advice`.
    fn answer<T>(&mut self, asked: Result<T, impl Into<anyhow::Error>>, advice: &str) -> Option<T> {
        match asked {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.fail(format_args!("{}; {advice}", error_chain(&*error.into())));
                None
            }
        }
    }
}

/// One line, whatever servers and rows say.
fn one_line(sentence: &str) -> String {
    let words: Vec<&str> = sentence.split(char::is_control).map(str::trim).filter(|part| !part.is_empty()).collect();
    words.join(" ")
}

fn line(level: Level, says: &str) -> String {
    format!("{:<4}  {says}", level.word())
}

/// A number of rows that were counted up to a limit.
fn count(rows: i64) -> String {
    if rows > crate::store::ENOUGH { format!("more than {}", crate::store::ENOUGH) } else { rows.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_said_becomes_one_line_that_begins_with_its_level() {
        assert_eq!(line(Level::Ok, "well"), "ok    well");
        assert_eq!(line(Level::Fail, &one_line("two\n lines\r\n\tof it")), "FAIL  two lines of it");
    }

    #[test]
    fn only_a_failure_makes_the_doctor_fail() {
        let mut report = Report { output: Output::Json, failed: false, checks: Vec::new() };
        report.ok("a");
        report.note("b");
        report.warn("c");
        assert!(!report.failed);
        assert_eq!(report.answer::<()>(Err(anyhow::anyhow!("d")), "do this"), None);
        assert!(report.failed);
    }

    #[test]
    fn what_is_too_much_to_count_is_said_to_be_more() {
        assert_eq!(count(1_000), "1000");
        assert_eq!(count(1_001), "more than 1000");
    }
}
