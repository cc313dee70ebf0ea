//! `tidings parked …`: what was set aside for a person, as one list: rows that no plugin could build, which are in the
//! database, and dead letters that could not be replayed, which are in a queue of RabbitMQ.

use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::broker::{Broker, DeadLetterQueue, ListedDeadLetter};
use crate::cli::output::{Output, complain};
use crate::cli::{NOT_FOUND, fail, fail_usage, format_age, printable, progress_bar};
use crate::config::{ServerArgs, ValidationErrors};
use crate::daemon::signals::shutdown_on_signal_or_hangup;
use crate::dead_letters::admin::{DeadLetterAdmin, DeadLetterListing, NotDone, Selection, drop_rows, retry_rows};
use crate::model::wake::Wake;
use crate::store::{ParkedRow, Store};

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Lists parked rows and dead letters, with the reasons
    #[command(after_help = "Example:\n  tidings parked list")]
    List(ServerArgs),
    /// Puts rows back into the queue, due now, and dead letters back into the queues they died in
    #[command(after_help = "Example:\n  tidings parked retry 0199a6b2-1c2d-7000-8000-000000000001")]
    Retry(SelectionArgs),
    /// Removes parked rows and dead letters for good
    #[command(after_help = "Example:\n  tidings parked drop --all")]
    Drop(SelectionArgs),
}

/// The parked rows and dead letters to work on.
#[derive(Args, Debug)]
pub(super) struct SelectionArgs {
    #[command(flatten)]
    servers: ServerArgs,
    /// The ids of rows or messages
    #[arg(value_name = "ID", required_unless_present = "all")]
    ids: Vec<String>,
    /// All parked rows and dead letters
    #[arg(long, conflicts_with = "ids")]
    all: bool,
}

/// What a command does with them.
#[derive(Clone, Copy)]
enum Action {
    Retry,
    Drop,
}

/// How many rows and dead letters the action was done with, and which ones stay parked.
#[derive(Debug, Default)]
struct Outcome {
    rows: usize,
    letters: usize,
    stay: Vec<NotDone>,
}

/// What `tidings parked list` answers.
#[derive(Debug, Serialize)]
struct Listed {
    rows: Vec<ParkedRow>,
    letters: Vec<ParkedLetter>,
}

/// A parked dead letter.
#[derive(Debug, Serialize)]
struct ParkedLetter {
    id: Option<String>,
    kind: Option<String>,
    /// The queue in which it died.
    queue: Option<String>,
    /// Why it was parked.
    reason: Option<String>,
}

impl From<ListedDeadLetter> for ParkedLetter {
    fn from(ListedDeadLetter { says, parked_reason }: ListedDeadLetter) -> Self {
        Self { id: says.id, kind: says.kind, queue: says.queue, reason: parked_reason }
    }
}

/// What `tidings parked retry` answers.
#[derive(Debug, Serialize)]
struct Retried {
    rows: usize,
    letters: usize,
    stay: Vec<NotDone>,
}

/// What `tidings parked drop` answers.
#[derive(Debug, Serialize)]
struct Dropped {
    rows: usize,
    letters: usize,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    let (selection, action) = match command {
        Command::List(servers) => return list(servers, output).await,
        Command::Retry(selection) => (selection, Action::Retry),
        Command::Drop(selection) => (selection, Action::Drop),
    };
    // With --all, nothing to do is a success. An id that does not exist is an error.
    let all = selection.all;
    let Outcome { rows, letters, stay } = match run_action(selection, action).await {
        Ok(Ok(done)) => done,
        Ok(Err(errors)) => return fail_usage(&errors),
        Err(error) => return fail(1, &error),
    };
    let code = match rows + letters {
        _ if !stay.is_empty() => ExitCode::FAILURE,
        0 if !all => ExitCode::from(NOT_FOUND),
        _ => ExitCode::SUCCESS,
    };
    match action {
        Action::Retry => output.answer(&Retried { rows, letters, stay }),
        Action::Drop => output.answer(&Dropped { rows, letters }),
    }
    code
}

/// Returns both servers, without connecting to them.
fn open_servers(servers: ServerArgs) -> Result<(Store, Broker), ValidationErrors> {
    let servers = servers.check()?;
    Ok((Store::new(&servers.database_url, 1), Broker::new(&servers.broker, Arc::new(Wake::default()))))
}

