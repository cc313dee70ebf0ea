//! The command line: one file per subcommand.
//!
//! Must never decide anything: a command checks its arguments, calls the part of the library that does the work, and
//! prints the answer.
//!
//! To change it, know: every answer goes through `output`, as lines or, with `--json`, as one document. The exit codes
//! are part of the contract: 0 done or stopped by a signal; 64 usage and settings; 65 the schema is not the one that
//! this release works with; 66 not found; 1 anything else. The help of every command ends with an example; a test
//! checks that.

// `print!` and `eprint!` panic when the reader has closed the pipe; the functions of `output` do not.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod completions;
mod dead;
mod doctor;
mod explain;
mod intakes;
mod migrate;
mod next;
mod output;
mod parked;
mod pause;
mod plugin;
mod preview;
mod ready;
mod recurrences;
mod run;
mod schedule;
mod times;
mod topology;

use std::process::ExitCode;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::{DatabaseArgs, DoctorArgs, HttpArgs, RunArgs, ValidationErrors};
use crate::model::display::{pause_sentence, printable};
use crate::model::error_chain::error_chain;
use crate::recurrences::zone;
use crate::store::{Store, StoreError};
use crate::telemetry;
use crate::telemetry::LogFormat;
use output::{Output, complain};

/// Wrong usage or settings (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;
/// The database's schema is not the one that this release works with (`EX_DATAERR` of sysexits.h).
const SCHEMA: u8 = 65;
/// The row or kind that was named does not exist (`EX_NOINPUT` of sysexits.h).
const NOT_FOUND: u8 = 66;

/// Turns rows in PostgreSQL into messages in RabbitMQ, on time.
#[derive(Debug, Parser)]
#[command(name = "tidings", version = version(), arg_required_else_help = true)]
#[command(after_help = "Example:\n  tidings next --within 1h")]
struct Cli {
    /// Answers in JSON, for programs
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// The version, and of when the time zones are.
fn version() -> &'static str {
    static VERSION: LazyLock<String> =
        LazyLock::new(|| format!("{} (time zone database {})", env!("CARGO_PKG_VERSION"), zone::release()));
    &VERSION
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the daemon
    #[command(after_help = "Example:\n  tidings run --database-url postgres://tidings:secret@db/shop \\\n      \
                            --amqp-url amqp://tidings:secret@mq/shop --plugin-dir /srv/plugins")]
    Run(Box<RunArgs>),
    /// Checks a deployment from outside, with the daemon's settings: what is well, what is not, and what to do
    #[command(after_help = "Example:\n  tidings doctor --json | jq '.checks[] | select(.level != \"ok\")'")]
    Doctor(Box<DoctorArgs>),
    /// Shows what is due next, and what is held or paused
    Next(next::NextArgs),
    /// Says where a row is, and why
    Explain(explain::ExplainArgs),
    /// Schedules a row, and prints its id
    Schedule(schedule::ScheduleArgs),
    /// Removes pending rows
    #[command(
        override_usage = "tidings cancel [OPTIONS] <KIND> <KEY>\n       tidings cancel [OPTIONS] --subject <SUBJECT>"
    )]
    Cancel(schedule::CancelArgs),
    /// Makes or changes a recurrence: a rule that makes rows, such as every day at 02:30
    Repeat(Box<recurrences::RepeatArgs>),
    /// Lists, shows, stops, pauses or resumes recurrences
    #[command(subcommand)]
    Recurrences(recurrences::Command),
    /// Shows the coming instants of a rule, with every change of the clocks
    Preview(preview::PreviewArgs),
    /// Stops a kind: its rows wait where they are
    Pause(pause::PauseArgs),
    /// Lets a paused kind go on
    Resume(pause::ResumeArgs),
    /// Asks the daemon on this host whether it is ready, for a health check: exits with 0 if it is, with 1 otherwise
    #[command(after_help = "Example:\n  tidings ready --http-addr 127.0.0.1:7070 && echo it works")]
    Ready(HttpArgs),
    /// Shows what waits in the queues of the intakes, whose messages become rows
    Intakes(intakes::IntakesArgs),
    /// Lists, replays or drops the dead letters
    #[command(subcommand)]
    Dead(dead::Command),
    /// Lists, puts back or drops the rows and dead letters that were set aside for a person
    #[command(subcommand)]
    Parked(parked::Command),
    /// For authors of plugins: new, check, test, list, install, replay
    #[command(subcommand)]
    Plugin(plugin::Command),
    /// Creates or updates the schema `tidings` in the database
    #[command(after_help = "Examples:\n  tidings migrate --database-url postgres://owner:secret@db/shop\n  \
                            tidings migrate --partitions 8")]
    Migrate(migrate::MigrateArgs),
    /// Prints what the daemon needs in RabbitMQ, as definitions to import: exchanges, queues, the binding, and the
    /// fewest permissions of its user
    Topology(topology::TopologyArgs),
    /// Prints what a shell needs to complete the command line
    Completions(completions::CompletionsArgs),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
        }
    };
    // One thread: what a row needs waits for answers nearly all of its time, and to hand it to another thread would take longer
    // than the work itself. What takes long runs on threads of its own: guests (`plugins/runtime`), compiling, files.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &anyhow::Error::from(error).context("could not start")),
    };
    if !matches!(cli.command, Command::Run(_)) {
        telemetry::start(LogFormat::Text);
    }
    let output = if cli.json { Output::Json } else { Output::Text };
    let code = match cli.command {
        Command::Run(args) => match args.check() {
            Ok(config) => {
                telemetry::start(config.log);
                runtime.block_on(run::run(config))
            }
            Err(errors) => fail_usage(&errors),
        },
        Command::Doctor(args) => runtime.block_on(doctor::run(*args, output)),
        Command::Ready(args) => ready::ready(args, output),
        Command::Intakes(args) => runtime.block_on(intakes::intakes(args, output)),
        Command::Dead(command) => runtime.block_on(dead::run(command, output)),
        Command::Parked(command) => runtime.block_on(parked::run(command, output)),
        Command::Plugin(command) => runtime.block_on(plugin::run(command, output)),
        Command::Next(args) => runtime.block_on(next::next(args, output)),
        Command::Explain(args) => runtime.block_on(explain::explain(args, output)),
        Command::Schedule(args) => runtime.block_on(schedule::schedule(args, output)),
        Command::Cancel(args) => runtime.block_on(schedule::cancel(args, output)),
        Command::Repeat(args) => runtime.block_on(recurrences::repeat(*args, output)),
        Command::Recurrences(command) => runtime.block_on(recurrences::run(command, output)),
        Command::Preview(args) => preview::show(&args, output),
        Command::Pause(args) => runtime.block_on(pause::pause(args, output)),
        Command::Resume(args) => runtime.block_on(pause::resume(args, output)),
        Command::Topology(args) => topology::topology(args),
        Command::Completions(args) => completions::completions(&args, Cli::command()),
        Command::Migrate(args) => runtime.block_on(migrate::migrate(args, output)),
    };
    // Tasks that still run in the background must not delay the exit.
    runtime.shutdown_background();
    code
}

