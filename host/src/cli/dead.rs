//! `tidings dead …`: the dead letters, by hand. Whoever works on them is alone with them, as a pass of the daemon is.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use super::{age, fail, printable, progress, usage};
use crate::broker::{Broker, DeadLetters, Pile};
use crate::config::{Mistakes, ServerArgs};
use crate::dead_letter::{DeadLetter, Fate, Tally};
use crate::lifecycle::shutdown_on_signal;
use crate::replayer::{drop_letters, take_back, window};
use crate::store::{Pass, Store};
use crate::wake::Wake;

/// What can be done with dead letters.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Counts what lies there, by queue, kind and reason, with the age of the oldest
    List(ListArgs),
    /// Makes a pass now: sends letters back into the queues they died in
    Replay(ReplayArgs),
    /// Removes letters for good
    Drop(DropArgs),
}

/// What to list.
#[derive(Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    filter: Filter,
}

/// What to replay.
#[derive(Args, Debug)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    filter: Filter,
    /// Only says what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What to drop.
#[derive(Args, Debug)]
pub(super) struct DropArgs {
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    filter: Filter,
    /// All of them, if neither kind, queue nor time is given
    #[arg(long)]
    all: bool,
}

/// Which letters.
#[derive(Args, Debug)]
struct Filter {
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only those that died in this queue
    #[arg(long, value_name = "QUEUE")]
    queue: Option<String>,
    /// Only those that died within this time, such as 90s, 15min or 2h
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    since: Option<Duration>,
}

impl Filter {
    fn takes(&self, letter: &DeadLetter, now_seconds: u64) -> bool {
        let since =
            |since: Duration| letter.died_at.is_some_and(|at| at >= now_seconds.saturating_sub(since.as_secs()));
        self.kind.as_ref().is_none_or(|kind| letter.kind.as_ref() == Some(kind))
            && self.queue.as_ref().is_none_or(|queue| letter.queue.as_ref() == Some(queue))
            && self.since.is_none_or(since)
    }

    fn takes_all(&self) -> bool {
        self.kind.is_none() && self.queue.is_none() && self.since.is_none()
    }
}

pub(super) async fn run(command: Command) -> ExitCode {
    let done = match command {
        Command::List(args) => with_letters(args.servers, async |by_hand| list(by_hand, &args.filter).await).await,
        Command::Replay(args) if args.dry_run => {
            with_letters(args.servers, async |by_hand| dry_run(by_hand, &args.filter).await).await
        }
        Command::Replay(args) => with_letters(args.servers, async |by_hand| replay(by_hand, &args.filter).await).await,
        Command::Drop(args) if !args.all && args.filter.takes_all() => {
            let sentence = "say which letters to drop for good, with --kind, --queue or --since, or say --all";
            Ok(Err(Mistakes::from(sentence)))
        }
        Command::Drop(args) => with_letters(args.servers, async |by_hand| drop_them(by_hand, &args.filter).await).await,
    };
    match done {
        Ok(Ok(sentence)) => {
            println!("{sentence}");
            ExitCode::SUCCESS
        }
        Ok(Err(mistakes)) => usage(&mistakes),
        Err(error) => fail(1, &error),
    }
}

/// The letters, and the right to touch them.
struct ByHand {
    pass: Pass,
    letters: DeadLetters,
    /// How often a letter may be replayed.
    max: u32,
    /// How many letters lie there.
    waiting: u32,
    /// A signal: what is in flight is finished.
    stop: CancellationToken,
}

/// Does something with the letters, alone, and closes them, whatever came of it. Returns a sentence that says what was done.
async fn with_letters(
    servers: ServerArgs,
    work: impl AsyncFnOnce(&mut ByHand) -> anyhow::Result<String>,
) -> anyhow::Result<Result<String, Mistakes>> {
    let servers = match servers.check() {
        Ok(servers) => servers,
        Err(mistakes) => return Ok(Err(mistakes)),
    };
    let broker = Broker::new(&servers.broker, Arc::new(Wake::default()));
    let Some(pass) = Store::new(&servers.database_url, 1).wait_for_dead_letters(broker.exchange()).await? else {
        bail!("somebody is making a pass over the dead letters of {} at this moment; try again soon", broker.exchange())
    };
    let letters = broker.dead_letters().await?;
    let waiting = letters.waiting(Pile::Dead).await;
    let waiting = waiting.with_context(|| {
        format!("there are no dead letters of {}; the daemon declares their queue when it starts", broker.exchange())
    })?;
    let stop = shutdown_on_signal()?;
    let mut by_hand = ByHand { pass, letters, max: servers.replay_max, waiting, stop };
    let done = work(&mut by_hand).await;
    by_hand.letters.close().await;
    by_hand.pass.end().await;
    done.map(Ok)
}

