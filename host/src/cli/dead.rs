//! `tidings dead …`: an operator lists, replays or drops dead letters. Each command takes the lock of a pass in
//! PostgreSQL, so that no daemon and no other command works on the dead letters at the same time.

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

use crate::broker::{Broker, DeadLetterQueue, ListedDeadLetter};
use crate::cli::output::{Output, complain};
use crate::cli::{fail, fail_usage, format_age, printable, progress_bar, times};
use crate::config::{ServerArgs, ValidationErrors};
use crate::daemon::signals::shutdown_on_signal_or_hangup;
use crate::dead_letters::admin::{DeadLetterAdmin, DeadLetterListing};
use crate::dead_letters::replayer::{drop_dead_letters, replay_dead_letters};
use crate::model::dead_letter::{DeadLetter, Fate, PassCounts};
use crate::model::wake::Wake;
use crate::store::Store;
use crate::telemetry::{TraceSettings, Traces};

/// Looking at this many dead letters takes long enough to be announced.
const MANY: u32 = 1000;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Counts the dead letters by queue, kind and reason, with the age of the oldest
    #[command(after_help = "Example:\n  tidings dead list --kind game-status --since 2h --limit 1000")]
    List(ListArgs),
    /// Makes a pass now: sends dead letters back into the queues they died in
    #[command(after_help = "Example:\n  tidings dead replay --queue mails --dry-run")]
    Replay(ReplayArgs),
    /// Removes dead letters for good
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
    /// Looks only at the first COUNT dead letters, from the oldest on; 0 only counts them
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

/// The dead letters to work on.
#[derive(Args, Debug)]
struct Filter {
    /// Only of this kind
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Only those that died in this queue
    #[arg(long, value_name = "QUEUE")]
    queue: Option<String>,
    /// Only those that died within this time, such as 90s, 15min or 2h
    #[arg(long, value_name = "TIME", value_parser = times::parse_span)]
    since: Option<Duration>,
}

impl Filter {
    fn matches(&self, letter: &DeadLetter, now_seconds: u64) -> bool {
        let died_within =
            |since: Duration| letter.died_at.is_some_and(|at| at >= now_seconds.saturating_sub(since.as_secs()));
        self.kind.as_ref().is_none_or(|kind| letter.kind.as_ref() == Some(kind))
            && self.queue.as_ref().is_none_or(|queue| letter.queue.as_ref() == Some(queue))
            && self.since.is_none_or(died_within)
    }

    fn is_empty(&self) -> bool {
        self.kind.is_none() && self.queue.is_none() && self.since.is_none()
    }
}

/// What `tidings dead list` answers.
#[derive(Debug, Serialize)]
struct Listed {
    /// How many dead letters there are in all.
    waiting: u32,
    /// How many of them were looked at.
    looked_at: u32,
    /// How many of those match the filter.
    listed: u32,
    groups: Vec<Group>,
    /// The wall clock when the list was made, from which the ages of the oldest follow.
    #[serde(skip)]
    now_seconds: u64,
}

/// Dead letters that died in one queue, of one kind and for one reason.
#[derive(Debug, Serialize)]
struct Group {
    queue: Option<String>,
    kind: Option<String>,
    reason: Option<String>,
    letters: u32,
    /// By RabbitMQ's clock, to the second.
    #[serde(with = "time::serde::rfc3339::option")]
    oldest_died_at: Option<OffsetDateTime>,
}

/// What `tidings dead replay` answers: what was done, or would be done.
#[derive(Debug, Serialize)]
struct Replayed {
    dry_run: bool,
    replayed: u64,
    expired: u64,
    parked: u64,
    left: u64,
    /// With `--dry-run`, each dead letter.
    letters: Vec<Plan>,
}

/// What a pass would do with one dead letter.
#[derive(Debug, Serialize)]
struct Plan {
    id: Option<String>,
    /// `replay`, `expire`, `park` or `leave`.
    fate: &'static str,
    says: String,
}

/// What `tidings dead drop` answers.
#[derive(Debug, Serialize)]
struct Dropped {
    dropped: u64,
}

