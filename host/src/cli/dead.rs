//! `tidings dead …`: the dead letters, by hand. Whoever works on them is alone with them, as a pass of the daemon is.

use std::collections::BTreeMap;
use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde::Serialize;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;

use crate::broker::{Broker, DeadLetterQueue, Looked};
use crate::cli::output::{Output, complain};
use crate::cli::{age, fail, printable, progress, times, usage};
use crate::config::{ServerArgs, ValidationErrors};
use crate::daemon::signals::shutdown_on_signal_or_hangup;
use crate::dead_letters::admin::{DeadLetterAdmin, DeadLetterListing};
use crate::dead_letters::replayer::{drop_letters, take_back};
use crate::model::dead_letter::{DeadLetter, Fate, PassCounts};
use crate::model::wake::Wake;
use crate::store::Store;
use crate::telemetry::{TraceSettings, Traces};

/// A look at so many takes long enough to say so.
const MANY: u32 = 1000;

/// What can be done with dead letters.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Counts what lies there, by queue, kind and reason, with the age of the oldest
    #[command(after_help = "Example:\n  tidings dead list --kind game-status --since 2h --limit 1000")]
    List(ListArgs),
    /// Makes a pass now: sends letters back into the queues they died in
    #[command(after_help = "Example:\n  tidings dead replay --queue mails --dry-run")]
    Replay(ReplayArgs),
    /// Removes letters for good
    #[command(after_help = "Example:\n  tidings dead drop --queue old")]
    Drop(DropArgs),
}

/// What to list.
#[derive(Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    filter: Filter,
    /// Only the first so many that lie there, from the oldest on; 0 only counts them
    #[arg(long, value_name = "COUNT")]
    limit: Option<u32>,
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

/// RowRef letters.
#[derive(Args, Debug)]
struct Filter {
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only those that died in this queue
    #[arg(long, value_name = "QUEUE")]
    queue: Option<String>,
    /// Only those that died within this time, such as 90s, 15min or 2h
    #[arg(long, value_name = "TIME", value_parser = times::span)]
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

/// What lies there.
#[derive(Debug, Serialize)]
struct Listed {
    /// How many letters there are in all.
    waiting: u32,
    /// How many of them were looked at.
    looked_at: u32,
    /// How many of those were asked for.
    listed: u32,
    groups: Vec<Group>,
    /// To tell how old the oldest are.
    #[serde(skip)]
    now_seconds: u64,
}

/// Letters that died in one queue, of one kind and for one reason.
#[derive(Debug, Serialize)]
struct Group {
    queue: Option<String>,
    kind: Option<String>,
    reason: Option<String>,
    letters: u32,
    /// By the broker's clock, to the second.
    #[serde(with = "time::serde::rfc3339::option")]
    oldest_died_at: Option<OffsetDateTime>,
}

/// What was done, or would be.
#[derive(Debug, Serialize)]
struct Replayed {
    dry_run: bool,
    replayed: u64,
    expired: u64,
    parked: u64,
    left: u64,
    /// With `--dry-run`, letter by letter.
    letters: Vec<Would>,
}

/// What would become of one letter.
#[derive(Debug, Serialize)]
struct Would {
    id: Option<String>,
    /// `replay`, `expire`, `park` or `leave`.
    fate: &'static str,
    /// In words.
    says: String,
}

/// What is gone.
#[derive(Debug, Serialize)]
struct Dropped {
    dropped: u64,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    match command {
        Command::List(ListArgs { servers, filter, limit }) => {
            with_servers(servers, output, async |with| {
                with.look(async |look, _| list(look, &filter, limit.unwrap_or(u32::MAX)).await).await
            })
            .await
        }
        Command::Replay(ReplayArgs { servers, filter, dry_run: true }) => {
            with_servers(servers, output, async |with| {
                with.look(async |look, max| dry_run(look, &filter, max).await).await
            })
            .await
        }
        Command::Replay(ReplayArgs { servers, filter, dry_run: false }) => {
            with_servers(servers, output, async |with| with.work(async |work| replay(work, &filter).await).await).await
        }
        Command::Drop(args) if !args.all && args.filter.takes_all() => {
            let sentence = "say which letters to drop for good, with --kind, --queue or --since, or say --all";
            usage(&ValidationErrors::from(sentence))
        }
        Command::Drop(DropArgs { servers, filter, .. }) => {
            with_servers(servers, output, async |with| with.work(async |work| drop_them(work, &filter).await).await)
                .await
        }
    }
}

/// The servers, checked, for one piece of work on the letters.
struct With {
    store: Store,
    broker: Broker,
    /// How often a letter may be replayed.
    max: u32,
    /// Where traces go.
    traces: Option<TraceSettings>,
}

/// The letters, and what is given for the work on them.
struct Work {
    admin: DeadLetterAdmin,
    max: u32,
    /// How many letters lie there.
    waiting: u32,
    /// A signal: what is in flight is finished.
    stop: CancellationToken,
    traces: Option<TraceSettings>,
}

/// Does something with the servers, and answers.
async fn with_servers<T: fmt::Display + Serialize>(
    servers: ServerArgs,
    output: Output,
    work: impl AsyncFnOnce(With) -> anyhow::Result<T>,
) -> ExitCode {
    let servers = match servers.check() {
        Ok(servers) => servers,
        Err(mistakes) => return usage(&mistakes),
    };
    let store = Store::new(&servers.database_url, 1);
    let broker = Broker::new(&servers.broker, Arc::new(Wake::default()));
    match work(With { store, broker, max: servers.replay_max, traces: servers.traces }).await {
        Ok(answer) => {
            output.answer(&answer);
            ExitCode::SUCCESS
        }
        Err(error) => fail(1, &error),
    }
}

impl With {
    /// Looks at the letters, alone, and ends the look whatever came of it.
    async fn look<T>(
        self,
        work: impl AsyncFnOnce(&mut DeadLetterListing, u32) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut look = DeadLetterListing::begin(&self.store, &self.broker).await?;
        let done = work(&mut look, self.max).await;
        look.end().await;
        done
    }

