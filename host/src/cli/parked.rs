//! `tidings parked …`: what was set aside for a person. Rows that no plugin could build lie in the database, dead letters
//! that could not go back in a queue; here they are one list.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{NOT_FOUND, age, fail, printable, progress, usage};
use crate::broker::{Broker, DeadLetters, Letter, Pile, Sending, Sent};
use crate::config::{Mistakes, ServerArgs};
use crate::dead_letter::Fate;
use crate::replayer::window;
use crate::store::{Pass, Store};
use crate::wake::Wake;

/// Rows that are put back or dropped by one statement.
const CHUNK: usize = 500;

/// What can be done with what is parked.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Lists rows and letters, with the reasons
    List(ServerArgs),
    /// Puts rows back into the queue, due now, and letters back into the queues they died in
    Retry(Which),
    /// Removes them for good
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

/// How many it was done with, and how many stay, each of which was named.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    rows: usize,
    letters: usize,
    stay: usize,
}

pub(super) async fn run(command: Command) -> ExitCode {
    let (which, deed) = match command {
        Command::List(servers) => (Which { servers, ids: Vec::new(), all: true }, Deed::List),
        Command::Retry(which) => (which, Deed::Retry),
        Command::Drop(which) => (which, Deed::Drop),
    };
    // A list of nothing is an answer; an id that nothing has is a mistake.
    let all = which.all;
    let Done { rows, letters, stay } = match run_on(which, deed).await {
        Ok(Ok(done)) => done,
        Ok(Err(mistakes)) => return usage(&mistakes),
        Err(error) => return fail(1, &error),
    };
    match deed {
        Deed::List => println!("{rows} rows and {letters} letters are parked"),
        Deed::Retry => println!("{rows} rows and {letters} letters put back, {stay} stay"),
        Deed::Drop => println!("{rows} rows and {letters} letters dropped for good"),
    }
    match rows + letters {
        _ if stay > 0 => ExitCode::from(1),
        0 if !all => ExitCode::from(NOT_FOUND),
        _ => ExitCode::SUCCESS,
    }
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
        let now = OffsetDateTime::now_utc();
        for row in &rows {
            let age = age(Duration::try_from(now - row.parked_at).unwrap_or_default());
            println!("row     {}  {:<24} {age} ago: {}", row.id, row.kind, printable(&row.reason));
        }
        done.rows = rows.len();
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
                                done.stay += 1;
                                bar.suspend(|| eprintln!("tidings: {id} stays: {:#}", anyhow::Error::from(error)));
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
                Deed::List => {
                    show(&letter);
                    done.letters += 1;
                }
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
                        stays(&letter, "its deadline has come, and nobody may see it any more; drop it", done);
                    }
                    Fate::Park(reason) => stays(&letter, &reason, done),
                    Fate::Leave(reason) => stays(&letter, reason, done),
                },
            }
        }
        let (sent, others) = letters.send(back).await?;
        done.letters += usize::try_from(sent).unwrap_or(usize::MAX);
        for (letter, sent) in others {
            stays(&letter, if sent == Sent::NoQueue { "its queue is gone" } else { "its queue did not take it" }, done);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

fn stays(letter: &Letter, why: &str, done: &mut Done) {
    done.stay += 1;
    eprintln!("tidings: {} stays: {why}", name(letter));
}

fn show(letter: &Letter) {
    println!(
        "letter  {}  {:<24} died in {}: {}",
        name(letter),
        printable(letter.says.kind.as_deref().unwrap_or("-")),
        printable(letter.says.queue.as_deref().unwrap_or("?")),
        printable(letter.parked_reason.as_deref().unwrap_or("no reason was noted"))
    );
}

fn name(letter: &Letter) -> String {
    printable(letter.says.id.as_deref().unwrap_or("-"))
}
