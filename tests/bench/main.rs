//! `cargo measure`: how fast and how punctual the daemon is, each figure beside its limit in the same run. Shared machines
//! are noisy: every figure is the median of several rounds, and the ratio says more than the number. `cargo measure --
//! queue`, `-- replay` and `-- plugins` measure one part.

mod plugins;
mod replay;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use harness::world::World;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation};
use nix::sys::signal::Signal;
use sqlx::Row as _;

/// Rows of the lateness measurement.
const SINGLE_ROWS: usize = 200;
/// Rows of the drain.
const DUE_ROWS: usize = 20_000;
/// Rounds of the drain.
const ROUNDS: usize = 3;
/// Messages in flight on one channel, as many as the daemon has.
const WINDOW: usize = 500;
/// Channels, as many as the daemon has.
const CHANNELS: usize = 4;
/// The body of every message.
const BODY_BYTES: usize = 400;

#[tokio::main]
async fn main() {
    let world = World::with(&["message"]).await;
    let postgres: String = world.value("SHOW server_version").await;
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!("PostgreSQL {postgres}, {cores} cores, persistent messages with bodies of {BODY_BYTES} bytes\n");

    let only = std::env::args().nth(1);
    let wanted = |what: &str| only.as_deref().is_none_or(|only| only == what);
    if wanted("queue") {
        due_now().await;
        for queue_type in ["classic", "quorum"] {
            drain(queue_type).await;
        }
        idle().await;
    }
    if wanted("replay") {
        replay::replay().await;
    }
    if wanted("plugins") {
        plugins::plugins().await;
    }
}

/// One row at a time: from the return of its commit to the consumer.
async fn due_now() {
    let world = World::with(&["message"]).await;
    let mut inbox = world.inbox(&["#"]).await;
    let _daemon = world.daemon().await;
    let (mut received_after, mut confirmed_after) = (Vec::new(), Vec::new());
    for round in 0..SINGLE_ROWS + 20 {
        world.sql(r#"SELECT tidings.schedule('message', clock_timestamp(), '{"routing_key":"a","body":1}')"#).await;
        let committed = Instant::now();
        let received = inbox.next_unacknowledged().await;
        // The first rounds warm up connections and plans.
        if round >= 20 {
            received_after.push(committed.elapsed());
        }
        received.delivery.ack(lapin::options::BasicAckOptions::default()).await.expect("acknowledged");
    }
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
    let lateness = "SELECT array_agg((extract(epoch FROM finished_at - due_at) * 1000)::float8) FROM
                    (SELECT * FROM tidings.deliveries ORDER BY finished_at DESC LIMIT 200) AS last";
    for ms in world.value::<Vec<f64>>(lateness).await {
        confirmed_after.push(Duration::from_secs_f64(ms / 1000.0));
    }
    for (what, mut times) in
        [("insert committed to message received", received_after), ("lateness (due to confirm)", confirmed_after)]
    {
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1000.0;
        println!("{what:<40} p50 {:>6.2} ms   p99 {:>6.2} ms   ({} rows)", at(50), at(99), times.len());
    }
}

/// Many rows due at once: rows per second, beside what the same client reaches with nothing but publishing.
async fn drain(queue_type: &str) {
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let world = World::with(&["message"]).await;
        let daemon = world.daemon().await;
        let channel = world.broker.channel().await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
        channel.queue_declare("q".into(), QueueDeclareOptions::durable(), arguments).await.expect("a queue");
        let bound = channel.queue_bind(
            "q".into(),
            "tidings".into(),
            "a".into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        );
        bound.await.expect("a binding");

        limits.push(publish_only(&world).await);

        let mut transaction = world.db.begin().await.expect("a transaction");
        let insert = format!(
            "INSERT INTO tidings.schedules (kind, due_at, payload)
             SELECT 'message', now(), jsonb_build_object('routing_key', 'a', 'body', repeat('x', {BODY_BYTES}))
             FROM generate_series(1, {DUE_ROWS})"
        );
        sqlx::query(sqlx::AssertSqlSafe(insert)).execute(&mut *transaction).await.expect("inserted");
        // From the moment before the commit, which is when the daemon hears of them.
        let begun = sqlx::query("SELECT clock_timestamp()").fetch_one(&mut *transaction).await.expect("the time");
        let begun: time::OffsetDateTime = begun.get(0);
        transaction.commit().await.expect("committed");
        world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
        let ended: time::OffsetDateTime = world.value("SELECT max(finished_at) FROM tidings.deliveries").await;
        let rows: i64 = world.value("SELECT count(*) FROM tidings.deliveries").await;
        assert_eq!(rows, i64::try_from(DUE_ROWS).expect("few"), "every row was delivered once");
        rates.push(per_second((ended - begun).as_seconds_f64()));
        assert!(daemon.stop().await.success());
    }
    let (rate, limit) = (median(rates), median(limits));
    println!(
        "{:<40} {rate:>8.0} rows/s   publish and confirm alone {limit:>8.0}/s   {:>3.0} %   (medians of {ROUNDS})",
        format!("{DUE_ROWS} rows due, {queue_type} queue"),
        rate / limit * 100.0
    );
}

