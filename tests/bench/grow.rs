//! Measures what more of everything does: more daemons, more pending rows, and more partitions of `tidings.schedules`.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::world::World;

use crate::load::{Stage, WARM, payload, per_second};
use crate::probe::{ServerPids, cpu_seconds};
use crate::raw;
use crate::report::{Figure, count};
use crate::rounds::median;
use crate::statements::{Cost, count_statements, windows, windows_of_looks};
use crate::{Bench, MILLION};

/// The numbers of daemons on one database.
const DAEMONS: [usize; 4] = [1, 2, 4, 8];
/// The numbers of partitions; 1 is a plain table.
const PARTITIONS: [u32; 3] = [1, 4, 16];
/// The numbers of pending rows.
const FEW: u32 = 10_000;
const MANY: u32 = 10 * MILLION;
/// The number of rows in a drain.
const ROWS: u32 = 40_000;
/// How many times more pages and time a statement may take over a thousand times as many rows: an index gets a level deeper, or two.
const FLAT: f64 = 2.0;
/// Longer than any change of the number of partitions takes.
const CHANGE_TIMEOUT: Duration = Duration::from_mins(30);
/// Selects the statement that claims rows.
const CLAIMS: &str = "query LIKE '%SKIP LOCKED%' AND query LIKE '%tidings.schedules%' AND query LIKE '%slot_at%'";

/// What a look and a claim cost.
#[derive(Clone, Debug)]
struct Costs {
    looks: Vec<Cost>,
    claims: Vec<Cost>,
}

/// Measures looks, claims and drains for each number of partitions, and how long changing that number takes.
pub(crate) async fn grow(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    count_statements(&stage.world).await;
    let track = "SET pg_stat_statements.track_planning = on";
    stage.world.sql(&format!("ALTER DATABASE {} {track}", stage.world.name)).await;
    write_pending(&stage, 0, bench.rows(FEW)).await;
    let mut over_few = Vec::new();
    for partitions in PARTITIONS {
        change_partitions(&stage.world, partitions).await;
        over_few.push(measure_costs(&stage).await);
    }
    change_partitions(&stage.world, 1).await;
    let begun = Instant::now();
    write_pending(&stage, bench.rows(FEW), bench.rows(MANY)).await;
    eprintln!("wrote the pending rows in {:.0?}", begun.elapsed());

    let (mut figures, mut changes, mut before) = (Vec::new(), Vec::new(), PARTITIONS[0]);
    for (partitions, few) in PARTITIONS.into_iter().zip(&over_few) {
        if partitions != before {
            let took = change_partitions(&stage.world, partitions).await;
            changes.push(figure_of_change(before, partitions, took));
            before = partitions;
        }
        stage.tidy().await;
        let costs = measure_costs(&stage).await;
        figures.extend(figures_of_costs(partitions, few, &costs));
        figures.extend(measure_drains(bench, &stage, partitions).await);
    }
    let took = change_partitions(&stage.world, PARTITIONS[0]).await;
    changes.push(figure_of_change(before, PARTITIONS[0], took));
    let rows: i64 = stage.world.value("SELECT count(*) FROM tidings.schedules").await;
    assert_eq!(rows, i64::from(bench.rows(MANY)), "no pending row was lost");
    stage.remove().await;
    figures.extend(changes);
    figures
}

/// Writes pending rows with keys, until there are `until` of them after there were `from`; due from next year on, one every three
/// seconds. A row's partition depends on its kind and its key.
async fn write_pending(stage: &Stage, from: u32, until: u32) {
    let mut written = from;
    while written < until {
        let more = (until - written).min(MILLION);
        let insert = format!(
            r#"INSERT INTO tidings.schedules (kind, key, due_at, payload)
               SELECT 'message', 'pending-' || n, now() + interval '1 year' + n * interval '3 s', '{{"routing_key":"a","body":1}}'
               FROM generate_series({} + 1, {}) AS n"#,
            written,
            written + more
        );
        stage.world.sql(&insert).await;
        written += more;
    }
    stage.tidy().await;
}

