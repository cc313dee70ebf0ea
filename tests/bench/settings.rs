//! Measures what is saved by the settings that do without something: the history, and waiting for the disk.

use harness::daemon::Launch;

use crate::Bench;
use crate::load::{Stage, WARM, per_second};
use crate::probe::ServerPids;
use crate::report::Figure;

/// The number of rows in a drain.
const ROWS: u32 = 100_000;
/// The settings. The first is the default.
const SETTINGS: [(&str, &str); 4] = [
    ("TIDINGS_HISTORY", "all"),
    ("TIDINGS_HISTORY", "undelivered"),
    ("TIDINGS_HISTORY_DAYS", "0"),
    ("TIDINGS_SYNCHRONOUS_COMMIT", "off"),
];

/// Delivers due rows with each of the settings in turn. Without a history only the queues tell when all are delivered, so this
/// counts the time until the last message is in the queue of RabbitMQ, in steps of 50 ms.
pub(crate) async fn settings(bench: &Bench) -> Vec<Figure> {
    let (stage, rows) = (Stage::with_plugins(&["message"]).await, bench.rows(ROWS));
    let servers = ServerPids::of(&stage.world).await;
    let (mut rates, mut costs) = (SETTINGS.map(|_| Vec::new()), SETTINGS.map(|_| Vec::new()));
    for _ in 0..bench.rounds() {
        for (at, (name, value)) in SETTINGS.into_iter().enumerate() {
            let daemon = start_warm(&stage, &stage.world.launch().with(name, value)).await;
            let before = servers.cpu_seconds()[0];
            let begun = stage.write_due(rows).await;
            stage.wait_until_queued(rows).await;
            rates[at].push(per_second(rows, time::OffsetDateTime::now_utc() - begun));
            wait_until_empty(&stage).await;
            costs[at].push((servers.cpu_seconds()[0] - before) * 1e6 / f64::from(rows));
            stage.tidy().await;
            assert!(daemon.stop().await.success());
        }
    }
    stage.remove().await;
    let (default_rates, default_costs) = (rates[0].clone(), costs[0].clone());
    let figures = SETTINGS.into_iter().zip(rates.into_iter().zip(costs)).skip(1);
    figures
        .flat_map(|((name, value), (rates, costs))| {
            let name = format!("{name}={value}");
            [
                Figure::new(&*name, "rows/s", rates).beside("by default", default_rates.clone()),
                Figure::new(format!("{name}, PostgreSQL"), "µs/row", costs).beside("by default", default_costs.clone()),
            ]
        })
        .collect()
}

/// Starts a daemon and warms it up, as [`Stage::start_warm`] does, without relying on the history.
async fn start_warm(stage: &Stage, launch: &Launch) -> harness::daemon::Daemon {
    let daemon = launch.start_ready().await;
    stage.write_due(WARM).await;
    stage.wait_until_queued(WARM).await;
    wait_until_empty(stage).await;
    stage.tidy().await;
    daemon
}

/// Waits until no row is left to be finished.
async fn wait_until_empty(stage: &Stage) {
    stage.world.wait_until("SELECT NOT EXISTS (SELECT FROM tidings.schedules WHERE slot_at <= now())").await;
}
