//! Measures lateness during trouble elsewhere: a transaction that stays open for hours, and another daemon that freezes
//! and is killed.

use std::time::{Duration, Instant};

use harness::guests::well_behaved;
use harness::world::database_url;
use nix::sys::signal::Signal;
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::load::Stage;
use crate::report::{Figure, Times};
use crate::statements::count_statements;
use crate::{Bench, MILLION};

/// For how many seconds rows fall due for each million dead rows, so that more than one sweep happens.
const SECONDS_PER_MILLION: u32 = 24;
/// The least number of seconds for which rows fall due.
const SECONDS: u32 = 120;
/// The time between two rows.
const PACE: Duration = Duration::from_millis(20);
/// The payload of the rows, which are due at once.
const MESSAGE: &str = r#"{"routing_key": "measured", "body": 1}"#;
/// The time between two rows beside the daemon that freezes: so long that the measured daemon is idle in between.
const SPARSE: Duration = Duration::from_millis(50);
/// How long the other daemon is frozen.
const FROZEN: Duration = Duration::from_secs(8);
/// How long after the thaw rows fall due of a kind that no daemon then serves.
const ORPHANED: Duration = Duration::from_millis(800);
/// For how long rows are written after the other daemon was killed.
const AFTERWARDS: Duration = Duration::from_secs(3);
/// Selects the daemon's statements that look below the low-water mark.
const SWEEPS: &str = "query LIKE '%below AS MATERIALIZED%' AND query LIKE '%tidings.schedules%'";

/// Measures lateness while an open transaction keeps dead rows at the head of the queue, deleted before the daemon
/// started.
pub(crate) async fn held_xmin(bench: &Bench) -> Vec<Figure> {
    let mut figures = over_dead_rows(bench, 3 * MILLION, "3 million").await;
    if bench.big() {
        figures.extend(over_dead_rows(bench, 10 * MILLION, "10 million").await);
    }
    figures
}

async fn over_dead_rows(bench: &Bench, dead: u32, name: &str) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    count_statements(&stage.world).await;
    let url = database_url(stage.world.ports().0, &stage.world.name);
    let mut reader = PgConnection::connect(&url).await.expect("a connection");
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("begun");
    reader.execute("SELECT count(*) FROM tidings.passes").await.expect("a snapshot");
    let mut left = bench.rows(dead);
    while left > 0 {
        let rows = left.min(MILLION);
        // As if they had been delivered one after another, 1,000 a second, until two minutes ago.
        let insert = format!(
            "INSERT INTO tidings.schedules (kind, due_at, not_before, payload)
             SELECT 'message', at, at, '{MESSAGE}'
             FROM (SELECT now() - interval '2 min' - ({left} - n) * interval '1 ms' AS at FROM generate_series(1, {rows}) AS n) AS rows"
        );
        stage.world.sql(&insert).await;
        left -= rows;
    }
    stage.world.sql("DELETE FROM tidings.schedules").await;
    stage.world.sql("CHECKPOINT").await;
    let seconds = bench.seconds((dead / MILLION * SECONDS_PER_MILLION).max(SECONDS));
    let mut rounds: Vec<(Times, f64)> = Vec::new();
    for _ in 0..bench.rounds() {
        stage.world.sql("SELECT pg_stat_statements_reset()").await;
        let begun = Instant::now();
        let daemon = stage.world.launch().start_ready().await;
        let mut pace = tokio::time::interval(PACE);
        let mut rows = 0;
        while begun.elapsed() < Duration::from_secs(seconds.into()) {
            pace.tick().await;
            stage.world.sql(&format!("SELECT tidings.schedule('message', clock_timestamp(), '{MESSAGE}')")).await;
            rows += 1;
        }
        stage.wait_until_finished(rows).await;
        let swept: f64 = stage
            .world
            .value(&format!(
                "SELECT coalesce(sum(total_exec_time), 0)::float8 / 1000 FROM pg_stat_statements WHERE {SWEEPS}"
            ))
            .await;
        rounds.push((stage.lateness("true").await, 100.0 * swept / begun.elapsed().as_secs_f64()));
        assert!(daemon.stop().await.success());
        stage.world.sql("TRUNCATE tidings.deliveries").await;
        stage.purge().await;
    }
    reader.close().await.expect("ended");
    stage.remove().await;
    let late = |percent| rounds.iter().map(move |(times, _)| times.percentile(percent)).collect::<Vec<f64>>();
    vec![
        Figure::new(format!("due to confirm over {name} dead rows, p50"), "ms", late(50)),
        Figure::new(format!("due to confirm over {name} dead rows, p95"), "ms", late(95)),
        Figure::new(format!("due to confirm over {name} dead rows, p99"), "ms", late(99)).under(50.0),
        Figure::new(format!("due to confirm over {name} dead rows, most"), "ms", late(100)),
        Figure::new("a core for sweeps", "%", rounds.iter().map(|(_, share)| *share)).at_most(2.0),
    ]
}