async fn list(servers: ServerArgs, output: Output) -> ExitCode {
    let (store, broker) = match open_servers(servers) {
        Ok(servers) => servers,
        Err(errors) => return fail_usage(&errors),
    };
    let listed = async {
        let listing = DeadLetterListing::begin(&store, &broker).await?;
        let listed = async {
            let (rows, mut letters) = (store.parked().await?, Vec::new());
            let waiting = listing.waiting(DeadLetterQueue::Parked).await?;
            let bar = progress_bar(waiting.into(), "dead letters");
            let collect = |letter: ListedDeadLetter| {
                bar.inc(1);
                letters.push(letter.into());
            };
            listing.at(DeadLetterQueue::Parked, waiting, collect).await?;
            bar.finish_and_clear();
            anyhow::Ok(Listed { rows, letters })
        };
        let listed = listed.await;
        listing.end().await;
        listed
    };
    match listed.await {
        Ok(listed) => {
            output.answer(&listed);
            ExitCode::SUCCESS
        }
        Err(error) => fail(1, &error),
    }
}

async fn run_action(
    SelectionArgs { servers, ids, all }: SelectionArgs,
    action: Action,
) -> anyhow::Result<Result<Outcome, ValidationErrors>> {
    let (store, broker) = match open_servers(servers) {
        Ok(servers) => servers,
        Err(errors) => return Ok(Err(errors)),
    };
    // Connects to both servers before anything is done on one of them.
    let mut admin = DeadLetterAdmin::alone(&store, &broker).await?;
    let selection = if all { Selection::All } else { Selection::Ids(ids.into_iter().collect()) };
    let mut outcome = Outcome::default();
    let result = async {
        act_on_rows(&store, &selection, action, &mut outcome).await?;
        act_on_dead_letters(&mut admin, &selection, action, &mut outcome).await
    };
    let result = result.await;
    admin.end().await;
    result.map(|()| Ok(outcome))
}

async fn act_on_rows(
    store: &Store,
    selection: &Selection,
    action: Action,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let mut rows = store.parked().await?;
    rows.retain(|row| selection.takes(Some(&row.id.to_string())));
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let bar = progress_bar(ids.len() as u64, "rows");
    let advance = |rows| bar.inc(rows as u64);
    let result = match action {
        Action::Drop => drop_rows(store, &ids, advance).await,
        Action::Retry => retry_rows(store, &ids, advance).await,
    };
    bar.finish_and_clear();
    let done = result?;
    outcome.rows = done.count;
    report_unchanged(done.stay, outcome);
    Ok(())
}

/// Goes through the parked dead letters once.
async fn act_on_dead_letters(
    admin: &mut DeadLetterAdmin,
    selection: &Selection,
    action: Action,
    outcome: &mut Outcome,
) -> anyhow::Result<()> {
    let bar = progress_bar(admin.waiting(DeadLetterQueue::Parked).await?.into(), "dead letters");
    // A signal must not end the process between publishing a dead letter and acknowledging it: that would leave a copy.
    let (advance, stop) = (|letters| bar.inc(letters as u64), shutdown_on_signal_or_hangup()?);
    let result = match action {
        Action::Drop => admin.drop_parked(selection, advance, &stop).await,
        Action::Retry => admin.retry_parked(selection, advance, &stop).await,
    };
    bar.finish_and_clear();
    let done = result?;
    outcome.letters = done.count;
    report_unchanged(done.stay, outcome);
    Ok(())
}

fn report_unchanged(stay: Vec<NotDone>, outcome: &mut Outcome) {
    for NotDone { id, why } in &stay {
        complain(format_args!("tidings: {} stays: {}", show_id(id.as_ref()), printable(why)));
    }
    outcome.stay.extend(stay);
}

fn show_id(id: Option<&String>) -> String {
    id.map_or_else(|| "-".to_owned(), |id| printable(id))
}

impl fmt::Display for Listed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc();
        for ParkedRow { id, kind, parked_at, reason, .. } in &self.rows {
            let age = format_age(Duration::try_from(now - *parked_at).unwrap_or_default());
            writeln!(formatter, "row     {id}  {kind:<24} {age} ago: {}", printable(reason))?;
        }
        for ParkedLetter { id, kind, queue, reason } in &self.letters {
            let kind = printable(kind.as_deref().unwrap_or("-"));
            let queue = printable(queue.as_deref().unwrap_or("?"));
            let reason = printable(reason.as_deref().unwrap_or("no reason was noted"));
            writeln!(formatter, "letter  {}  {kind:<24} died in {queue}: {reason}", show_id(id.as_ref()))?;
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
