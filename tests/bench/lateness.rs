//! Measures lateness: at a steady rate while many rows are pending, during a spike, and from the commit of a row that
//! is due at once.

use std::time::Duration;

use time::OffsetDateTime;

use crate::load::{Stage, insert_due_rows_sql, insert_reminders_sql, insert_trickle_sql, per_second, schedule_now_sql};
use crate::raw::{self, Receiver, millis, now_us};
use crate::report::{Figure, Times};
use crate::{Bench, MILLION};

/// For how many seconds rows fall due.
const SECONDS: u32 = 60;
/// For how many seconds raw messages are published at the same rate.
const RAW_SECONDS: u32 = 10;
/// The time before the first row is due, in which all rows are written.
const LEAD: &str = "interval '6 s'";
/// The number of rows in a spike.
const SPIKE: u32 = 50_000;
/// How many rows of other kinds fall due in a second during the spike.
pub(crate) const TRICKLE: u32 = 100;
/// How many rows of another kind are due in the same millisecond as the spike, and were written after it.
const SAME_MOMENT: u32 = 100;
/// How many single rows are written in a second: so few that the daemon is idle between two of them.
const SINGLES: u32 = 40;
const SECONDS_OF_SINGLES: u32 = 8;

/// 100 rows a second, 200,000 pending.
pub(crate) async fn at_100_rows_per_second(bench: &Bench) -> Vec<Figure> {
    measure_steady(bench, 100, 200_000, (3.0, 8.0)).await
}

/// 1,000 rows a second, a million pending.
pub(crate) async fn at_1000_rows_per_second(bench: &Bench) -> Vec<Figure> {
    measure_steady(bench, 1_000, MILLION, (5.0, 20.0)).await
}

/// 1,000 rows a second, ten million pending.
pub(crate) async fn with_ten_million_pending(bench: &Bench) -> Vec<Figure> {
    measure_steady(bench, 1_000, 10 * MILLION, (5.0, 20.0)).await
}

async fn measure_steady(bench: &Bench, rate: u32, pending: u32, (p50, p99): (f64, f64)) -> Vec<Figure> {
    let stage = bench.take_pending_stage(pending).await;
    let daemon = stage.start_daemon().await;
    let (mut confirmed, mut received, mut raw) = (Vec::new(), Vec::new(), Vec::new());
    let seconds = bench.seconds(SECONDS);
    let rows = rate * seconds;
    for _ in 0..bench.rounds() {
        let mut receiver = Receiver::start(&stage).await;
        raw.push(raw::measure_one_way(&stage, &mut receiver, rate, bench.seconds(RAW_SECONDS)).await);
        let first: OffsetDateTime =
            stage.world.value(&format!("SELECT date_trunc('milliseconds', clock_timestamp()) + {LEAD}")).await;
        let due = format!("'{first}'::timestamptz + n * interval '{} ms'", 1000 / rate);
        stage.world.sql(&insert_due_rows_sql(&due, rows)).await;
        assert!(stage.world.now().await < first, "it took too long to write the rows, the first are late by that");
        tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        received.push(receiver.take(rows).await);
        stage.wait_until_finished(rows).await;
        confirmed.push(stage.lateness("outcome = 'delivered'").await);
        receiver.stop().await;
        stage.tidy().await;
    }
    assert!(daemon.stop().await.success());
    bench.keep_stage(stage);
    let percentiles =
        |times: &[Times], percent| times.iter().map(|times| times.percentile(percent)).collect::<Vec<f64>>();
    let limit = |percent| raw.iter().map(|raw| raw.to_confirm.percentile(percent)).collect::<Vec<f64>>();
    let one_way = |percent| raw.iter().map(|raw| raw.to_consumer.percentile(percent)).collect::<Vec<f64>>();
    let early = confirmed
        .iter()
        .zip(&received)
        .map(|(confirmed, received)| confirmed.count_negative() + received.count_negative());
    vec![
        Figure::new("due to confirm, p50", "ms", percentiles(&confirmed, 50))
            .beside("raw publish to confirm", limit(50))
            .under(p50),
        Figure::new("due to confirm, p99", "ms", percentiles(&confirmed, 99))
            .beside("raw publish to confirm", limit(99))
            .under(p99),
        Figure::new("due to confirm, most", "ms", percentiles(&confirmed, 100))
            .beside("raw publish to confirm", limit(100)),
        Figure::new("due to consumer, p50", "ms", percentiles(&received, 50))
            .beside("raw publish to consumer", one_way(50)),
        Figure::new("due to consumer, p99", "ms", percentiles(&received, 99))
            .beside("raw publish to consumer", one_way(99)),
        Figure::new("rows that came early", "rows", early).at_most(0.0),
    ]
}