    /// Does something with the letters, alone, and closes them whatever came of it.
    async fn work<T>(self, work: impl AsyncFnOnce(&mut Work) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let admin = DeadLetterAdmin::alone(&self.store, &self.broker).await?;
        let waiting = admin.waiting(DeadLetterQueue::Dead).await?;
        let mut with =
            Work { admin, max: self.max, waiting, stop: shutdown_on_signal_or_hangup()?, traces: self.traces };
        let done = work(&mut with).await;
        with.admin.end().await;
        done
    }
}

async fn list(look: &mut DeadLetterListing, filter: &Filter, limit: u32) -> anyhow::Result<Listed> {
    let waiting = look.waiting(DeadLetterQueue::Dead).await?;
    let most = waiting.min(limit);
    let bar = looking_at(most, waiting);
    let (now_seconds, mut looked_at, mut listed) = (now_seconds(), 0, 0);
    let mut groups: BTreeMap<[Option<String>; 3], (u32, Option<u64>)> = BTreeMap::new();
    let see = |letter: Looked| {
        bar.inc(1);
        looked_at += 1;
        if !filter.takes(&letter.says, now_seconds) {
            return;
        }
        let DeadLetter { queue, kind, reason, died_at, .. } = letter.says;
        let (count, oldest) = groups.entry([queue, kind, reason]).or_default();
        listed += 1;
        *count += 1;
        *oldest = [*oldest, died_at].into_iter().flatten().min();
    };
    look.at(DeadLetterQueue::Dead, most, see).await?;
    bar.finish_and_clear();
    let groups = groups.into_iter().map(|([queue, kind, reason], (letters, oldest))| Group {
        queue,
        kind,
        reason,
        letters,
        oldest_died_at: oldest
            .and_then(|at| i64::try_from(at).ok())
            .and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok()),
    });
    Ok(Listed { waiting, looked_at, listed, groups: groups.collect(), now_seconds })
}

/// Says how many lie there before the look, which takes a second for some thousands: on a terminal by a bar, elsewhere by a line
/// if they are many.
fn looking_at(most: u32, waiting: u32) -> ProgressBar {
    let bar = progress(most.into(), "looked at");
    if bar.is_hidden() && most >= MANY {
        complain(format_args!("tidings: looking at {most} of {waiting} dead letters"));
    }
    bar
}

async fn replay(Work { admin, max, waiting, stop, traces }: &mut Work, filter: &Filter) -> anyhow::Result<Replayed> {
    let DeadLetterAdmin { pass, letters, .. } = admin;
    let traces = Traces::start(traces.as_ref())?;
    let (bar, now) = (progress(u64::from(*waiting), "dealt with"), now_seconds());
    let wanted = |letter: &DeadLetter| filter.takes(letter, now);
    let tally = take_back(letters, pass, *max, wanted, |window| bar.inc(window.letters()), stop).await;
    bar.finish_and_clear();
    traces.stop().await;
    Ok(Replayed::of(&tally?, None))
}

