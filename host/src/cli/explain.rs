//! `tidings explain`: where a row is, and why.

use std::fmt;
use std::process::ExitCode;

use clap::Args;

use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, printable, times, with_store};
use crate::config::DatabaseArgs;
use crate::model::display;
use crate::model::display::Explanation;
use crate::model::row_status::{FoundRow, RowRef};
use crate::store::{RecurrenceFilter, Store, StoreError};

/// The row to explain.
#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  tidings explain 0199a6b2-1c2d-7000-8000-000000000001\n  \
                        tidings explain 'game-reminder/game 7/60'\n  \
                        tidings explain nightly-report/2026-12-24T01:30:00Z")]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    database: DatabaseArgs,
    /// The id of a row (which is the id of its message), its kind and key, or the recurrence and the instant of an occurrence
    #[arg(value_name = "ID|KIND/KEY|NAME/INSTANT")]
    row: RowRef,
}

pub(super) async fn explain(args: ExplainArgs, output: Output) -> ExitCode {
    with_store(args.database, async |store: Store| {
        let Some(found) = store.find(&args.row, None).await? else {
            complain(format_args!("tidings: {}", explain_missing(&store, &args.row).await?));
            return Ok(ExitCode::from(NOT_FOUND));
        };
        output.answer(&Explanation::of(found));
        Ok(ExitCode::SUCCESS)
    })
    .await
}

/// Why nothing was found.
async fn explain_missing(store: &Store, row: &RowRef) -> Result<String, StoreError> {
    if let Some((name, instant)) = row.as_occurrence() {
        let filter = RecurrenceFilter { names: Some(std::slice::from_ref(&name)), ..RecurrenceFilter::default() };
        if let Some(recurrence) = store.recurrences(filter, 1).await?.pop() {
            return Ok(display::missing_occurrence(&recurrence, instant));
        }
    }
    Ok(display::unknown_row(row))
}

impl fmt::Display for Explanation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FoundRow { id, kind, key, subject, due_at, expires_at, .. } = &self.found;
        let mut field = |name: &str, value: &str| writeln!(formatter, "{name:<8} {}", printable(value));
        field("id", &id.to_string())?;
        field("kind", kind)?;
        for (name, value) in [("key", key), ("subject", subject)] {
            if let Some(value) = value {
                field(name, value)?;
            }
        }
        field("due", &times::show(*due_at))?;
        if let Some(expires_at) = expires_at {
            field("expires", &times::show(*expires_at))?;
        }
        write!(formatter, "{}", self.explanation)
    }
}
