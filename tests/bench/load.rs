//! What the scenarios are played on: a world with one quorum queue, rows that wait, rows that are due, and how late they
//! were. Decides nothing about what a figure means.

use std::time::Duration;

use harness::daemon::{Daemon, Launch};
use harness::eventually_within;
use harness::world::World;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use sqlx::{AssertSqlSafe, Row as _};
use time::OffsetDateTime;

use crate::report::Times;

/// The body of every message.
pub(crate) const BODY_BYTES: usize = 400;
/// The queue of all messages, and the routing key of most.
pub(crate) const QUEUE: &str = "measured";
/// Longer than anything takes that ends.
const PATIENCE: Duration = Duration::from_mins(15);
/// Rows after which connections, plans and code are warm.
const WARM: u32 = 2_000;
/// Rows that one statement writes, of those that wait.
const CHUNK: u32 = 1_000_000;

/// A world with a queue.
#[derive(Debug)]
pub(crate) struct Stage {
    /// Its database, its virtual host, its plugins.
    pub(crate) world: World,
    channel: Channel,
    /// Rows that wait for a day that does not come.
    pending: u32,
}

impl Stage {
    /// With these plugins, without a daemon, and with no rows.
    pub(crate) async fn with(plugins: &[&str]) -> Self {
        let world = World::with(plugins).await;
        let channel = world.broker.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let none = FieldTable::default;
        channel.exchange_declare("tidings".into(), ExchangeKind::Topic, durable, none()).await.expect("the exchange");
        let mut arguments = none();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        channel.queue_declare(QUEUE.into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
        let options = QueueBindOptions::default();
        channel.queue_bind(QUEUE.into(), "tidings".into(), "#".into(), options, none()).await.expect("a binding");
        Self { world, channel, pending: 0 }
    }

    /// A daemon with the settings that it has by default, warm.
    pub(crate) async fn daemon(&self) -> Daemon {
        self.warm(&self.world.launch()).await
    }

    /// The same as it is launched here.
    pub(crate) async fn warm(&self, launch: &Launch) -> Daemon {
        let daemon = launch.ready().await;
        self.drain(WARM).await;
        self.tidy().await;
        daemon
    }

    /// Writes rows that wait, one every three seconds from tomorrow on, until there are so many.
    pub(crate) async fn pend(&mut self, rows: u32) {
        while self.pending < rows {
            let more = (rows - self.pending).min(CHUNK);
            let insert = format!(
                r#"INSERT INTO tidings.schedules (kind, due_at, payload)
                   SELECT 'message', now() + interval '1 day' + ({} + n) * interval '3 s', '{{"routing_key":"a","body":1}}'
                   FROM generate_series(1, {more}) AS n"#,
                self.pending
            );
            self.world.sql(&insert).await;
            self.pending += more;
        }
        self.tidy().await;
    }

    /// Empties the queue and the history, and has PostgreSQL do at once what it would do at some time.
    pub(crate) async fn tidy(&self) {
        self.purge().await;
        self.world.sql("TRUNCATE tidings.deliveries").await;
        self.world.sql("VACUUM ANALYZE tidings.schedules").await;
        self.world.sql("CHECKPOINT").await;
    }

    /// Empties the queue.
    pub(crate) async fn purge(&self) {
        self.channel.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.expect("purged");
    }

    /// Messages in the queue.
    pub(crate) async fn queued(&self) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel.queue_declare(QUEUE.into(), options, FieldTable::default()).await;
        declared.expect("the queue").message_count()
    }

    /// Writes rows that are due, in one transaction, and returns the database's time right before its commit.
    pub(crate) async fn write_due(&self, rows: u32) -> OffsetDateTime {
        self.write(rows_due("now()", rows)).await
    }

    async fn write(&self, insert: String) -> OffsetDateTime {
        let mut transaction = self.world.db.begin().await.expect("a transaction");
        sqlx::query(AssertSqlSafe(insert)).execute(&mut *transaction).await.expect("inserted");
        let now = sqlx::query("SELECT clock_timestamp()").fetch_one(&mut *transaction).await.expect("the time").get(0);
        transaction.commit().await.expect("committed");
        now
    }

    /// Writes rows that are due and waits until they are delivered: rows per second, from the commit to the last confirm.
    pub(crate) async fn drain(&self, rows: u32) -> f64 {
        self.drained(rows, rows_due("now()", rows)).await
    }

    /// The same with bodies of some `body_bytes` bytes, which hardly get smaller when they are compressed.
    pub(crate) async fn drain_bodies(&self, rows: u32, body_bytes: usize) -> f64 {
        let insert = format!(
            "WITH said AS MATERIALIZED (
                 SELECT jsonb_build_object('routing_key', '{QUEUE}', 'body', left(string_agg(md5(n::text), ''), {body_bytes})) AS payload
                 FROM generate_series(0, {body_bytes} / 32) AS n
             )
             INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), payload FROM said, generate_series(1, {rows})"
        );
        self.drained(rows, insert).await
    }

    async fn drained(&self, rows: u32, insert: String) -> f64 {
        let begun = self.write(insert).await;
        self.until_queued(rows).await;
        self.until_finished(rows).await;
        per_second(rows, self.last_confirm().await - begun)
    }

    /// Waits until so many messages are in the queue. Nobody may consume.
    pub(crate) async fn until_queued(&self, messages: u32) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // Asks the broker, and seldom: PostgreSQL would read every row that was deleted to say how many are left.
        let mut pace = tokio::time::interval(Duration::from_millis(50));
        while self.queued().await < messages {
            assert!(tokio::time::Instant::now() < deadline, "{messages} messages did not come");
            pace.tick().await;
        }
    }

    /// Waits until the history has so many rows.
    pub(crate) async fn until_finished(&self, rows: u32) {
        let all = format!("SELECT count(*) >= {rows} FROM tidings.deliveries WHERE outcome = 'delivered'");
        let finished = async || self.world.value::<bool>(&all).await.then_some(());
        eventually_within(PATIENCE, "the last commit", finished).await;
    }

    /// When the last confirm came, by the database clock.
    pub(crate) async fn last_confirm(&self) -> OffsetDateTime {
        self.world.value("SELECT max(finished_at) FROM tidings.deliveries").await
    }

    /// From due to confirm, by the database clock, of those deliveries that `which` says.
    pub(crate) async fn lateness(&self, which: &str) -> Times {
        let late = format!(
            "SELECT coalesce(array_agg((extract(epoch FROM finished_at - due_at) * 1000)::float8), '{{}}')
             FROM tidings.deliveries WHERE {which}"
        );
        Times::new(self.world.value::<Vec<f64>>(&late).await)
    }

    /// Frees what it took.
    pub(crate) async fn remove(self) {
        self.world.remove().await;
    }
}

/// The statement that writes `rows` rows; `due` may speak of `n`, which counts from 1.
pub(crate) fn rows_due(due: &str, rows: u32) -> String {
    format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT 'message', {due}, '{}' FROM generate_series(1, {rows}) AS n",
        payload()
    )
}

/// What every row says: a body of 400 bytes.
pub(crate) fn payload() -> String {
    format!(r#"{{"routing_key": "{QUEUE}", "body": "{}"}}"#, "x".repeat(BODY_BYTES))
}

/// The rate at which `number` went in `time`.
pub(crate) fn per_second(number: u32, time: time::Duration) -> f64 {
    f64::from(number) / time.as_seconds_f64()
}