/// Measures lateness on the left daemon, which serves the kinds S and L, while the right one, which serves S and R, is
/// frozen, thawed and killed.
pub(crate) async fn freeze(bench: &Bench) -> Vec<Figure> {
    let mut rounds = Vec::new();
    for _ in 0..bench.rounds() {
        rounds.push(measure_freeze().await);
    }
    let late = |percent| rounds.iter().map(move |times: &Times| times.percentile(percent)).collect::<Vec<f64>>();
    vec![
        Figure::new("others from the thaw on, p50", "ms", late(50)),
        Figure::new("others from the thaw on, p99", "ms", late(99)).under(50.0),
        Figure::new("others from the thaw on, most", "ms", late(100)),
    ]
}

async fn measure_freeze() -> Times {
    let stage = Stage::with_plugins(&[]).await;
    let world = &stage.world;
    let dir = world.plugin_dir.join("right");
    std::fs::create_dir(&dir).expect("made");
    let guest = |name: &str| well_behaved(name, &[name], name);
    world.put("s.wasm", &guest("s"));
    world.put("l.wasm", &guest("l"));
    for name in ["s", "r"] {
        std::fs::write(dir.join(format!("{name}.wasm")), guest(name)).expect("written");
    }
    let left = world.launch().start_ready().await;
    let state = world.state_dir().with_extension("right");
    let right = world
        .launch()
        .with("TIDINGS_PLUGIN_DIR", dir.display())
        .with("TIDINGS_STATE_DIR", state.display())
        .start_ready()
        .await;
    let mut written = 0;
    let (mut pace, mut step, mut since) = (tokio::time::interval(SPARSE), 0, Instant::now());
    let mut thawed = None;
    loop {
        pace.tick().await;
        // No rows are written while the right daemon is frozen, so that the left one looks ever less often for rows
        // that it cannot claim.
        if thawed.is_some() || step == 0 {
            let kind = if written % 2 == 0 { "s" } else { "l" };
            world.sql(&format!("SELECT tidings.schedule('{kind}', clock_timestamp())")).await;
            written += 1;
        }
        match step {
            0 if since.elapsed() > Duration::from_secs(1) => {
                right.signal(Signal::SIGSTOP);
                // So many notifications that the right daemon, which receives them all at once, takes them for a flood.
                for _ in 0..20 {
                    world.sql("SELECT tidings.schedule('r', clock_timestamp())").await;
                }
                // Written long before they are due, because the insert itself notifies and wakes the left daemon.
                let orphans = format!(
                    "INSERT INTO tidings.schedules (kind, due_at)
                     SELECT 'r', now() + interval '{} ms' FROM generate_series(1, 20)",
                    (FROZEN + ORPHANED).as_millis()
                );
                world.sql(&orphans).await;
            }
            1 if since.elapsed() > FROZEN => {
                thawed = Some(world.now().await);
                right.signal(Signal::SIGCONT);
            }
            2 if world.value::<bool>("SELECT count(*) = 20 FROM tidings.deliveries WHERE kind = 'r'").await => {
                right.signal(Signal::SIGKILL);
            }
            3 if since.elapsed() > AFTERWARDS => break,
            _ => continue,
        }
        (step, since) = (step + 1, Instant::now());
    }
    let all = format!("SELECT count(*) = {written} FROM tidings.deliveries WHERE kind <> 'r'");
    world.wait_until(&all).await;
    let thawed = thawed.expect("it was");
    let times = stage.lateness(&format!("kind <> 'r' AND due_at >= '{thawed}'")).await;
    drop(right);
    assert!(left.stop().await.success());
    let _ = std::fs::remove_dir_all(state);
    stage.remove().await;
    times
}
