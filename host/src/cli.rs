//! The command line: one file per subcommand. Exit codes: 0 done or stopped by a signal; 64 usage and settings; 65 the
//! schema is not ours; 66 not found; 1 anything else.

mod dead;
mod doctor;
mod migrate;
mod parked;
mod plugin;
mod ready;
mod run;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::{DatabaseArgs, DoctorArgs, HttpArgs, Mistakes, RunArgs};

/// Wrong usage or settings (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;
/// The database's schema is not ours (`EX_DATAERR` of sysexits.h).
const SCHEMA: u8 = 65;
/// There is no such thing (`EX_NOINPUT` of sysexits.h).
const NOT_FOUND: u8 = 66;

/// Turns rows in PostgreSQL into messages in RabbitMQ, on time.
#[derive(Debug, Parser)]
#[command(name = "tidings", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the daemon
    Run(Box<RunArgs>),
    /// Checks a deployment from outside, with the daemon's settings: what is well, what is not, and what to do
    Doctor(Box<DoctorArgs>),
    /// Asks the daemon on this host whether it is ready, for a health check: exits with 0 if it is, with 1 otherwise
    Ready(HttpArgs),
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
    Migrate(DatabaseArgs),
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
    crate::telemetry::start();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(1, &anyhow::Error::from(error).context("could not start")),
    };
    let code = match cli.command {
        Command::Run(args) => match args.check() {
            Ok(config) => runtime.block_on(run::run(config)),
            Err(mistakes) => usage(&mistakes),
        },
        Command::Doctor(args) => runtime.block_on(doctor::run(*args)),
        Command::Ready(args) => ready::ready(args),
        Command::Dead(command) => runtime.block_on(dead::run(command)),
        Command::Parked(command) => runtime.block_on(parked::run(command)),
        Command::Plugin(command) => runtime.block_on(plugin::run(command)),
        Command::Migrate(args) => match args.check() {
            Ok(url) => runtime.block_on(migrate::migrate(&url)),
            Err(mistakes) => usage(&mistakes),
        },
    };
    // What is left in the background has nothing more to say.
    runtime.shutdown_background();
    code
}

fn usage(mistakes: &Mistakes) -> ExitCode {
    for mistake in mistakes.iter() {
        eprintln!("tidings: {mistake}");
    }
    ExitCode::from(USAGE)
}

/// A bar on a terminal, and nothing elsewhere. `length` 0 = none at all.
///
/// # Panics
///
/// Never: the template is a constant.
fn progress(length: u64, what: &'static str) -> ProgressBar {
    if length == 0 {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} {msg}, {eta} left").expect("a template");
    ProgressBar::new(length).with_style(style).with_message(what)
}

/// A time in words, to the second.
fn age(time: Duration) -> String {
    humantime::format_duration(Duration::from_secs(time.as_secs())).to_string()
}

/// One line that cannot do anything to a terminal: anybody may have written what is shown of a letter or a plugin.
fn printable(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

/// Says what went wrong, with its causes, on one line.
fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    eprintln!("tidings: {error:#}");
    ExitCode::from(code)
}
