//! Measures failovers, many in one run with one daemon: how long after a server can be used again rows are on time again, and how
//! many rows were lost or came twice. Each server's failover is in a file of its own; this one has the stream of rows that goes on
//! meanwhile.

mod postgres;
mod rabbitmq;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use harness::consumer::{Inbox, Received};
use harness::daemon::Daemon;
use harness::world::World;
use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Bench;
use crate::load::{QUEUE, payload};
use crate::raw::now_us;
use crate::report::{Figure, Times};

/// The number of failovers of each server.
const FAILOVERS: u32 = 20;
/// The time between two rows of the stream.
const STEP_MS: u32 = 20;
/// A row is on time if its message arrives earlier than this after it was due.
const LATE_MS: i64 = 250;
/// How long rows fall due before the server is killed.
const BEFORE: Duration = Duration::from_secs(2);
/// For how long rows fall due after a server can be used again, at most.
const AFTER: Duration = Duration::from_mins(1);
/// How long rows fall due after the first that was on time, so that one is noticed that is late again.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// How long a row that was late is waited for before it is taken for lost.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long second copies are waited for in the end.
const COPIES: Duration = Duration::from_secs(5);

/// How many lines of the daemon's log are printed after a failover that took too long.
const LINES: usize = 20;

/// Measures failovers of PostgreSQL, and then of RabbitMQ.
pub(crate) async fn failover(bench: &Bench) -> Vec<Figure> {
    let times = bench.times(FAILOVERS);
    let mut figures = postgres::measure(times).await;
    figures.extend(rabbitmq::measure(times).await);
    figures
}

/// Rows that fall due at a steady pace, and the messages that have come.
struct Stream {
    /// When each row was due, in ms since the Unix epoch, without those that were withdrawn.
    scheduled: HashMap<Uuid, i64>,
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    /// The rows of the failovers before this one.
    earlier: HashSet<Uuid>,
    /// Consumes until this value is dropped.
    _consumer: JoinSet<()>,
}

/// A message that has come, with times in ms since the Unix epoch.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    id: Uuid,
    due_ms: i64,
    at_ms: i64,
}

impl Arrival {
    /// `None` = the message does not come from a row.
    fn of(received: &Received) -> Option<Self> {
        let headers = received.properties().headers().as_ref()?.inner();
        let Some(AMQPValue::LongLongInt(due_ms)) = headers.get("tidings-due-ms") else { return None };
        Some(Self { id: received.id(), due_ms: *due_ms, at_ms: received.at_ms })
    }

    fn is_late(&self) -> bool {
        self.at_ms - self.due_ms >= LATE_MS
    }
}

/// One failover, in ms from the moment at which the server could be used again.
#[derive(Clone, Copy, Debug)]
struct Outcome {
    /// Until the first row arrived that was due after that moment, and was on time.
    on_time: f64,
    /// Until all rows had arrived that were due before.
    caught_up: f64,
    /// Until the last row arrived that was late.
    last_late: f64,
}

impl Stream {
    /// Makes a quorum queue and consumes from it, on the node of RabbitMQ that the world is connected to.
    async fn start(world: &World) -> Self {
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let inbox = world.broker.inbox("tidings", QUEUE, &["#"], arguments).await;
        let arrivals = Arc::default();
        let mut consumer = JoinSet::new();
        consumer.spawn(consume(inbox, Arc::clone(&arrivals)));
        Self { scheduled: HashMap::new(), arrivals, earlier: HashSet::new(), _consumer: consumer }
    }

