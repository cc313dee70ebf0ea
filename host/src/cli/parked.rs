//! `tidings parked …`: what was set aside for a person. Rows that no plugin could build lie in the database, dead letters
//! that could not go back in a queue; here they are one list.

use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::broker::{Broker, DeadLetterQueue, Looked};
use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, age, fail, printable, progress, usage};
use crate::config::{ServerArgs, ValidationErrors};
use crate::daemon::signals::shutdown_on_signal_or_hangup;
use crate::dead_letters::admin::{DeadLetterAdmin, DeadLetterListing, NotDone, Selection, drop_rows, retry_rows};
use crate::model::wake::Wake;
use crate::store::{ParkedRow, Store};

/// What can be done with what is parked.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Lists rows and letters, with the reasons
    #[command(after_help = "Example:\n  tidings parked list")]
    List(ServerArgs),
    /// Puts rows back into the queue, due now, and letters back into the queues they died in
    #[command(after_help = "Example:\n  tidings parked retry 0199a6b2-1c2d-7000-8000-000000000001")]
    Retry(RowRef),
    /// Removes them for good
    #[command(after_help = "Example:\n  tidings parked drop --all")]
    Drop(RowRef),
}

/// RowRef of them.
#[derive(Args, Debug)]
pub(super) struct RowRef {
    #[command(flatten)]
    servers: ServerArgs,
    /// Their ids
    #[arg(value_name = "ID", required_unless_present = "all")]
    ids: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "ids")]
    all: bool,
}

/// What is done.
#[derive(Clone, Copy)]
enum Deed {
    Retry,
    Drop,
}

/// What it was done with, and what stays.
#[derive(Debug, Default)]
struct Done {
    rows: usize,
    letters: usize,
    stay: Vec<NotDone>,
}

/// What is parked.
#[derive(Debug, Serialize)]
struct Listed {
    rows: Vec<ParkedRow>,
    letters: Vec<ParkedLetter>,
}

/// A parked letter.
#[derive(Debug, Serialize)]
struct ParkedLetter {
    id: Option<String>,
    kind: Option<String>,
    /// Where it died.
    queue: Option<String>,
    /// Why it is parked.
    reason: Option<String>,
}

impl From<Looked> for ParkedLetter {
    fn from(Looked { says, parked_reason }: Looked) -> Self {
        Self { id: says.id, kind: says.kind, queue: says.queue, reason: parked_reason }
    }
}

/// How many were put back, and what was not.
#[derive(Debug, Serialize)]
struct Retried {
    rows: usize,
    letters: usize,
    stay: Vec<NotDone>,
}

/// How many are gone.
#[derive(Debug, Serialize)]
struct Dropped {
    rows: usize,
    letters: usize,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    let (which, deed) = match command {
        Command::List(servers) => return list(servers, output).await,
        Command::Retry(which) => (which, Deed::Retry),
        Command::Drop(which) => (which, Deed::Drop),
    };
    // Nothing among all is an answer; an id that nothing has is a mistake.
    let all = which.all;
    let Done { rows, letters, stay } = match run_on(which, deed).await {
        Ok(Ok(done)) => done,
        Ok(Err(mistakes)) => return usage(&mistakes),
        Err(error) => return fail(1, &error),
    };
    let code = match rows + letters {
        _ if !stay.is_empty() => ExitCode::FAILURE,
        0 if !all => ExitCode::from(NOT_FOUND),
        _ => ExitCode::SUCCESS,
    };
    match deed {
        Deed::Retry => output.answer(&Retried { rows, letters, stay }),
        Deed::Drop => output.answer(&Dropped { rows, letters }),
    }
    code
}

fn both(servers: ServerArgs) -> Result<(Store, Broker), ValidationErrors> {
    let servers = servers.check()?;
    Ok((Store::new(&servers.database_url, 1), Broker::new(&servers.broker, Arc::new(Wake::default()))))
}

