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

use crate::Bench;
use crate::probe::{peak_mib, resident_mib};
use crate::report::{Figure, Times};

const LETTERS: u32 = 100_000;
const BODY_BYTES: usize = 1_024;
/// As many as a pass has on their way.
const WINDOW: u32 = 100;
/// Rows that fall due during the measurement of lateness, one every 10 ms.
const ROWS: u32 = 1_000;
/// Longer than a pass takes.
const PATIENCE: Duration = Duration::from_mins(10);

pub(crate) async fn replay(bench: &Bench) -> Vec<Figure> {
    let (letters, rounds) = (bench.rows(LETTERS), bench.rounds());
    let (mut rates, mut limits, mut most, mut before) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut during, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let world = World::with(&["message"]).await;
        let channel = world.broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        for queue in ["back", "rows", "limit"] {
            let durable = QueueDeclareOptions::durable();
            channel.queue_declare(queue.into(), durable, FieldTable::default()).await.expect("a queue");
        }
        let launch = world.launch().with("TIDINGS_REPLAY_INTERVAL_MS", 86_400_000);
        let daemon = launch.ready().await;
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind("rows".into(), "tidings".into(), "a".into(), options, none).await.expect("a binding");
        without.push(rows_due(&world).await);
        assert!(daemon.stop().await.success());
        world.sql("TRUNCATE tidings.deliveries, tidings.passes").await;

        fill(&channel, "limit", letters).await;
        fill(&channel, "tidings.dead", letters).await;
        limits.push(get_and_publish(&channel, letters).await);

        let begun = Instant::now();
        let daemon = launch.ready().await;
        before.push(resident_mib(daemon.pid()));
        let pass = async {
            let took_back = async || daemon.log().contains("took back dead letters").then_some(());
            eventually_within(PATIENCE, "the pass", took_back).await;
            f64::from(letters) / begun.elapsed().as_secs_f64()
        };
        let (rate, times) = tokio::join!(pass, rows_due(&world));
        rates.push(rate);
        during.push(times);
        most.push(peak_mib(daemon.pid()));
        assert!(daemon.stop().await.success());
        world.remove().await;
    }
    let of = |times: &[Times], percent| times.iter().map(|times| times.at(percent)).collect::<Vec<f64>>();
    vec![
        Figure::new("dead letters replayed", "/s", rates).beside("raw get, publish and confirm", limits),
        Figure::new("a row every 10 ms meanwhile, p50", "ms", of(&during, 50))
            .beside("without a pass", of(&without, 50)),
        Figure::new("a row every 10 ms meanwhile, p99", "ms", of(&during, 99))
            .beside("without a pass", of(&without, 99)),
        Figure::new("resident memory, most", "MiB", most).beside("at the start", before),
    ]
}

/// Rows that fall due one after another, until all are delivered: their lateness.
async fn rows_due(world: &World) -> Times {
    let insert = format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'message', now() + interval '1 second' + n * interval '10 milliseconds', '{{"routing_key":"a","body":1}}'
           FROM generate_series(1, {ROWS}) AS n"#
    );
    world.sql(&insert).await;
    let finished = format!("SELECT count(*) = {ROWS} FROM tidings.deliveries");
    let finished = async || world.value::<bool>(&finished).await.then_some(());
    eventually_within(PATIENCE, "the last row", finished).await;
    let late = "SELECT array_agg((extract(epoch FROM finished_at - due_at) * 1000)::float8) FROM tidings.deliveries";
    Times::new(world.value::<Vec<f64>>(late).await)
}

/// Dead letters of the queue `back`.
async fn fill(channel: &Channel, queue: &str, letters: u32) {
    let mut death = FieldTable::default();
    death.insert("queue".into(), AMQPValue::LongString("back".into()));
    death.insert("reason".into(), AMQPValue::LongString("rejected".into()));
    let mut headers = FieldTable::default();
    headers.insert("x-death".into(), AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into()));
    for _ in 0..letters / WINDOW {
        publish(channel, queue, &vec![vec![b'x'; BODY_BYTES]; WINDOW as usize], &headers).await;
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
async fn get_and_publish(channel: &Channel, letters: u32) -> f64 {
    let begun = Instant::now();
    for _ in 0..letters / WINDOW {
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
    f64::from(letters) / begun.elapsed().as_secs_f64()
}