/// Makes `tidings.schedules` have so many partitions, while no daemon runs. Returns how long the command took, in seconds.
async fn change_partitions(world: &World, partitions: u32) -> f64 {
    let begun = Instant::now();
    let migrate = world.launch().subcommand("migrate").args(["--partitions", &partitions.to_string()]);
    let mut migrate = migrate.start();
    while !migrate.has_ended() {
        assert!(begun.elapsed() < CHANGE_TIMEOUT, "changing to {partitions} partitions takes too long");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = begun.elapsed().as_secs_f64();
    let status = migrate.wait_for_end().await;
    assert!(status.success(), "tidings migrate --partitions {partitions} failed:\n{}", migrate.log());
    let leaves = "SELECT count(*) FROM pg_partition_tree('tidings.schedules') WHERE isleaf AND level > 0";
    let leaves: i64 = world.value(leaves).await;
    assert_eq!(leaves, if partitions == 1 { 0 } else { i64::from(partitions) }, "the partitions of the table");
    eprintln!("changed to {partitions} partitions in {took:.1} s");
    took
}

/// What a daemon's looks and claims cost with the rows that are pending now.
async fn measure_costs(stage: &Stage) -> Costs {
    let daemon = start_daemon(stage, 0).await;
    drain(stage, WARM).await;
    stage.tidy().await;
    let looks = windows_of_looks(&stage.world).await;
    let claim = async |number| {
        let schedule = format!(
            "SELECT tidings.schedule('message', clock_timestamp(), '{}', key => 'claimed-{number}')",
            payload()
        );
        stage.world.sql(&schedule).await;
    };
    let claims = windows(&stage.world, CLAIMS, claim).await;
    assert!(daemon.stop().await.success());
    stage.tidy().await;
    Costs { looks, claims }
}

/// Drains rows with each number of daemons, in addition to the pending ones.
async fn measure_drains(bench: &Bench, stage: &Stage, partitions: u32) -> Vec<Figure> {
    let (servers, rows) = (ServerPids::of(&stage.world).await, bench.rows(ROWS));
    let processors = count(std::thread::available_parallelism().map_or(1, usize::from));
    let (mut daemons, mut figures) = (Vec::<Daemon>::new(), Vec::new());
    for number in DAEMONS {
        while daemons.len() < number {
            daemons.push(start_daemon(stage, daemons.len()).await);
        }
        drain(stage, WARM * u32::try_from(number).expect("few")).await;
        stage.tidy().await;
        let (mut rates, mut limits, mut of_daemons, mut of_postgres) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..bench.rounds() {
            limits.push(raw::publish_and_confirm(stage, rows).await);
            stage.tidy().await;
            let written = stage.write(insert_due(rows)).await;
            let used = || daemons.iter().map(|daemon| cpu_seconds(Some(daemon.pid()))).sum::<f64>();
            let (begun, used_before, [postgres_before, _]) = (Instant::now(), used(), servers.cpu_seconds());
            stage.wait_until_queued(rows).await;
            let share = |seconds: f64| 100.0 * seconds / (begun.elapsed().as_secs_f64() * processors);
            of_daemons.push(share(used() - used_before));
            of_postgres.push(share(servers.cpu_seconds()[0] - postgres_before));
            stage.wait_until_finished(rows).await;
            rates.push(per_second(rows, stage.last_confirm().await - written));
            stage.tidy().await;
        }
        let name = format!("{}, {number} {}", name_of(partitions), if number == 1 { "daemon" } else { "daemons" });
        figures.push(
            Figure::new(format!("{name}, due to confirmed"), "rows/s", rates).beside("raw publish and confirm", limits),
        );
        figures.push(Figure::new(format!("{name}, processors of the daemons"), "%", of_daemons));
        figures.push(Figure::new(format!("{name}, processors of PostgreSQL"), "%", of_postgres));
    }
    for daemon in daemons {
        assert!(daemon.stop().await.success());
    }
    for number in 0..DAEMONS[DAEMONS.len() - 1] {
        let _ = std::fs::remove_dir_all(state_dir(stage, number));
    }
    figures
}

/// Starts a daemon with a state directory of its own.
async fn start_daemon(stage: &Stage, number: usize) -> Daemon {
    stage.world.launch().with("TIDINGS_STATE_DIR", state_dir(stage, number).display()).start_ready().await
}

fn state_dir(stage: &Stage, number: usize) -> std::path::PathBuf {
    stage.world.state_dir().with_extension(format!("state{number}"))
}

/// Writes due rows with keys, and waits until they are delivered.
async fn drain(stage: &Stage, rows: u32) {
    stage.write(insert_due(rows)).await;
    stage.wait_until_queued(rows).await;
    stage.wait_until_finished(rows).await;
}

/// The statement that writes due rows with keys, so that they lie in all partitions.
fn insert_due(rows: u32) -> String {
    format!(
        "INSERT INTO tidings.schedules (kind, key, due_at, payload)
         SELECT 'message', 'due-' || n, now(), '{}' FROM generate_series(1, {rows}) AS n",
        payload()
    )
}

fn name_of(partitions: u32) -> String {
    if partitions == 1 { "plain".to_owned() } else { format!("{partitions} partitions") }
}

fn figure_of_change(before: u32, after: u32, seconds: f64) -> Figure {
    let [before, after] = [before, after].map(name_of);
    Figure::new(format!("migrate, {before} to {after}"), "s", [seconds])
}

/// The costs over many pending rows, beside those over few.
fn figures_of_costs(partitions: u32, few: &Costs, many: &Costs) -> Vec<Figure> {
    let name = name_of(partitions);
    let figure = |what: &str, unit, of: &dyn Fn(&Costs) -> f64| {
        Figure::new(format!("{name}, {what}"), unit, [of(many)])
            .beside("with few pending", [of(few)])
            .at_most_share(FLAT)
    };
    let pages = |costs: &[Cost]| median(costs.iter().map(|cost| cost.pages));
    let ms = |costs: &[Cost]| median(costs.iter().map(|cost| cost.ms));
    vec![
        figure("pages that a look reads", "", &|costs| pages(&costs.looks)),
        figure("time of a look", "ms", &|costs| ms(&costs.looks)),
        figure("pages that a claim reads", "", &|costs| pages(&costs.claims)),
        figure("time of a claim", "ms", &|costs| ms(&costs.claims)),
    ]
}
