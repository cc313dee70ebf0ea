//! `tidings next`: the rows that are due next, the coming occurrences of recurrences, and what is held, paused or limited.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use time::OffsetDateTime;

use crate::cli::output::Output;
use crate::cli::{pause_sentence, printable, times, with_store};
use crate::config::DatabaseArgs;
use crate::model::row_status::Pause;
use crate::recurrences::coming;
use crate::recurrences::coming::Occurrence;
use crate::store::{COUNT_LIMIT, LimitStatus, MAX_COUNTED, Store, StoreError, Upcoming, UpcomingRow};

/// What to show.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  tidings next --within 1h --kind game-reminder")]
pub(super) struct NextArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// Only what is due within this time, such as 15min or 1h
    #[arg(long, value_name = "SPAN", allow_hyphen_values = true, value_parser = times::parse_span)]
    within: Option<Duration>,
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// How many rows to show
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

/// What `tidings next` answers.
#[derive(Debug, Serialize)]
struct Next {
    /// By the database clock.
    #[serde(with = "time::serde::rfc3339")]
    now: OffsetDateTime,
    rows: Vec<UpcomingRow>,
    more: u64,
    more_is_estimate: bool,
    /// Coming occurrences that are not rows yet.
    occurrences: Vec<Occurrence>,
    held: Vec<Held>,
    paused: Vec<Pause>,
    limits: Vec<LimitStatus>,
}

/// Rows of one kind that are held.
#[derive(Debug, Serialize)]
struct Held {
    kind: String,
    rows: i64,
    /// Whether there are more than `rows`.
    or_more: bool,
}

pub(super) async fn next(args: NextArgs, output: Output) -> ExitCode {
    let NextArgs { database, within, kind, limit } = args;
    with_store(database, async |store: Store| {
        let upcoming = store.upcoming(within, kind.as_deref(), limit).await?;
        let is_wanted = |other: &str| kind.as_deref().is_none_or(|kind| kind == other);
        let held = store.held_by_kind().await?.into_iter().filter(|(kind, _)| is_wanted(kind));
        let held = held.map(|(kind, rows)| Held { kind, rows: rows.min(COUNT_LIMIT), or_more: rows > COUNT_LIMIT });
        let occurrences = coming_occurrences(&store, &upcoming, within, kind.as_deref(), limit).await?;
        output.answer(&Next {
            now: upcoming.now,
            rows: upcoming.rows,
            more: upcoming.more,
            more_is_estimate: upcoming.more_is_estimate,
            occurrences,
            held: held.collect(),
            paused: store.pauses().await?.into_iter().filter(|pause| is_wanted(&pause.kind)).collect(),
            limits: store.limits().await?.into_iter().filter(|status| is_wanted(&status.limit.kind)).collect(),
        });
        Ok(ExitCode::SUCCESS)
    })
    .await
}

/// The coming occurrences that are not rows yet, at most `limit`, and none after the last row if there are more rows than are
/// shown.
async fn coming_occurrences(
    store: &Store,
    upcoming: &Upcoming,
    within: Option<Duration>,
    kind: Option<&str>,
    limit: u32,
) -> Result<Vec<Occurrence>, StoreError> {
    let recurrences = store.next_recurrences(kind, limit.into()).await?;
    let mut occurrences = coming::occurrences(&recurrences, upcoming.now, limit as usize);
    let within = within.and_then(|within| upcoming.now.checked_add(within.try_into().ok()?));
    let last_row = upcoming.rows.last().filter(|_| upcoming.more > 0).map(|row| row.at);
    for until in [within, last_row].into_iter().flatten() {
        occurrences.retain(|occurrence| occurrence.due_at <= until);
    }
    Ok(occurrences)
}

impl fmt::Display for Next {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.rows.is_empty() || !self.occurrences.is_empty() {
            writeln!(formatter, "{:<24} {:<16} {:<24} {:<24} subject", "at", "", "kind", "key")?;
        }
        let name = |name: &Option<String>| name.as_deref().map_or_else(|| "-".to_owned(), printable);
        let mut occurrences = self.occurrences.iter().peekable();
        let show_occurrence = |formatter: &mut fmt::Formatter<'_>, occurrence: &Occurrence| {
            let Occurrence { due_at, kind, recurrence, subject } = occurrence;
            let when = format!("{}, not made", times::format_relative(*due_at, self.now));
            let (at, key, subject) = (times::show(*due_at), format!("{}/…", printable(recurrence)), name(subject));
            writeln!(formatter, "{at:<24} {when:<16} {kind:<24} {key:<24} {subject}")
        };
        for row in &self.rows {
            while let Some(occurrence) = occurrences.next_if(|occurrence| occurrence.due_at < row.at) {
                show_occurrence(formatter, occurrence)?;
            }
            let when = match times::format_relative(row.at, self.now) {
                when if row.held => format!("{when}, held"),
                when if row.attempts > 0 => format!("{when}, again"),
                when => when,
            };
            let (at, kind, key, subject) = (times::show(row.at), &row.kind, name(&row.key), name(&row.subject));
            writeln!(formatter, "{at:<24} {when:<16} {kind:<24} {key:<24} {subject}")?;
        }
        for occurrence in occurrences {
            show_occurrence(formatter, occurrence)?;
        }
        match (self.rows.len(), self.more) {
            (0, _) if !self.occurrences.is_empty() => write!(formatter, "{} occurrences", self.occurrences.len())?,
            (0, _) => write!(formatter, "nothing is due")?,
            (rows, 0) => write!(formatter, "{rows} rows, and no more")?,
            (rows, more) if self.more_is_estimate => write!(formatter, "{rows} rows, and about {more} more")?,
            (rows, more) => write!(formatter, "{rows} rows, and {more} more")?,
        }
        for Held { kind, rows, or_more } in &self.held {
            let rows = if *or_more { format!("more than {rows}") } else { rows.to_string() };
            let until = if self.paused.iter().any(|pause| pause.kind == *kind) {
                "until the kind is resumed"
            } else {
                "until a plugin serves it"
            };
            write!(formatter, "\nheld: {rows} rows of the kind {kind}, {until}")?;
        }
        for pause in &self.paused {
            write!(formatter, "\npaused: {}", pause_sentence(pause))?;
        }
        for LimitStatus { limit, waiting, .. } in &self.limits {
            let rows = match *waiting {
                1 => "1 row waits for its turn".to_owned(),
                waiting if waiting > MAX_COUNTED => format!("more than {MAX_COUNTED} rows wait for their turn"),
                waiting => format!("{waiting} rows wait for their turn"),
            };
            write!(formatter, "\nlimited: {limit}; {rows}")?;
        }
        Ok(())
    }
}
