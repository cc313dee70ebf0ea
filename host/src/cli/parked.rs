//! `tidings parked …`: what was set aside for a person. Rows that no plugin could build lie in the database, dead letters
//! that could not go back in a queue; here they are one list.

use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use time::OffsetDateTime;
use uuid::Uuid;

use super::output::{Output, complain};
use super::{NOT_FOUND, age, fail, printable, progress, usage};
use crate::broker::{Broker, DeadLetters, Pile, Sending, Sent};
use crate::config::{Mistakes, ServerArgs};
use crate::dead_letter::Fate;
use crate::replayer::window;
use crate::store::{ParkedRow, Pass, Store};
use crate::wake::Wake;

/// Rows that are put back or dropped by one statement.
const CHUNK: usize = 500;

/// What can be done with what is parked.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Lists rows and letters, with the reasons
    #[command(after_help = "Example:\n  tidings parked list")]
    List(ServerArgs),
    /// Puts rows back into the queue, due now, and letters back into the queues they died in
    #[command(after_help = "Example:\n  tidings parked retry 0199a6b2-1c2d-7000-8000-000000000001")]
    Retry(Which),
    /// Removes them for good
    #[command(after_help = "Example:\n  tidings parked drop --all")]
    Drop(Which),
}

/// Which of them.
#[derive(Args, Debug)]
pub(super) struct Which {
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
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    List,
    Retry,
    Drop,
}

/// What it was done with, and what stays.
#[derive(Debug, Default)]
struct Done {
    rows: usize,
    letters: usize,
    stay: Vec<Stays>,
    listed: Listed,
}

/// What is parked.
#[derive(Debug, Default, Serialize)]
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

/// What could not be put back.
#[derive(Debug, Serialize)]
struct Stays {
    id: Option<String>,
    why: String,
}

/// How many were put back, and what was not.
#[derive(Debug, Serialize)]
struct Retried {
    rows: usize,
    letters: usize,
    stay: Vec<Stays>,
}

/// How many are gone.
#[derive(Debug, Serialize)]
struct Dropped {
    rows: usize,
    letters: usize,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    let (which, deed) = match command {
        Command::List(servers) => (Which { servers, ids: Vec::new(), all: true }, Deed::List),
        Command::Retry(which) => (which, Deed::Retry),
        Command::Drop(which) => (which, Deed::Drop),
    };
    // A list of nothing is an answer; an id that nothing has is a mistake.
    let all = which.all;
    let Done { rows, letters, stay, listed } = match run_on(which, deed).await {
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
        Deed::List => output.answer(&listed),
        Deed::Retry => output.answer(&Retried { rows, letters, stay }),
        Deed::Drop => output.answer(&Dropped { rows, letters }),
    }
    code
}

async fn run_on(Which { servers, ids, all }: Which, deed: Deed) -> anyhow::Result<Result<Done, Mistakes>> {
    let servers = match servers.check() {
        Ok(servers) => servers,
        Err(mistakes) => return Ok(Err(mistakes)),
    };
    let store = Store::new(&servers.database_url, 1);
    let broker = Broker::new(&servers.broker, Arc::new(Wake::default()));
    // Both servers before anything is done on one of them.
    let Some(mut pass) = store.wait_for_dead_letters(broker.exchange()).await? else {
        bail!("somebody is making a pass over the dead letters of {} at this moment; try again soon", broker.exchange())
    };
    let letters = broker.dead_letters().await?;
    let mut done = Done::default();
    let takes = |id: Option<&str>| all || id.is_some_and(|id| ids.iter().any(|wanted| wanted == id));
    let worked = async {
        on_rows(&store, takes, deed, &mut done).await?;
        on_letters(&letters, &mut pass, takes, deed, &mut done).await
    };
    let worked = worked.await;
    letters.close().await;
    pass.end().await;
    worked.map(|()| Ok(done))
}

async fn on_rows(
    store: &Store,
    takes: impl Fn(Option<&str>) -> bool,
    deed: Deed,
    done: &mut Done,
) -> anyhow::Result<()> {
    let mut rows = store.parked().await?;
    rows.retain(|row| takes(Some(&row.id.to_string())));
    if deed == Deed::List {
        done.listed.rows = rows;
        return Ok(());
    }
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    let bar = progress(ids.len() as u64, "rows");
    for chunk in ids.chunks(CHUNK) {
        done.rows += match deed {
            Deed::Drop => store.drop_parked(chunk).await?,
            _ => match store.unpark(chunk).await {
                Err(error) if error.is_refusal() => {
                    // One of them cannot go back, since its key is taken for instance: the others can.
                    let mut count = 0;
                    for id in chunk {
                        match store.unpark(&[*id]).await {
                            Ok(one) => count += one,
                            Err(error) => {
                                let why = format!("{:#}", anyhow::Error::from(error));
                                bar.suspend(|| stays(Some(id.to_string()), why, done));
                            }
                        }
                    }
                    count
                }
                count => count?,
            },
        };
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Goes once through the parked letters. Those that nothing is done with are back when the connection closes.
async fn on_letters(
    letters: &DeadLetters,
    pass: &mut Pass,
    takes: impl Fn(Option<&str>) -> bool,
    deed: Deed,
    done: &mut Done,
) -> anyhow::Result<()> {
    let mut waiting = letters
        .waiting(Pile::Parked)
        .await
        .context("there are no parked letters; the daemon declares their queue when it starts")?;
    let bar = progress(if deed == Deed::List { 0 } else { waiting.into() }, "letters");
    while waiting > 0 {
        let clock = pass.clock().await?;
        let mut back = Vec::new();
        for letter in window(letters, Pile::Parked, &mut waiting).await? {
            bar.inc(1);
            if !takes(letter.says.id.as_deref()) {
                continue;
            }
            match deed {
                Deed::List => done.listed.letters.push(ParkedLetter {
                    id: letter.says.id,
                    kind: letter.says.kind,
                    queue: letter.says.queue,
                    reason: letter.parked_reason,
                }),
                Deed::Drop => {
                    letters.acknowledge(&letter).await?;
                    done.letters += 1;
                }
                // A person wants it, however often it was replayed.
                Deed::Retry => match letter.says.fate(clock.now_ms(), 0) {
                    Fate::Replay { queue, expiration_ms, replays } => {
                        back.push((letter, Sending::Back { queue, expiration_ms, replays }));
                    }
                    Fate::Expired => {
                        let why = "its deadline has come, and nobody may see it any more; drop it";
                        stays(letter.says.id, why.into(), done);
                    }
                    Fate::Park(reason) => stays(letter.says.id, reason, done),
                    Fate::Leave(reason) => stays(letter.says.id, reason.into(), done),
                },
            }
        }
        let (sent, others) = letters.send(back).await?;
        done.letters += usize::try_from(sent).unwrap_or(usize::MAX);
        for (letter, sent) in others {
            let why = if sent == Sent::NoQueue { "its queue is gone" } else { "its queue did not take it" };
            stays(letter.says.id, why.into(), done);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

fn stays(id: Option<String>, why: String, done: &mut Done) {
    complain(format_args!("tidings: {} stays: {}", name(id.as_ref()), printable(&why)));
    done.stay.push(Stays { id, why });
}

fn name(id: Option<&String>) -> String {
    id.map_or_else(|| "-".to_owned(), |id| printable(id))
}

impl fmt::Display for Listed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = OffsetDateTime::now_utc();
        for ParkedRow { id, kind, parked_at, reason } in &self.rows {
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