/// Says letter by letter what a pass would do, and does nothing.
async fn dry_run(look: &mut DeadLetterListing, filter: &Filter, max: u32) -> anyhow::Result<Replayed> {
    let waiting = look.waiting(DeadLetterQueue::Dead).await?;
    let (bar, clock, now) = (looking_at(waiting, waiting), look.clock().await?, now_seconds());
    let (mut tally, mut would) = (PassCounts::default(), Vec::new());
    let see = |letter: Looked| {
        bar.inc(1);
        if !filter.takes(&letter.says, now) {
            tally.left += 1;
            return;
        }
        let (count, fate, says) = match letter.says.fate(clock.now_ms(), max) {
            Fate::Expired => (&mut tally.expired, "expire", "would be removed: its deadline has come".to_owned()),
            Fate::Replay { queue, replays, .. } => {
                let says = format!("would go back into {queue}; replayed {} times before", replays - 1);
                (&mut tally.replayed, "replay", says)
            }
            Fate::Leave(reason) => (&mut tally.left, "leave", format!("would stay: {reason}")),
            Fate::Park(reason) => (&mut tally.parked, "park", format!("would be parked: {reason}")),
        };
        *count += 1;
        would.push(Would { id: letter.says.id, fate, says });
    };
    look.at(DeadLetterQueue::Dead, waiting, see).await?;
    bar.finish_and_clear();
    Ok(Replayed::of(&tally, Some(would)))
}

async fn drop_them(Work { admin, waiting, stop, .. }: &mut Work, filter: &Filter) -> anyhow::Result<Dropped> {
    let DeadLetterAdmin { pass, letters, .. } = admin;
    let (bar, now) = (progress(u64::from(*waiting), "looked at"), now_seconds());
    let dropped = drop_letters(letters, pass, |letter| filter.takes(letter, now), |seen| bar.inc(seen), stop).await;
    bar.finish_and_clear();
    Ok(Dropped { dropped: dropped? })
}

impl Replayed {
    /// `would` is what a dry run found.
    fn of(tally: &PassCounts, would: Option<Vec<Would>>) -> Self {
        let PassCounts { replayed, expired, parked, left, .. } = *tally;
        Self { dry_run: would.is_some(), replayed, expired, parked, left, letters: would.unwrap_or_default() }
    }
}

impl fmt::Display for Listed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.groups.is_empty() {
            writeln!(formatter, "{:>8}  {:<30} {:<24} {:<14} oldest", "letters", "died in", "kind", "reason")?;
        }
        for Group { queue, kind, reason, letters, oldest_died_at } in &self.groups {
            let name = |name: &Option<String>| name.as_deref().map_or_else(|| "-".to_owned(), printable);
            let (queue, kind, reason) = (name(queue), name(kind), name(reason));
            let oldest = oldest_died_at.and_then(|at| u64::try_from(at.unix_timestamp()).ok());
            let age =
                oldest.map_or_else(|| "?".into(), |at| age(Duration::from_secs(self.now_seconds.saturating_sub(at))));
            writeln!(formatter, "{letters:>8}  {queue:<30} {kind:<24} {reason:<14} {age}")?;
        }
        let Self { listed, looked_at, waiting, .. } = self;
        if looked_at < waiting {
            write!(formatter, "{listed} of the first {looked_at} dead letters; {waiting} lie there")
        } else {
            write!(formatter, "{listed} of {waiting} dead letters")
        }
    }
}

impl fmt::Display for Replayed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Would { id, says, .. } in &self.letters {
            writeln!(formatter, "{}  {}", printable(id.as_deref().unwrap_or("-")), printable(says))?;
        }
        let Self { dry_run, replayed, expired, parked, left, .. } = self;
        let (would, nothing) = if *dry_run { ("would be: ", "; nothing was done") } else { ("", "") };
        write!(formatter, "{would}{replayed} replayed, {expired} expired, {parked} parked, {left} left{nothing}")
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} dropped for good", self.dropped)
    }
}

/// The broker notes the time of a death by a wall clock, and no other will do to compare with it.
fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