async fn list(servers: ServerArgs, output: Output) -> ExitCode {
    let (store, broker) = match both(servers) {
        Ok(both) => both,
        Err(mistakes) => return usage(&mistakes),
    };
    let listed = async {
        let look = DeadLetterListing::begin(&store, &broker).await?;
        let looked = async {
            let (rows, mut letters) = (store.parked().await?, Vec::new());
            let waiting = look.waiting(DeadLetterQueue::Parked).await?;
            let bar = progress(waiting.into(), "letters");
            let see = |letter: Looked| {
                bar.inc(1);
                letters.push(letter.into());
            };
            look.at(DeadLetterQueue::Parked, waiting, see).await?;
            bar.finish_and_clear();
            anyhow::Ok(Listed { rows, letters })
        };
        let looked = looked.await;
        look.end().await;
        looked
    };
    match listed.await {
        Ok(listed) => {
            output.answer(&listed);
            ExitCode::SUCCESS
        }
        Err(error) => fail(1, &error),
    }
}

async fn run_on(RowRef { servers, ids, all }: RowRef, deed: Deed) -> anyhow::Result<Result<Done, ValidationErrors>> {
    let (store, broker) = match both(servers) {
        Ok(both) => both,
        Err(mistakes) => return Ok(Err(mistakes)),
    };
    // Both servers before anything is done on one of them.
    let mut admin = DeadLetterAdmin::alone(&store, &broker).await?;
    let wanted = if all { Selection::All } else { Selection::Ids(ids.into_iter().collect()) };
    let mut done = Done::default();
    let worked = async {
        on_rows(&store, &wanted, deed, &mut done).await?;
        on_letters(&mut admin, &wanted, deed, &mut done).await
    };
    let worked = worked.await;
    admin.end().await;
    worked.map(|()| Ok(done))
}

async fn on_rows(store: &Store, wanted: &Selection, deed: Deed, done: &mut Done) -> anyhow::Result<()> {
    let mut rows = store.parked().await?;
    rows.retain(|row| wanted.takes(Some(&row.id.to_string())));
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let bar = progress(ids.len() as u64, "rows");
    let more = |rows| bar.inc(rows as u64);
    let worked = match deed {
        Deed::Drop => drop_rows(store, &ids, more).await,
        Deed::Retry => retry_rows(store, &ids, more).await,
    };
    bar.finish_and_clear();
    let worked = worked?;
    done.rows = worked.count;
    stay(worked.stay, done);
    Ok(())
}

/// Goes once through the parked letters.
async fn on_letters(
    admin: &mut DeadLetterAdmin,
    wanted: &Selection,
    deed: Deed,
    done: &mut Done,
) -> anyhow::Result<()> {
    let bar = progress(admin.waiting(DeadLetterQueue::Parked).await?.into(), "letters");
    // Broken off between what is sent and what is acknowledged, it would leave copies.
    let (more, stop) = (|letters| bar.inc(letters as u64), shutdown_on_signal_or_hangup()?);
    let worked = match deed {
        Deed::Drop => admin.drop_parked(wanted, more, &stop).await,
        Deed::Retry => admin.retry_parked(wanted, more, &stop).await,
    };
    bar.finish_and_clear();
    let worked = worked?;
    done.letters = worked.count;
    stay(worked.stay, done);
    Ok(())
}

fn stay(stay: Vec<NotDone>, done: &mut Done) {
    for NotDone { id, why } in &stay {
        complain(format_args!("tidings: {} stays: {}", name(id.as_ref()), printable(why)));
    }
    done.stay.extend(stay);
}

fn name(id: Option<&String>) -> String {
    id.map_or_else(|| "-".to_owned(), |id| printable(id))
}

impl fmt::Display for Listed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc();
        for ParkedRow { id, kind, parked_at, reason, .. } in &self.rows {
            let age = age(Duration::try_from(now - *parked_at).unwrap_or_default());
            writeln!(formatter, "row     {id}  {kind:<24} {age} ago: {}", printable(reason))?;
        }
        for ParkedLetter { id, kind, queue, reason } in &self.letters {
            let kind = printable(kind.as_deref().unwrap_or("-"));
            let queue = printable(queue.as_deref().unwrap_or("?"));
            let reason = printable(reason.as_deref().unwrap_or("no reason was noted"));
            writeln!(formatter, "letter  {}  {kind:<24} died in {queue}: {reason}", name(id.as_ref()))?;
        }
        write!(formatter, "{} rows and {} letters are parked", self.rows.len(), self.letters.len())
    }
}

impl fmt::Display for Retried {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, letters, stay } = self;
        write!(formatter, "{rows} rows and {letters} letters put back, {} stay", stay.len())
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} rows and {} letters dropped for good", self.rows, self.letters)
    }
}
