//! What a pass over a hundred thousand dead letters takes, in time and memory, and what it costs the rows that fall due
//! meanwhile.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use harness::eventually_within;
use harness::world::World;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel};

use crate::plugins::{lateness, resident_kib};

const LETTERS: usize = 100_000;
const BODY_BYTES: usize = 1_024;
/// As many as a pass has on their way.
const WINDOW: usize = 100;
/// Rows that fall due during the measurement of lateness, one every 10 ms.
const ROWS: usize = 1_000;

pub(crate) async fn replay() {
    let world = World::with(&["message"]).await;
    let channel = world.broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    for queue in ["back", "rows", "limit"] {
        let durable = QueueDeclareOptions::durable();
        channel.queue_declare(queue.into(), durable, FieldTable::default()).await.expect("a queue");
    }
    let daemon = world.launch().with("TIDINGS_REPLAY_INTERVAL_MS", 86_400_000).ready().await;
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind("rows".into(), "tidings".into(), "a".into(), options, none).await.expect("a binding");

    rows_due(&world).await;
    let (p50, p99, most) = lateness(&world).await;
    println!("{:<40} p50 {p50:>6.1} ms   p99 {p99:>6.1} ms   most {most:>6.1} ms", "a row every 10 ms, no pass");
    assert!(daemon.stop().await.success());
    world.sql("TRUNCATE tidings.deliveries, tidings.passes").await;

    fill(&channel, "limit").await;
    fill(&channel, "tidings.dead").await;
    let limit = get_and_publish(&channel).await;

    let begun = Instant::now();
    let daemon = world.launch().with("TIDINGS_REPLAY_INTERVAL_MS", 86_400_000).ready().await;
    let before = resident_kib(daemon.pid());
    rows_due(&world).await;
    let during = !daemon.log().contains("took back");
    let took_back = async || daemon.log().contains("took back dead letters").then_some(());
    eventually_within(Duration::from_mins(10), "the pass", took_back).await;
    let rate = per_second(begun.elapsed());
    let (p50, p99, most) = lateness(&world).await;
    println!(
        "{:<40} p50 {p50:>6.1} ms   p99 {p99:>6.1} ms   most {most:>6.1} ms{}",
        "a row every 10 ms, during a pass",
        if during { "" } else { "   (the pass ended before)" }
    );
    println!(
        "{:<40} {rate:>8.0} letters/s   get, publish and confirm alone {limit:>8.0}/s   {:>3.0} %",
        format!("{LETTERS} dead letters replayed"),
        rate / limit * 100.0
    );
    let peak = peak_kib(daemon.pid());
    println!(
        "{:<40} {:>8} MiB at most, {} MiB at the start, for {} MiB of letters",
        "memory of the daemon meanwhile",
        peak / 1024,
        before / 1024,
        LETTERS * BODY_BYTES / 1024 / 1024
    );
}

/// Rows that fall due one after another, until all are delivered.
async fn rows_due(world: &World) {
    let insert = format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'message', now() + interval '1 second' + n * interval '10 milliseconds', '{{"routing_key":"a","body":1}}'
           FROM generate_series(1, {ROWS}) AS n"#
    );
    world.sql(&insert).await;
    world.until("SELECT NOT EXISTS (SELECT FROM tidings.schedules)").await;
}

/// Dead letters of the queue `back`, a hundred thousand.
async fn fill(channel: &Channel, queue: &str) {
    let mut death = FieldTable::default();
    death.insert("queue".into(), AMQPValue::LongString("back".into()));
    death.insert("reason".into(), AMQPValue::LongString("rejected".into()));
    let mut headers = FieldTable::default();
    headers.insert("x-death".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into()));
    for _ in 0..LETTERS / WINDOW {
        publish(channel, queue, &vec![vec![b'x'; BODY_BYTES]; WINDOW], &headers).await;
    }
}

async fn publish(channel: &Channel, queue: &str, bodies: &[Vec<u8>], headers: &FieldTable) {
    let options = BasicPublishOptions { mandatory: true, immediate: false };
    let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers.clone());
    let publishes =
        bodies.iter().map(|body| channel.basic_publish("".into(), queue.into(), options, body, properties.clone()));
    let published = join_all(publishes).await.into_iter().map(|confirm| confirm.expect("written"));
    for confirmation in join_all(published).await {
        assert!(confirmation.is_ok_and(|confirmation| confirmation.is_ack()));
    }
}

/// The limit: the same client fetches the same letters one by one, publishes them in windows, and acknowledges them.
async fn get_and_publish(channel: &Channel) -> f64 {
    let begun = Instant::now();
    for _ in 0..LETTERS / WINDOW {
        let mut bodies = Vec::new();
        let mut last = 0;
        for _ in 0..WINDOW {
            let letter = channel.basic_get("limit".into(), BasicGetOptions::default()).await.expect("an answer");
            let letter = letter.expect("a letter");
            last = letter.delivery.delivery_tag;
            bodies.push(letter.delivery.data);
        }
        publish(channel, "back", &bodies, &FieldTable::default()).await;
        channel.basic_ack(last, BasicAckOptions { multiple: true }).await.expect("acknowledged");
    }
    per_second(begun.elapsed())
}

fn per_second(time: Duration) -> f64 {
    f64::from(u32::try_from(LETTERS).expect("few")) / time.as_secs_f64()
}

fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it is running");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}
