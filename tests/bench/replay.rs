//! Measures the time and memory of a pass over 100,000 dead letters, and the lateness of rows that fall due meanwhile.

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

const DEAD_LETTERS: u32 = 100_000;
const BODY_BYTES: usize = 1_024;
/// The number of dead letters that a pass handles at once.
const WINDOW: u32 = 100;
/// The number of rows that fall due during the measurement of lateness, one every 10 ms.
const ROWS: u32 = 1_000;
/// Longer than a pass takes.
const STEP_TIMEOUT: Duration = Duration::from_mins(10);

pub(crate) async fn replay(bench: &Bench) -> Vec<Figure> {
    let (letters, rounds) = (bench.rows(DEAD_LETTERS), bench.rounds());
    let (mut rates, mut limits, mut most, mut before) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut during, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let world = World::with_plugins(&["message"]).await;
        let channel = world.broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        for queue in ["back", "rows", "limit"] {
            let durable = QueueDeclareOptions::durable();
            channel.queue_declare(queue.into(), durable, FieldTable::default()).await.expect("a queue");
        }
        let launch = world.launch().with("TIDINGS_REPLAY_INTERVAL_MS", 86_400_000);
        let daemon = launch.start_ready().await;
        let (options, none) = (QueueBindOptions::default(), FieldTable::default());
        channel.queue_bind("rows".into(), "tidings".into(), "a".into(), options, none).await.expect("a binding");
        without.push(measure_lateness(&world).await);
        assert!(daemon.stop().await.success());
        world.sql("TRUNCATE tidings.deliveries, tidings.passes").await;

        publish_dead_letters(&channel, "limit", letters).await;
        publish_dead_letters(&channel, "tidings.dead", letters).await;
        limits.push(get_and_publish(&channel, letters).await);

        let begun = Instant::now();
        let daemon = launch.start_ready().await;
        before.push(resident_mib(daemon.pid()));
        let pass = async {
            let took_back = async || daemon.log().contains("took back dead letters").then_some(());
            eventually_within(STEP_TIMEOUT, "the pass", took_back).await;
            f64::from(letters) / begun.elapsed().as_secs_f64()
        };
        let (rate, times) = tokio::join!(pass, measure_lateness(&world));
        rates.push(rate);
        during.push(times);
        most.push(peak_mib(daemon.pid()));
        assert!(daemon.stop().await.success());
        world.remove().await;
    }
    let percentiles =
        |times: &[Times], percent| times.iter().map(|times| times.percentile(percent)).collect::<Vec<f64>>();
    vec![
        Figure::new("dead letters replayed", "/s", rates).beside("raw get, publish and confirm", limits),
        Figure::new("a row every 10 ms meanwhile, p50", "ms", percentiles(&during, 50))
            .beside("without a pass", percentiles(&without, 50)),
        Figure::new("a row every 10 ms meanwhile, p99", "ms", percentiles(&during, 99))
            .beside("without a pass", percentiles(&without, 99)),
        Figure::new("resident memory, most", "MiB", most).beside("at the start", before),
    ]
}

/// Writes rows that fall due one after another, waits until all are delivered, and returns their lateness.
async fn measure_lateness(world: &World) -> Times {
    let insert = format!(
        r#"INSERT INTO tidings.schedules (kind, due_at, payload)
           SELECT 'message', now() + interval '1 second' + n * interval '10 milliseconds', '{{"routing_key":"a","body":1}}'
           FROM generate_series(1, {ROWS}) AS n"#
    );
    world.sql(&insert).await;
    let finished = format!("SELECT count(*) = {ROWS} FROM tidings.deliveries");
    let finished = async || world.value::<bool>(&finished).await.then_some(());
    eventually_within(STEP_TIMEOUT, "the last row", finished).await;
    let late = "SELECT array_agg((extract(epoch FROM finished_at - due_at) * 1000)::float8) FROM tidings.deliveries";
    Times::new(world.value::<Vec<f64>>(late).await)
}

/// Publishes dead letters of the queue `back` into `queue`.
async fn publish_dead_letters(channel: &Channel, queue: &str, letters: u32) {
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

/// Measures the limit: the same client library gets the same dead letters one by one, publishes them in windows, and
/// acknowledges them.
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