    /// Writes rows that fall due one after the other, from in a second on, for this long.
    async fn schedule(&mut self, db: &PgPool, time: Duration) {
        let rows = time.as_millis() / u128::from(STEP_MS);
        let insert = format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', date_trunc('milliseconds', now()) + interval '1 s' + n * interval '{STEP_MS} ms', '{}'
             FROM generate_series(1, {rows}) AS n
             RETURNING id, (extract(epoch FROM due_at) * 1000)::bigint",
            payload()
        );
        let written: Vec<(Uuid, i64)> = sqlx::query_as(AssertSqlSafe(insert)).fetch_all(db).await.expect("written");
        self.earlier.extend(self.scheduled.drain().map(|(id, _)| id));
        self.scheduled.extend(written);
    }

    /// Takes back the rows that are not due soon.
    async fn withdraw(&mut self, db: &PgPool) {
        let delete = "DELETE FROM tidings.schedules WHERE due_at > now() + interval '0.5 s' RETURNING id";
        let withdrawn: Vec<Uuid> = sqlx::query_scalar(delete).fetch_all(db).await.expect("withdrawn");
        for id in withdrawn {
            self.scheduled.remove(&id);
        }
    }

    /// The messages of the rows of this failover.
    fn arrivals(&self) -> Vec<Arrival> {
        let arrivals = self.arrivals.lock().expect("no holder of the lock panics");
        arrivals.iter().filter(|arrival| self.scheduled.contains_key(&arrival.id)).copied().collect()
    }

    /// Waits until rows are on time that were due from `from_ms` on, and for a while longer.
    async fn wait_until_on_time(&self, from_ms: i64) {
        let began = Instant::now();
        while first_on_time(&self.arrivals(), from_ms).is_none() {
            assert!(began.elapsed() < AFTER, "no row was on time within a minute");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tokio::time::sleep(AFTERWARDS).await;
    }

    /// Waits until the rows have come that were not withdrawn, and says what the failover took whose server could be used again
    /// at `from_ms`.
    async fn finish(&self, from_ms: i64) -> Outcome {
        let began = Instant::now();
        while self.count_missing() > 0 && began.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let arrivals = self.arrivals();
        let on_time = first_on_time(&arrivals, from_ms).expect("one was");
        let last = |which: &dyn Fn(&Arrival) -> bool| {
            let last = arrivals.iter().filter(|arrival| which(arrival)).map(|arrival| arrival.at_ms).max();
            from(from_ms, last.unwrap_or(from_ms))
        };
        Outcome {
            on_time: from(from_ms, on_time),
            caught_up: last(&|arrival| arrival.due_ms < from_ms),
            last_late: last(&Arrival::is_late),
        }
    }

    /// How many rows of this failover have not come.
    fn count_missing(&self) -> usize {
        let came: HashSet<Uuid> = self.arrivals().iter().map(|arrival| arrival.id).collect();
        self.scheduled.len() - came.len()
    }

    /// How many rows of all failovers have not come, and how many messages came a second time.
    async fn count_lost_and_twice(mut self) -> [f64; 2] {
        tokio::time::sleep(COPIES).await;
        self.earlier.extend(self.scheduled.drain().map(|(id, _)| id));
        let arrivals = self.arrivals.lock().expect("no holder of the lock panics").clone();
        let came: HashSet<Uuid> = arrivals.iter().map(|arrival| arrival.id).collect();
        [self.earlier.difference(&came).count(), arrivals.len() - came.len()].map(crate::report::count)
    }
}

async fn consume(mut inbox: Inbox, arrivals: Arc<Mutex<Vec<Arrival>>>) {
    loop {
        let received = inbox.next_without_timeout().await;
        if let Some(arrival) = Arrival::of(&received) {
            arrivals.lock().expect("no holder of the lock panics").push(arrival);
        }
        received.delivery.ack(BasicAckOptions::default()).await.expect("acknowledged");
    }
}

/// Prints what the daemon has written since its log had `lines` lines, if rows were late for longer than `limit_ms`.
fn explain(outcome: &Outcome, limit_ms: f64, daemon: &Daemon, lines: usize) {
    if outcome.on_time.max(outcome.last_late) >= limit_ms {
        let log = daemon.log();
        let since: Vec<&str> = log.lines().skip(lines).collect();
        eprintln!(
            "rows were late for long; the first of {} lines of the daemon's log since before the kill:",
            since.len()
        );
        since.iter().take(LINES).for_each(|line| eprintln!("  {line}"));
    }
}

/// When the first message came of a row that was due from `from_ms` on and was on time.
fn first_on_time(arrivals: &[Arrival], from_ms: i64) -> Option<i64> {
    let on_time = arrivals.iter().filter(|arrival| arrival.due_ms >= from_ms && !arrival.is_late());
    on_time.map(|arrival| arrival.at_ms).min()
}

/// The time between two instants in ms; nothing if the second is the earlier one.
fn from(from_ms: i64, until_ms: i64) -> f64 {
    crate::report::count(usize::try_from(until_ms - from_ms).unwrap_or(0))
}

/// The clock of this machine, on which all servers run, in ms since the Unix epoch.
fn now_ms() -> i64 {
    now_us() / 1000
}

/// The figures of the failovers of one server. `since` is the moment from which the times count, and no row may be late after `limit_ms`.
fn figures(name: &str, since: &str, limit_ms: f64, outcomes: &[Outcome], [lost, twice]: [f64; 2]) -> Vec<Figure> {
    let percentile = |of: fn(&Outcome) -> f64, percent| [Times::new(outcomes.iter().map(of)).percentile(percent)];
    let on_time = |outcome: &Outcome| outcome.on_time;
    vec![
        Figure::new(format!("{name}: {since} to rows on time, p50"), "ms", outcomes.iter().map(on_time)),
        Figure::new(format!("{name}: {since} to rows on time, p90"), "ms", percentile(on_time, 90)),
        Figure::new(format!("{name}: {since} to rows on time, most"), "ms", percentile(on_time, 100)).under(limit_ms),
        Figure::new(format!("{name}: until all overdue rows came, p50"), "ms", outcomes.iter().map(|of| of.caught_up)),
        Figure::new(format!("{name}: the same, most"), "ms", percentile(|of| of.caught_up, 100)),
        Figure::new(format!("{name}: until the last late row, most"), "ms", percentile(|of| of.last_late, 100))
            .under(limit_ms),
        Figure::new(format!("{name}: rows that were lost"), "rows", [lost]).at_most(0.0),
        Figure::new(format!("{name}: second copies"), "", [twice]),
    ]
}