pub(super) async fn run(command: Command, output: Output) -> ExitCode {
    match command {
        Command::List(ListArgs { servers, filter, limit }) => {
            with_servers(servers, output, async |servers| {
                servers.list(async |listing, _| list(listing, &filter, limit.unwrap_or(u32::MAX)).await).await
            })
            .await
        }
        Command::Replay(ReplayArgs { servers, filter, dry_run: true }) => {
            with_servers(servers, output, async |servers| {
                servers.list(async |listing, max| dry_run(listing, &filter, max).await).await
            })
            .await
        }
        Command::Replay(ReplayArgs { servers, filter, dry_run: false }) => {
            with_servers(servers, output, async |servers| {
                servers.administer(async |session| replay(session, &filter).await).await
            })
            .await
        }
        Command::Drop(args) if !args.all && args.filter.is_empty() => {
            let sentence = "choose the dead letters to drop for good with --kind, --queue or --since, or give --all";
            fail_usage(&ValidationErrors::from(sentence))
        }
        Command::Drop(DropArgs { servers, filter, .. }) => {
            with_servers(servers, output, async |servers| {
                servers.administer(async |session| drop_matching(session, &filter).await).await
            })
            .await
        }
    }
}

/// Both servers and the settings for one command.
struct Servers {
    store: Store,
    broker: Broker,
    /// How often a dead letter may be replayed.
    max: u32,
    traces: Option<TraceSettings>,
}

/// A connection to the dead letters, and what the work on them needs.
struct Session {
    admin: DeadLetterAdmin,
    max: u32,
    waiting: u32,
    /// Cancelled by a signal; what is in flight is finished first.
    stop: CancellationToken,
    traces: Option<TraceSettings>,
}

/// Runs `work` with the servers and prints the answer, or the error.
async fn with_servers<T: fmt::Display + Serialize>(
    servers: ServerArgs,
    output: Output,
    work: impl AsyncFnOnce(Servers) -> anyhow::Result<T>,
) -> ExitCode {
    let servers = match servers.check() {
        Ok(servers) => servers,
        Err(errors) => return fail_usage(&errors),
    };
    let store = Store::new(&servers.database_url, 1);
    let broker = Broker::new(&servers.broker, Arc::new(Wake::default()));
    match work(Servers { store, broker, max: servers.replay_max, traces: servers.traces }).await {
        Ok(answer) => {
            output.answer(&answer);
            ExitCode::SUCCESS
        }
        Err(error) => fail(1, &error),
    }
}

impl Servers {
    /// Runs `work` with a listing of the dead letters, and ends the listing however the work ended.
    async fn list<T>(
        self,
        work: impl AsyncFnOnce(&mut DeadLetterListing, u32) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut listing = DeadLetterListing::begin(&self.store, &self.broker).await?;
        let result = work(&mut listing, self.max).await;
        listing.end().await;
        result
    }

    /// Runs `work` with a session that changes the dead letters, and closes the session however the work ended.
    async fn administer<T>(self, work: impl AsyncFnOnce(&mut Session) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let admin = DeadLetterAdmin::alone(&self.store, &self.broker).await?;
        let waiting = admin.waiting(DeadLetterQueue::Dead).await?;
        let mut session =
            Session { admin, max: self.max, waiting, stop: shutdown_on_signal_or_hangup()?, traces: self.traces };
        let result = work(&mut session).await;
        session.admin.end().await;
        result
    }
}

async fn list(listing: &mut DeadLetterListing, filter: &Filter, limit: u32) -> anyhow::Result<Listed> {
    let waiting = listing.waiting(DeadLetterQueue::Dead).await?;
    let most = waiting.min(limit);
    let bar = announce_look(most, waiting);
    let (now_seconds, mut looked_at, mut listed) = (now_seconds(), 0, 0);
    let mut groups: BTreeMap<[Option<String>; 3], (u32, Option<u64>)> = BTreeMap::new();
    let group = |letter: ListedDeadLetter| {
        bar.inc(1);
        looked_at += 1;
        if !filter.matches(&letter.says, now_seconds) {
            return;
        }
        let DeadLetter { queue, kind, reason, died_at, .. } = letter.says;
        let (count, oldest) = groups.entry([queue, kind, reason]).or_default();
        listed += 1;
        *count += 1;
        *oldest = [*oldest, died_at].into_iter().flatten().min();
    };
    listing.at(DeadLetterQueue::Dead, most, group).await?;
    bar.finish_and_clear();
    let groups = groups.into_iter().map(|([queue, kind, reason], (letters, oldest))| Group {
        queue,
        kind,
        reason,
        letters,
        oldest_died_at: oldest.and_then(|at| OffsetDateTime::from_unix_timestamp(i64::try_from(at).ok()?).ok()),
    });
    Ok(Listed { waiting, looked_at, listed, groups: groups.collect(), now_seconds })
}

