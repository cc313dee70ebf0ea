//! Measures how late occurrences of recurrences are, beside ordinary rows that are due at the same time.

use std::time::Duration;

use time::OffsetDateTime;

use crate::Bench;
use crate::load::{Stage, insert_due_rows_sql};
use crate::report::{Figure, Times};

/// How many recurrences come each second, and how many ordinary rows are due in a second.
const RATE: u32 = 500;
/// For how many seconds.
const SECONDS: u32 = 30;

/// 500 recurrences that come each second, and 500 ordinary rows a second.
pub(crate) async fn lateness(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    let daemon = stage.start_daemon().await;
    let seconds = bench.seconds(SECONDS);
    let rows = RATE * seconds;
    let (mut recurring, mut ordinary) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        // Occurrences are made 20 s before they are due, and half of the rows of a second are due at once as they are.
        let first: OffsetDateTime =
            stage.world.value("SELECT date_trunc('second', clock_timestamp()) + interval '25 s'").await;
        stage
            .world
            .sql(&format!(
                r#"SELECT tidings.repeat(
                        'r' || n, 'message', 'every 1 second', payload => '{{"routing_key": "bench", "body": "x"}}',
                        starts_at => '{first}'::timestamptz, max_count => {seconds}, spread => '1 s'
                    )
                    FROM generate_series(1, {RATE}) AS n"#
            ))
            .await;
        let due = format!("'{first}'::timestamptz + n * interval '{} ms'", 1000 / RATE);
        stage.world.sql(&insert_due_rows_sql(&due, rows)).await;
        assert!(stage.world.now().await < first - Duration::from_secs(5), "it took too long to write the rows");
        tokio::time::sleep(Duration::from_secs((25 + seconds).into())).await;
        stage.wait_until_finished(2 * rows).await;
        recurring.push(stage.lateness("key LIKE 'r%/%'").await);
        ordinary.push(stage.lateness("key IS NULL").await);
        stage.world.sql("SELECT tidings.stop_repeating(name) FROM tidings.recurrences").await;
        stage.tidy().await;
    }
    assert!(daemon.stop().await.success());
    bench.keep_stage(stage);
    let percentiles =
        |times: &[Times], percent| times.iter().map(|times| times.percentile(percent)).collect::<Vec<f64>>();
    let early = recurring.iter().map(Times::count_negative);
    vec![
        Figure::new("occurrences, due to confirm, p50", "ms", percentiles(&recurring, 50))
            .beside("ordinary rows", percentiles(&ordinary, 50))
            .under(5.0),
        Figure::new("occurrences, due to confirm, p99", "ms", percentiles(&recurring, 99))
            .beside("ordinary rows", percentiles(&ordinary, 99))
            .under(20.0),
        Figure::new("occurrences that came early", "rows", early).at_most(0.0),
    ]
}