async fn list(ByHand { letters, waiting, .. }: &mut ByHand, filter: &Filter) -> anyhow::Result<String> {
    let bar = progress(u64::from(*waiting), "looked at");
    let (now, mut listed) = (now_seconds(), 0);
    let mut groups: BTreeMap<[String; 3], (u32, Option<u64>)> = BTreeMap::new();
    let mut left = *waiting;
    while left > 0 {
        // Nothing is acknowledged: all of it is where it was when this connection closes.
        for letter in window(letters, Pile::Dead, &mut left).await? {
            bar.inc(1);
            if !filter.takes(&letter.says, now) {
                continue;
            }
            let name = |name: Option<String>| name.map_or_else(|| "-".into(), |name| printable(&name));
            let DeadLetter { queue, kind, reason, died_at, .. } = letter.says;
            let (count, oldest) = groups.entry([name(queue), name(kind), name(reason)]).or_default();
            listed += 1;
            *count += 1;
            *oldest = [*oldest, died_at].into_iter().flatten().min();
        }
    }
    bar.finish_and_clear();
    if !groups.is_empty() {
        println!("{:>8}  {:<30} {:<24} {:<14} oldest", "letters", "died in", "kind", "reason");
    }
    for ([queue, kind, reason], (count, oldest)) in groups {
        let age = oldest.map_or_else(|| "?".into(), |at| age(Duration::from_secs(now.saturating_sub(at))));
        println!("{count:>8}  {queue:<30} {kind:<24} {reason:<14} {age}");
    }
    Ok(format!("{listed} of {waiting} dead letters"))
}

async fn replay(ByHand { pass, letters, max, waiting, stop }: &mut ByHand, filter: &Filter) -> anyhow::Result<String> {
    let (bar, now) = (progress(u64::from(*waiting), "dealt with"), now_seconds());
    let wanted = |letter: &DeadLetter| filter.takes(letter, now);
    let tally = take_back(letters, pass, *max, wanted, |window| bar.inc(window.letters()), stop).await;
    bar.finish_and_clear();
    let Tally { replayed, expired, parked, left, .. } = tally?;
    Ok(format!("{replayed} replayed, {expired} expired, {parked} parked, {left} left"))
}

/// Says letter by letter what a pass would do, and does nothing.
async fn dry_run(ByHand { pass, letters, max, waiting, .. }: &mut ByHand, filter: &Filter) -> anyhow::Result<String> {
    let (mut tally, now, mut left) = (Tally::default(), now_seconds(), *waiting);
    while left > 0 {
        let clock = pass.clock().await?;
        for letter in window(letters, Pile::Dead, &mut left).await? {
            let id = printable(letter.says.id.as_deref().unwrap_or("-"));
            if !filter.takes(&letter.says, now) {
                tally.left += 1;
                continue;
            }
            match letter.says.fate(clock.now_ms(), *max) {
                Fate::Expired => {
                    tally.expired += 1;
                    println!("{id}  would be removed: its deadline has come");
                }
                Fate::Replay { queue, replays, .. } => {
                    tally.replayed += 1;
                    println!("{id}  would go back into {}; replayed {} times before", printable(&queue), replays - 1);
                }
                Fate::Leave(reason) => {
                    tally.left += 1;
                    println!("{id}  would stay: {reason}");
                }
                Fate::Park(reason) => {
                    tally.parked += 1;
                    println!("{id}  would be parked: {reason}");
                }
            }
        }
    }
    let Tally { replayed, expired, parked, left, .. } = tally;
    Ok(format!("would be: {replayed} replayed, {expired} expired, {parked} parked, {left} left; nothing was done"))
}

async fn drop_them(
    ByHand { pass, letters, waiting, stop, .. }: &mut ByHand,
    filter: &Filter,
) -> anyhow::Result<String> {
    let (bar, now) = (progress(u64::from(*waiting), "looked at"), now_seconds());
    let dropped = drop_letters(letters, pass, |letter| filter.takes(letter, now), |seen| bar.inc(seen), stop).await;
    bar.finish_and_clear();
    Ok(format!("{} dropped for good", dropped?))
}

/// The broker notes the time of a death by a wall clock, and no other will do to compare with it.
fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