/// Announces a look, which takes a second for some thousands: on a terminal with a progress bar, elsewhere with a line
/// if they are many.
fn announce_look(most: u32, waiting: u32) -> ProgressBar {
    let bar = progress_bar(most.into(), "looked at");
    if bar.is_hidden() && most >= MANY {
        complain(format_args!("tidings: looking at {most} of {waiting} dead letters"));
    }
    bar
}

async fn replay(
    Session { admin, max, waiting, stop, traces }: &mut Session,
    filter: &Filter,
) -> anyhow::Result<Replayed> {
    let DeadLetterAdmin { pass, letters, .. } = admin;
    let traces = Traces::start(traces.as_ref())?;
    let (bar, now) = (progress_bar(u64::from(*waiting), "dealt with"), now_seconds());
    let is_wanted = |letter: &DeadLetter| filter.matches(letter, now);
    let counts = replay_dead_letters(letters, pass, *max, is_wanted, |window| bar.inc(window.letters()), stop).await;
    bar.finish_and_clear();
    traces.stop().await;
    Ok(Replayed::of(&counts?, None))
}

/// Says what a pass would do with each dead letter, and changes nothing.
async fn dry_run(listing: &mut DeadLetterListing, filter: &Filter, max: u32) -> anyhow::Result<Replayed> {
    let waiting = listing.waiting(DeadLetterQueue::Dead).await?;
    let (bar, clock, now) = (announce_look(waiting, waiting), listing.clock().await?, now_seconds());
    let (mut counts, mut plans) = (PassCounts::default(), Vec::new());
    let plan = |letter: ListedDeadLetter| {
        bar.inc(1);
        if !filter.matches(&letter.says, now) {
            counts.left += 1;
            return;
        }
        let (count, fate, says) = match letter.says.fate(clock.now_ms(), max) {
            Fate::Expired => (&mut counts.expired, "expire", "would be removed: its deadline has come".to_owned()),
            Fate::Replay { queue, replays, .. } => {
                let says = format!("would go back into {queue}; replayed {} times before", replays - 1);
                (&mut counts.replayed, "replay", says)
            }
            Fate::Leave(reason) => (&mut counts.left, "leave", format!("would stay: {reason}")),
            Fate::Park(reason) => (&mut counts.parked, "park", format!("would be parked: {reason}")),
        };
        *count += 1;
        plans.push(Plan { id: letter.says.id, fate, says });
    };
    listing.at(DeadLetterQueue::Dead, waiting, plan).await?;
    bar.finish_and_clear();
    Ok(Replayed::of(&counts, Some(plans)))
}

async fn drop_matching(Session { admin, waiting, stop, .. }: &mut Session, filter: &Filter) -> anyhow::Result<Dropped> {
    let DeadLetterAdmin { pass, letters, .. } = admin;
    let (bar, now) = (progress_bar(u64::from(*waiting), "looked at"), now_seconds());
    let dropped =
        drop_dead_letters(letters, pass, |letter| filter.matches(letter, now), |seen| bar.inc(seen), stop).await;
    bar.finish_and_clear();
    Ok(Dropped { dropped: dropped? })
}

impl Replayed {
    /// `plans` are those of a dry run.
    fn of(counts: &PassCounts, plans: Option<Vec<Plan>>) -> Self {
        let PassCounts { replayed, expired, parked, left, .. } = *counts;
        Self { dry_run: plans.is_some(), replayed, expired, parked, left, letters: plans.unwrap_or_default() }
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
            let age = oldest
                .map_or_else(|| "?".into(), |at| format_age(Duration::from_secs(self.now_seconds.saturating_sub(at))));
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
        for Plan { id, says, .. } in &self.letters {
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

/// This host's wall clock: RabbitMQ notes the time of a death by its own, so only a wall clock can be compared with it.
fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