/// Many rows due in the same millisecond, while rows of other kinds fall due one by one.
pub(crate) async fn spike(bench: &Bench) -> Vec<Figure> {
    let stage = bench.take_pending_stage(MILLION).await;
    let daemon = stage.start_daemon().await;
    let rows = bench.rows(SPIKE);
    let (mut rates, mut drains, mut trickles, mut same) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let drain = stage.drain(rows).await;
        stage.tidy().await;

        let due: OffsetDateTime =
            stage.world.value(&format!("SELECT date_trunc('milliseconds', clock_timestamp()) + {LEAD}")).await;
        // From two seconds before the spike until three seconds after its expected end.
        let trickle = TRICKLE * 5 + expected_seconds(rows, drain) * TRICKLE;
        stage.world.sql(&insert_due_rows_sql(&format!("'{due}'::timestamptz"), rows)).await;
        stage.world.sql(&insert_trickle_sql(due, trickle)).await;
        let same_moment = format!("'{due}'::timestamptz");
        stage.world.sql(&insert_reminders_sql(&same_moment, SAME_MOMENT)).await;
        assert!(stage.world.now().await < due - Duration::from_secs(2), "it took too long to write the rows");
        stage.wait_until_queued(rows + trickle + SAME_MOMENT).await;
        stage.wait_until_finished(rows + trickle + SAME_MOMENT).await;
        let ended: OffsetDateTime =
            stage.world.value("SELECT max(finished_at) FROM tidings.deliveries WHERE kind = 'message'").await;
        drains.push(drain);
        rates.push(per_second(rows, ended - due));
        let beside = format!("kind <> 'message' AND due_at > '{due}' AND due_at <= '{ended}'");
        trickles.push(stage.lateness(&beside).await);
        same.push(stage.lateness(&format!("kind <> 'message' AND due_at = '{due}'")).await);
        stage.tidy().await;
    }
    assert!(daemon.stop().await.success());
    bench.keep_stage(stage);
    vec![
        Figure::new("the spike, due to confirmed", "rows/s", rates)
            .beside("rows that are already due", drains)
            .at_least_share(0.9),
        Figure::new("other kinds meanwhile, p50", "ms", trickles.iter().map(|times| times.percentile(50))),
        Figure::new("other kinds meanwhile, p99", "ms", trickles.iter().map(|times| times.percentile(99))).under(250.0),
        Figure::new(
            format!("{SAME_MOMENT} rows of another kind in the same millisecond, the last"),
            "ms",
            same.iter().map(|times| times.percentile(100)),
        )
        .under(250.0),
    ]
}

/// How long `rows` take at `rate` rows a second, in seconds, rounded up.
fn expected_seconds(rows: u32, rate: f64) -> u32 {
    let whole = (1..600).find(|seconds| f64::from(*seconds) * rate >= f64::from(rows));
    whole.expect("it takes less than ten minutes")
}

/// Single rows that are due when they are written.
pub(crate) async fn due_now(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    let daemon = stage.start_daemon().await;
    let insert = schedule_now_sql();
    let seconds = bench.seconds(SECONDS_OF_SINGLES);
    let (mut received, mut raw) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let mut receiver = Receiver::start(&stage).await;
        raw.push(raw::measure_one_way(&stage, &mut receiver, SINGLES, seconds).await.to_consumer);
        let mut pace = tokio::time::interval(Duration::from_secs(1) / SINGLES);
        let mut times = Vec::new();
        for _ in 0..SINGLES * seconds {
            pace.tick().await;
            stage.world.sql(&insert).await;
            let committed_us = now_us();
            times.push(millis(receiver.next().await.at_us - committed_us));
        }
        received.push(Times::new(times));
        receiver.stop().await;
    }
    assert!(daemon.stop().await.success());
    stage.remove().await;
    let figure = |percent, label: &str| {
        Figure::new(label, "ms", received.iter().map(|times| times.percentile(percent)))
            .beside("raw publish to consumer", raw.iter().map(|times| times.percentile(percent)))
    };
    vec![
        figure(50, "committed to received, p50").under(2.0),
        figure(99, "committed to received, p99").under(5.0),
        figure(100, "committed to received, most"),
    ]
}
