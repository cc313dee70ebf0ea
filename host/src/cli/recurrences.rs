//! `tidings repeat` and `tidings recurrences …`: makes, lists, stops, pauses and resumes recurrences, with the same SQL functions
//! as an application.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use time::OffsetDateTime;

use crate::cli::output::{Output, complain};
use crate::cli::schedule::{OnConflict, PayloadArgs};
use crate::cli::{NOT_FOUND, fail_usage, format_age, printable, times, with_store};
use crate::config::DatabaseArgs;
use crate::model::display::standstill;
use crate::model::recurrence::Recurrence;
use crate::model::schedule::DEFAULT_PRIORITY;
use crate::recurrences::coming;
use crate::recurrences::rule::Rule;
use crate::store::{NewRecurrence, RecurrenceFilter, Store};

/// The recurrence to make or to change.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  tidings repeat nightly-report message '30 2 * * *' --zone Europe/Berlin --expires-after 6h \\\n      \
                        --payload '{\"routing_key\": \"reports\", \"body\": \"now\"}'\n  \
                        tidings repeat heartbeat message 'every 90 seconds' --catch-up none --spread 30s"
)]
pub(super) struct RepeatArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Its name; its occurrences have the key NAME/INSTANT
    name: String,
    /// The kind of its occurrences
    kind: String,
    /// A cron rule with 5 fields, 6 (seconds first) or 7 (years last), @hourly to @yearly, or "every 90 minutes"
    rule: String,
    /// The time zone in whose time a cron rule is read
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    zone: String,
    #[command(flatten)]
    payload: PayloadArgs,
    /// What its occurrences are about, for `tidings cancel --subject`
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// How long after its due time an occurrence expires; without it never
    #[arg(long, value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    expires_after: Option<Duration>,
    /// What is made of instants that were missed: one occurrence for all of them, all, or none
    #[arg(long, value_enum, default_value = "latest")]
    catch_up: CatchUp,
    /// Instants that were missed for longer than this are not made
    #[arg(long, value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    catch_up_within: Option<Duration>,
    /// Its occurrences are due later by a part of this, which follows from the name
    #[arg(long, value_name = "SPAN", default_value = "0s", allow_hyphen_values = true, value_parser = times::parse_span)]
    spread: Duration,
    /// No instant is before this, in RFC 3339; "every" counts from here
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant)]
    starts_at: Option<OffsetDateTime>,
    /// No instant is after this, in RFC 3339
    #[arg(long, value_name = "TIME", value_parser = times::parse_instant)]
    ends_at: Option<OffsetDateTime>,
    /// So many occurrences are made, and no more
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
    max_count: Option<i64>,
    /// Which of its occurrences and of other rows that are due goes first, from 0, the last, to 9; also the priority of the messages
    #[arg(long, value_name = "0..9", default_value_t = 4, value_parser = clap::value_parser!(i32).range(0..=9), allow_negative_numbers = true)]
    priority: i32,
    /// What to do if the name is taken: change that recurrence, keep it as it is, or fail
    #[arg(long, value_enum, default_value = "replace")]
    on_conflict: OnConflict,
}

/// What is made of instants that were missed.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum CatchUp {
    Latest,
    All,
    None,
}

/// The subcommands of `tidings recurrences`.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Lists recurrences by name
    List(ListArgs),
    /// Shows one, with its coming instants
    #[command(after_help = "Example:\n  tidings recurrences show nightly-report")]
    Show(NameArgs),
    /// Removes one, and its occurrences that wait
    #[command(after_help = "Example:\n  tidings recurrences stop nightly-report")]
    Stop(NameArgs),
    /// Lets one make no occurrences; what it made and is not due yet is taken back
    #[command(after_help = "Example:\n  tidings recurrences pause nightly-report")]
    Pause(NameArgs),
    /// Lets a paused one go on; what it missed is caught up with as it says
    #[command(after_help = "Example:\n  tidings recurrences resume nightly-report")]
    Resume(NameArgs),
}

/// Which recurrences to list.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings recurrences list --kind message")]
pub(super) struct ListArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Only those of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only those whose names come after this one
    #[arg(long, value_name = "NAME")]
    after: Option<String>,
    /// How many to show
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

/// The recurrence that is meant.
#[derive(Args, Debug)]
pub(super) struct NameArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Its name
    name: String,
}

