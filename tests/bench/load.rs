//! The stage on which the scenarios run: a world with one quorum queue, pending rows, due rows, and the lateness of
//! delivered rows. It does not decide what a figure means.

use std::time::Duration;

use harness::daemon::{Daemon, Launch};
use harness::eventually_within;
use harness::world::World;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};
use sqlx::{AssertSqlSafe, Row as _};
use time::OffsetDateTime;

use crate::lateness::TRICKLE;
use crate::report::Times;

/// The size of every message's body.
pub(crate) const BODY_BYTES: usize = 400;
/// The queue of all messages, and the routing key of most of them.
pub(crate) const QUEUE: &str = "measured";
/// Longer than any successful step takes.
const STEP_TIMEOUT: Duration = Duration::from_mins(15);
/// The number of rows after which connections, plans and code are warm.
pub(crate) const WARM: u32 = 2_000;
/// A part of the payload of games.
const GAME: &str = r#""game_id":"6f0f5e2e-6a2b-4b0e-9d0b-3a4f0a6b1c2d""#;
/// How many pending rows one statement writes.
const CHUNK: u32 = 1_000_000;

/// A world with a queue.
#[derive(Debug)]
pub(crate) struct Stage {
    /// The database, the virtual host and the plugins.
    pub(crate) world: World,
    channel: Channel,
    /// The number of pending rows, which are not due during the measurements.
    pending: u32,
}

impl Stage {
    /// Makes a stage with these plugins, without a daemon and without rows.
    pub(crate) async fn with_plugins(plugins: &[&str]) -> Self {
        let world = World::with_plugins(plugins).await;
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

    /// Starts a daemon with the default settings, and warms it up.
    pub(crate) async fn start_daemon(&self) -> Daemon {
        self.start_warm(&self.world.launch()).await
    }

    /// Starts a daemon with these settings, and warms it up.
    pub(crate) async fn start_warm(&self, launch: &Launch) -> Daemon {
        let daemon = launch.start_ready().await;
        self.drain(WARM).await;
        self.tidy().await;
        daemon
    }

    /// Writes pending rows, due one every three seconds from tomorrow on, until there are `rows` of them.
    pub(crate) async fn write_pending(&mut self, rows: u32) {
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

    /// Empties the queue and the history, and lets PostgreSQL vacuum and make its checkpoint now rather than during a
    /// measurement.
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

    /// The number of messages in the queue.
    pub(crate) async fn count_queued(&self) -> u32 {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let declared = self.channel.queue_declare(QUEUE.into(), options, FieldTable::default()).await;
        declared.expect("the queue").message_count()
    }

    /// Writes due rows in one transaction, and returns the database's time right before the commit.
    pub(crate) async fn write_due(&self, rows: u32) -> OffsetDateTime {
        self.write(insert_due_rows_sql("now()", rows)).await
    }

    /// Runs a statement in a transaction of its own, and returns the database's time right before the commit.
    pub(crate) async fn write(&self, insert: String) -> OffsetDateTime {
        let mut transaction = self.world.db.begin().await.expect("a transaction");
        sqlx::query(AssertSqlSafe(insert)).execute(&mut *transaction).await.expect("inserted");
        let now = sqlx::query("SELECT clock_timestamp()").fetch_one(&mut *transaction).await.expect("the time").get(0);
        transaction.commit().await.expect("committed");
        now
    }

    /// Writes due rows and waits until they are delivered. Returns rows per second from the commit to the last confirm.
    pub(crate) async fn drain(&self, rows: u32) -> f64 {
        self.write_and_drain(rows, insert_due_rows_sql("now()", rows)).await
    }

    /// [`Stage::drain`] with bodies of about `body_bytes` bytes that hardly compress.
    pub(crate) async fn drain_bodies(&self, rows: u32, body_bytes: usize) -> f64 {
        let insert = format!(
            "WITH said AS MATERIALIZED (
                 SELECT jsonb_build_object('routing_key', '{QUEUE}', 'body', left(string_agg(md5(n::text), ''), {body_bytes})) AS payload
                 FROM generate_series(0, {body_bytes} / 32) AS n
             )
             INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), payload FROM said, generate_series(1, {rows})"
        );
        self.write_and_drain(rows, insert).await
    }