/// The raw rate: the same client, exchange, queue, body and headers, and nothing else.
async fn publish_only(world: &World) -> f64 {
    let mut channels = Vec::new();
    for _ in 0..CHANNELS {
        let channel = world.broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        channels.push(channel);
    }
    let begun = Instant::now();
    join_all(channels.iter().map(|channel| async {
        for _ in 0..DUE_ROWS / CHANNELS / WINDOW {
            publish_window(channel).await;
        }
    }))
    .await;
    per_second(begun.elapsed().as_secs_f64())
}

async fn publish_window(channel: &Channel) {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let mut headers = FieldTable::default();
    for name in ["tidings-kind", "tidings-plugin", "tidings-exchange", "tidings-routing-key"] {
        headers.insert(name.into(), AMQPValue::LongString("message@0.1.0".into()));
    }
    for name in ["tidings-due-ms", "tidings-attempt", "tidings-replay"] {
        headers.insert(name.into(), AMQPValue::LongLongInt(1_795_291_200_000));
    }
    let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
    let body = [b'x'; BODY_BYTES];
    let publishes = (0..WINDOW).map(|number| {
        let properties = properties.clone().with_message_id(format!("{number:036}").into());
        channel.basic_publish("tidings".into(), "a".into(), options, &body, properties)
    });
    let published = join_all(publishes).await.into_iter().map(|confirm| confirm.expect("written"));
    for confirmation in join_all(published).await {
        assert!(matches!(confirmation, Ok(Confirmation::Ack(None))), "{confirmation:?}");
    }
}

/// Nothing due: how many transactions the daemon makes, and how long it takes to stop.
async fn idle() {
    const IDLE: Duration = Duration::from_mins(1);
    let world = World::with(&["message"]).await;
    let mut daemon = world.launch().ready().await;
    world.sql("SELECT tidings.schedule('message', now() + interval '1 day')").await;
    // Sessions hand in their counts when they have been idle for up to ten seconds: those of the start must be in.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let transactions = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
    let before: i64 = world.value(transactions).await;
    tokio::time::sleep(IDLE).await;
    let after: i64 = world.value(transactions).await;
    println!(
        "{:<40} {:>8} transactions in {} s, our own question among them",
        "idle, a row due tomorrow",
        after - before,
        IDLE.as_secs()
    );

    let asked = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.ended().await.success());
    println!("{:<40} {:>8.0} ms", "SIGTERM to exit when idle", asked.elapsed().as_secs_f64() * 1000.0);
}

/// The rate at which all rows went in `seconds`.
fn per_second(seconds: f64) -> f64 {
    f64::from(u32::try_from(DUE_ROWS).expect("few")) / seconds
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