/// What `tidings repeat` answers.
#[derive(Debug, Serialize)]
struct Repeated {
    name: String,
    #[serde(with = "time::serde::rfc3339::option")]
    next_at: Option<OffsetDateTime>,
}

/// What `tidings recurrences list` answers.
#[derive(Debug, Serialize)]
struct Listed {
    recurrences: Vec<Recurrence>,
    /// There are more, after the last.
    more: bool,
}

/// What `tidings recurrences show` answers.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    recurrence: Recurrence,
    /// The rule in words.
    words: Option<String>,
    /// The coming instants, before the spread.
    coming: Vec<String>,
}

/// What the commands that change a recurrence answer.
#[derive(Debug, Serialize)]
struct Changed {
    name: String,
    /// `stopped`, `paused` or `resumed`.
    #[serde(skip)]
    done: &'static str,
    /// Whether the command changed something.
    changed: bool,
    /// Whether there is, or was, a recurrence of this name.
    found: bool,
}

pub(super) async fn repeat(args: RepeatArgs, output: Output) -> ExitCode {
    let (payload, headers) = match args.payload.read() {
        Ok(read) => read,
        Err(errors) => return fail_usage(&errors),
    };
    // What the daemon would find out later is better said at once.
    if let Err(error) = Rule::parse(&args.rule) {
        return fail_usage(&std::iter::once(error.to_string()).collect());
    }
    let new = NewRecurrence {
        name: args.name,
        kind: args.kind,
        rule: args.rule,
        time_zone: args.zone,
        payload,
        subject: args.subject,
        headers,
        expires_after: args.expires_after,
        catch_up: match args.catch_up {
            CatchUp::Latest => "latest",
            CatchUp::All => "all",
            CatchUp::None => "none",
        },
        catch_up_within: args.catch_up_within,
        spread: args.spread,
        starts_at: args.starts_at,
        ends_at: args.ends_at,
        max_count: args.max_count,
        priority: args.priority,
        on_conflict: args.on_conflict.word(),
    };
    with_store(args.database, async |store: Store| {
        let next_at = store.repeat(&new).await?;
        output.answer(&Repeated { name: new.name.clone(), next_at });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    match command {
        Command::List(args) => list(args, output).await,
        Command::Show(args) => show(args, output).await,
        Command::Stop(args) => {
            with_store(args.database, async |store: Store| {
                let stopped = store.stop_repeating(&args.name).await?;
                let name = args.name.clone();
                Ok(answer(output, &Changed { name, done: "stopped", changed: stopped, found: stopped }))
            })
            .await
        }
        Command::Pause(args) => pause(args.database, args.name, true, output).await,
        Command::Resume(args) => pause(args.database, args.name, false, output).await,
    }
}

/// Pauses a recurrence, or lets it go on.
pub(super) async fn pause(database: DatabaseArgs, name: String, paused: bool, output: Output) -> ExitCode {
    with_store(database, async |store: Store| {
        let changed = store.pause_recurrence(&name, paused).await?;
        let done = if paused { "paused" } else { "resumed" };
        let (changed, found) = (changed.unwrap_or(false), changed.is_some());
        Ok(answer(output, &Changed { name: name.clone(), done, changed, found }))
    })
    .await
}

fn answer(output: Output, changed: &Changed) -> ExitCode {
    output.answer(changed);
    if changed.found { ExitCode::SUCCESS } else { ExitCode::from(NOT_FOUND) }
}

async fn list(args: ListArgs, output: Output) -> ExitCode {
    let ListArgs { database, kind, after, limit } = args;
    with_store(database, async |store: Store| {
        let filter = RecurrenceFilter { names: None, kind: kind.as_deref(), after: after.as_deref() };
        let mut recurrences = store.recurrences(filter, i64::from(limit) + 1).await?;
        let more = recurrences.len() > limit as usize;
        recurrences.truncate(limit as usize);
        output.answer(&Listed { recurrences, more });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

async fn show(args: NameArgs, output: Output) -> ExitCode {
    with_store(args.database, async |store: Store| {
        let filter = RecurrenceFilter { names: Some(std::slice::from_ref(&args.name)), ..RecurrenceFilter::default() };
        let Some(recurrence) = store.recurrences(filter, 1).await?.pop() else {
            complain(format_args!("tidings: there is no recurrence named {}", printable(&args.name)));
            return Ok(ExitCode::from(NOT_FOUND));
        };
        let words = Rule::parse(&recurrence.rule).ok().map(|rule| rule.describe());
        let coming = coming::instants(&recurrence, 10).into_iter().map(times::show).collect();
        output.answer(&Shown { recurrence, words, coming });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

impl fmt::Display for Repeated {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.next_at {
            Some(next_at) => write!(formatter, "next {}", times::show(next_at)),
            None => write!(formatter, "a daemon computes the first instant: tidings recurrences show {}", self.name),
        }
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.recurrences.is_empty() {
            return write!(formatter, "there is no recurrence");
        }
        write!(formatter, "{:<24} {:<32} {:<20} {:<24} kind", "next", "name", "rule", "zone")?;
        for recurrence in &self.recurrences {
            let next = recurrence.next_at.map_or_else(|| "-".to_owned(), times::show);
            let (name, rule) = (printable(&recurrence.name), printable(&recurrence.rule));
            let Recurrence { time_zone, kind, .. } = recurrence;
            write!(formatter, "\n{next:<24} {name:<32} {rule:<20} {time_zone:<24} {kind}")?;
            if let Some(standstill) = standstill(recurrence) {
                write!(formatter, "  {standstill}")?;
            }
        }
        if let Some(last) = self.recurrences.last().filter(|_| self.more) {
            write!(formatter, "\nand more: --after {}", printable(&last.name))?;
        }
        Ok(())
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recurrence = &self.recurrence;
        let mut field = |name: &str, value: &str| writeln!(formatter, "{name:<10} {}", printable(value));
        let span = |seconds: f64| format_age(Duration::try_from_secs_f64(seconds).unwrap_or_default());
        field("name", &recurrence.name)?;
        field("kind", &recurrence.kind)?;
        field("rule", &format!("{}, {}", recurrence.rule, recurrence.time_zone))?;
        if let Some(words) = &self.words {
            field("in words", words)?;
        }
        if let Some(subject) = &recurrence.subject {
            field("subject", subject)?;
        }
        if recurrence.spread_seconds > 0.0 {
            let offset = Duration::try_from_secs_f64(recurrence.offset_seconds).unwrap_or_default();
            field("spread", &format!("{}: due {offset:?} after each instant", span(recurrence.spread_seconds)))?;
        }
        if recurrence.priority != i16::from(DEFAULT_PRIORITY) {
            field("priority", &recurrence.priority.to_string())?;
        }
        if let Some(seconds) = recurrence.expires_after_seconds {
            field("expires", &format!("{} after it is due", span(seconds)))?;
        }
        let catch_up = match recurrence.catch_up {
            crate::model::recurrence::CatchUp::Latest => "latest",
            crate::model::recurrence::CatchUp::All => "all",
            crate::model::recurrence::CatchUp::None => "none",
        };
        let within = recurrence.catch_up_within_seconds.map(|seconds| format!(", of the last {}", span(seconds)));
        field("catch-up", &format!("{catch_up}{}", within.unwrap_or_default()))?;
        let made = match recurrence.max_count {
            Some(max) => format!("{} of {max}", recurrence.count),
            None => recurrence.count.to_string(),
        };
        field("made", &made)?;
        for (name, at) in [
            ("starts", recurrence.starts_at),
            ("ends", recurrence.ends_at),
            ("last", recurrence.last_at),
            ("next", recurrence.next_at),
        ] {
            if let Some(at) = at {
                field(name, &times::show(at))?;
            }
        }
        if let Some(standstill) = standstill(recurrence) {
            field("state", &standstill)?;
        }
        let following = self.coming.iter().skip(1).cloned().collect::<Vec<_>>();
        write!(formatter, "{:<10} {}", "then", if following.is_empty() { "-".to_owned() } else { following.join(" ") })
    }
}

impl fmt::Display for Changed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = printable(&self.name);
        match (self.found, self.changed) {
            (false, _) => write!(formatter, "there is no recurrence named {name}"),
            (true, true) => write!(formatter, "the recurrence {name} is {}", self.done),
            (true, false) => write!(formatter, "the recurrence {name} is {} already", self.done),
        }
    }
}