    async fn write_and_drain(&self, rows: u32, insert: String) -> f64 {
        let begun = self.write(insert).await;
        self.wait_until_queued(rows).await;
        self.wait_until_finished(rows).await;
        per_second(rows, self.last_confirm().await - begun)
    }

    /// Waits until `messages` messages are in the queue, which must have no consumer.
    pub(crate) async fn wait_until_queued(&self, messages: u32) {
        let deadline = tokio::time::Instant::now() + STEP_TIMEOUT;
        // Counts messages in RabbitMQ, every 50 ms: to count rows, PostgreSQL would read every deleted row.
        let mut pace = tokio::time::interval(Duration::from_millis(50));
        while self.count_queued().await < messages {
            assert!(tokio::time::Instant::now() < deadline, "{messages} messages did not come");
            pace.tick().await;
        }
    }

    /// Waits until the history has `rows` delivered rows.
    pub(crate) async fn wait_until_finished(&self, rows: u32) {
        let all = format!("SELECT count(*) >= {rows} FROM tidings.deliveries WHERE outcome = 'delivered'");
        let finished = async || self.world.value::<bool>(&all).await.then_some(());
        eventually_within(STEP_TIMEOUT, "the last commit", finished).await;
    }

    /// The time of the last confirm, by the database clock.
    pub(crate) async fn last_confirm(&self) -> OffsetDateTime {
        self.world.value("SELECT max(finished_at) FROM tidings.deliveries").await
    }

    /// The times from due to confirm, by the database clock, of the deliveries that the SQL condition `which` selects.
    pub(crate) async fn lateness(&self, which: &str) -> Times {
        let late = format!(
            "SELECT coalesce(array_agg((extract(epoch FROM finished_at - due_at) * 1000)::float8), '{{}}')
             FROM tidings.deliveries WHERE {which}"
        );
        Times::new(self.world.value::<Vec<f64>>(&late).await)
    }

    /// Removes the database and the virtual host.
    pub(crate) async fn remove(self) {
        self.world.remove().await;
    }
}

/// The statement that writes `rows` rows, due at the SQL expression `due`, in which `n` counts from 1.
pub(crate) fn insert_due_rows_sql(due: &str, rows: u32) -> String {
    format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload)
         SELECT 'message', {due}, '{}' FROM generate_series(1, {rows}) AS n",
        payload()
    )
}

/// The statement that writes rows of two other kinds, 100 a second, from two seconds before `around` on.
pub(crate) fn insert_trickle_sql(around: OffsetDateTime, rows: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT CASE n % 2 WHEN 0 THEN 'game-status' ELSE 'game-reminder' END,
                  '{around}'::timestamptz - interval '2 s' + n * interval '{} ms',
                  CASE n % 2
                      WHEN 0 THEN '{{{GAME},"target_status":"OPEN","transition_time":"2030-01-01T00:00:00Z"}}'::jsonb
                      ELSE '{{{GAME},"title":"chess","starts_at":"2030-01-01T00:00:00Z","reminder_minutes":15}}'::jsonb
                  END
           FROM generate_series(1, {rows}) AS n"#,
        1000 / TRICKLE
    )
}

/// The statement that writes so many rows of the kind `game-reminder`, all due at the same time, an SQL expression.
pub(crate) fn insert_reminders_sql(due_at: &str, rows: u32) -> String {
    format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'game-reminder', {due_at}, '{{{GAME},"title":"chess","starts_at":"2030-01-01T00:00:00Z","reminder_minutes":15}}'
           FROM generate_series(1, {rows})"#
    )
}

/// The statement that schedules one row, due when it is written.
pub(crate) fn schedule_now_sql() -> String {
    format!("SELECT tidings.schedule('message', clock_timestamp(), '{}')", payload())
}

/// The payload of every row, with a body of 400 bytes.
pub(crate) fn payload() -> String {
    format!(r#"{{"routing_key": "{QUEUE}", "body": "{}"}}"#, "x".repeat(BODY_BYTES))
}

/// The rate of `number` things in `time`, in things per second.
pub(crate) fn per_second(number: u32, time: time::Duration) -> f64 {
    f64::from(number) / time.as_seconds_f64()
}
