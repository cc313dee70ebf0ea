//! The recurrences of the overview, and the coming occurrences of them that are not rows yet.

use std::collections::HashSet;

use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::model::recurrence::{Recurrence, RecurrenceCounts};
use crate::recurrences::coming;
use crate::recurrences::coming::{Occurrence, goes_on, next_due_at};
use crate::recurrences::rule::Rule;
use crate::store::{COUNT_LIMIT, RecurrenceFilter, Store, StoreError, UpcomingRow};

/// How many recurrences are shown.
const MAX_LISTED: usize = 50;

/// The recurrences, as the overview has them.
#[derive(Debug, Serialize)]
pub(super) struct Recurrences {
    /// How many there are: counted up to 1000.
    all: u64,
    /// Whether there are more than `all`.
    or_more: bool,
    /// How many have a problem: counted up to 1000.
    problems: u64,
    /// Those with a problem first, then those whose next occurrence comes first, then those that make none.
    list: Vec<Listed>,
}

/// A recurrence, with what follows from its columns.
#[derive(Debug, Serialize)]
struct Listed {
    #[serde(flatten)]
    recurrence: Recurrence,
    /// The rule in words; `None` = it cannot be read.
    words: Option<String>,
    /// When the next occurrence that is not made yet is due.
    #[serde(with = "time::serde::rfc3339::option")]
    due_at: Option<OffsetDateTime>,
}

/// A row of the queue, or an occurrence of a recurrence that is not a row yet.
#[derive(Debug, Serialize)]
pub(super) struct NextRow {
    #[serde(with = "time::serde::rfc3339")]
    at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    due_at: OffsetDateTime,
    /// `None` = it is not a row yet.
    id: Option<Uuid>,
    kind: String,
    key: Option<String>,
    subject: Option<String>,
    attempts: i32,
    held: bool,
    /// The recurrence, if it is not a row yet.
    recurrence: Option<String>,
}

/// The recurrences that were found, each once.
#[derive(Debug)]
pub(super) struct Found {
    counts: RecurrenceCounts,
    /// In the order in which they are shown; more than are shown.
    recurrences: Vec<Recurrence>,
}

impl Found {
    /// Reads the recurrences to show, and those of which one of the next `coming` occurrences may be.
    ///
    /// # Errors
    ///
    /// When the database cannot be asked.
    pub(super) async fn read(store: &Store, coming: usize) -> Result<Self, StoreError> {
        let to_limit = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let counts = store.count_recurrences().await?;
        let mut recurrences = Vec::new();
        if counts.all > MAX_LISTED as u64 {
            recurrences = store.recurrences_with_problem(to_limit(MAX_LISTED)).await?;
            let room = MAX_LISTED.saturating_sub(recurrences.len()).max(coming);
            recurrences.extend(store.next_recurrences(None, to_limit(room)).await?);
        }
        // So many by name fill the list, even if some of them are in it already.
        if counts.all > 0 && recurrences.len() < MAX_LISTED {
            recurrences.extend(store.recurrences(RecurrenceFilter::default(), to_limit(MAX_LISTED)).await?);
        }
        let mut seen = HashSet::new();
        recurrences.retain(|recurrence| seen.insert(recurrence.name.clone()));
        recurrences.sort_by(|one, other| place(one).cmp(&place(other)));
        Ok(Self { counts, recurrences })
    }

    /// What the overview shows of them, and their coming occurrences that are not rows yet, at most `limit`. Computes for
    /// milliseconds, and longer for rules that come rarely.
    pub(super) fn show(self, now: OffsetDateTime, limit: usize) -> (Recurrences, Vec<NextRow>) {
        let Self { counts: RecurrenceCounts { all, problems }, mut recurrences } = self;
        let occurrences = coming::occurrences(&recurrences, now, limit);
        let occurrences = occurrences.into_iter().map(NextRow::of_occurrence).collect();
        recurrences.truncate(MAX_LISTED);
        let enough = COUNT_LIMIT.unsigned_abs();
        let shown = Recurrences {
            all: all.min(enough),
            or_more: all > enough,
            problems: problems.min(enough),
            list: recurrences.into_iter().map(Listed::new).collect(),
        };
        (shown, occurrences)
    }
}

impl Listed {
    fn new(recurrence: Recurrence) -> Self {
        let words = Rule::parse(&recurrence.rule).ok().map(|rule| rule.describe());
        let due_at = next_due_at(&recurrence);
        Self { recurrence, words, due_at }
    }
}

impl NextRow {
    fn of_row(row: UpcomingRow) -> Self {
        let UpcomingRow { at, due_at, id, kind, key, subject, attempts, held } = row;
        Self { at, due_at, id: Some(id), kind, key, subject, attempts, held, recurrence: None }
    }

    fn of_occurrence(occurrence: Occurrence) -> Self {
        let Occurrence { due_at, kind, recurrence, subject } = occurrence;
        let recurrence = Some(recurrence);
        Self { at: due_at, due_at, id: None, kind, key: None, subject, attempts: 0, held: false, recurrence }
    }

    /// Whether `row` is this occurrence: it was made after the recurrence was read.
    fn is_made_as(&self, row: &UpcomingRow) -> bool {
        let (Some(name), Some(key)) = (&self.recurrence, &row.key) else { return false };
        let is_due_then = (row.due_at - self.due_at).abs() < time::Duration::MILLISECOND;
        is_due_then
            && row.kind == self.kind
            && key.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with('/'))
    }
}

/// The rows and the occurrences that are not rows yet, earliest first, at most `limit`.
pub(super) fn merge(rows: Vec<UpcomingRow>, mut occurrences: Vec<NextRow>, limit: usize) -> Vec<NextRow> {
    occurrences.retain(|occurrence| !rows.iter().any(|row| occurrence.is_made_as(row)));
    let mut next: Vec<NextRow> = rows.into_iter().map(NextRow::of_row).chain(occurrences).collect();
    next.sort_by_key(|row| row.at);
    next.truncate(limit);
    next
}

/// Where a recurrence is in the list: those with a problem come first, then those that go on, then the others.
fn place(recurrence: &Recurrence) -> (u8, Option<OffsetDateTime>, &str) {
    if recurrence.problem.is_some() {
        (0, None, &recurrence.name)
    } else if goes_on(recurrence) {
        (1, next_due_at(recurrence), &recurrence.name)
    } else {
        (2, None, &recurrence.name)
    }
}