/// Prints each error on standard error, and returns the exit code of wrong usage.
fn fail_usage(errors: &ValidationErrors) -> ExitCode {
    for error in errors.iter() {
        complain(format_args!("tidings: {error}"));
    }
    ExitCode::from(USAGE)
}

/// Runs `work` with a store of one connection. Prints an error on standard error, and returns the exit code that fits
/// it.
async fn with_store(database: DatabaseArgs, work: impl AsyncFnOnce(Store) -> Result<ExitCode, StoreError>) -> ExitCode {
    let url = match database.check() {
        Ok(url) => url,
        Err(errors) => return fail_usage(&errors),
    };
    let error = match work(Store::new(&url, 1)).await {
        Ok(code) => return code,
        Err(error) => error,
    };
    if let Some(rule) = error.broken_rule() {
        fail_usage(&ValidationErrors::from(name_argument(rule).as_str()))
    } else if let Some(conflict) = error.conflict() {
        complain(format_args!("tidings: {}", printable(conflict)));
        ExitCode::FAILURE
    } else if error.is_unmigrated() {
        complain(
            "tidings: the database has no schema tidings, or one of an older release: run `tidings migrate` first",
        );
        ExitCode::from(SCHEMA)
    } else {
        fail(1, &error.into())
    }
}

/// Puts the argument that broke a rule of the schema before the rule, whose text begins with the column.
fn name_argument(rule: &str) -> String {
    let column = rule.split(' ').next().unwrap_or_default();
    let argument = match column {
        "kind" => "KIND",
        "key" => "the key",
        "subject" => "--subject",
        "due_at" => "--at or --in",
        "expires_at" => "--expires-at or --expires-in",
        "payload" => "--payload",
        "headers" => "--header",
        "until" => "--until or --for",
        "reason" => "--reason",
        "name" => "NAME",
        "rule" => "RULE",
        "time_zone" => "--zone",
        "expires_after" => "--expires-after",
        "catch_up_within" => "--catch-up-within",
        "spread" => "--spread",
        "priority" => "--priority",
        "starts_at" => "--starts-at",
        "ends_at" => "--ends-at",
        "max_count" => "--max-count",
        _ => return rule.to_owned(),
    };
    format!("{argument}: {rule}")
}

/// A progress bar: drawn on a terminal, hidden elsewhere and if `length` is 0.
///
/// # Panics
///
/// Never: the template is a constant.
fn progress_bar(length: u64, message: &'static str) -> ProgressBar {
    if length == 0 {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} {msg}, {eta} left").expect("a template");
    let bar = ProgressBar::new(length).with_style(style).with_message(message);
    // Drawn at once: it shows how much there is to do.
    bar.tick();
    bar
}

/// Writes a duration in words, to the second.
fn format_age(time: Duration) -> String {
    humantime::format_duration(Duration::from_secs(time.as_secs())).to_string()
}

/// Prints an error with its causes on one line of standard error, and returns the exit code.
fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    complain(format_args!("tidings: {}", error_chain(&**error)));
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds the subcommands that can be run to `found`, each with the end of its help.
    fn collect_commands(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
        let path = format!("{path} {}", command.get_name());
        if !command.has_subcommands() && !command.is_hide_set() {
            let help_end = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            found.push((path.clone(), help_end));
        }
        for subcommand in command.get_subcommands() {
            collect_commands(subcommand, &path, found);
        }
    }

    #[test]
    fn the_help_of_every_command_ends_with_an_example_of_it() {
        let mut found = Vec::new();
        collect_commands(&Cli::command(), "", &mut found);
        assert!(found.len() > 20, "{found:?}");
        for (path, help_end) in found {
            assert!(
                help_end.starts_with("Example") && help_end.contains(&format!(" {path} ")) || help_end.ends_with(&path),
                "{path}: {help_end}"
            );
        }
    }

    #[test]
    fn clap_accepts_the_command_line() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_broken_rule_is_shown_with_the_argument_that_broke_it() {
        assert_eq!(
            name_argument("expires_at must be after due_at"),
            "--expires-at or --expires-in: expires_at must be after due_at"
        );
        assert_eq!(name_argument("timestamp out of range"), "timestamp out of range");
    }
}
