//! Measures the resources of the daemon: statements and processor time while it is idle, processor time of rows that
//! come alone, memory while it delivers for a long time, and the time from its start until it is ready.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::world::{World, database_url};
use nix::sys::signal::Signal;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::MissedTickBehavior;

use crate::load::{Stage, schedule_now_sql};
use crate::probe::{ServerPids, Threads, cpu_seconds, family_cpu_seconds, resident_mib};
use crate::report::{Figure, count};
use crate::rounds::median;
use crate::{Bench, MILLION};

/// For how many seconds the idle daemon is measured.
const IDLE_SECONDS: u32 = 60;
/// How many recurrences an idle daemon has, none of which is due.
const RECURRENCES: u32 = 10_000;
/// The time between two rows that come alone, and for how many seconds they come.
const ALONE: Duration = Duration::from_millis(10);
const SECONDS_ALONE: u32 = 20;
/// The number of rows in the drain with which they are compared.
const DRAINED: u32 = 20_000;
/// The number of rows in each batch that is written while memory is watched.
const BATCH: u32 = 20_000;
/// The number of starts.
const STARTS: usize = 10;

/// Measures statements and processor time in a minute in which no row is due, and how long the daemon then takes to
/// stop.
pub(crate) async fn idle(bench: &Bench) -> Vec<Figure> {
    let world = World::with_plugins(&["message"]).await;
    // The daemon gets a role of its own, so that its statements are counted separately.
    let role = format!("{}_daemon", world.name);
    for sql in [
        "CREATE EXTENSION pg_stat_statements".to_owned(),
        format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon"),
        format!("ALTER ROLE {role} SET pg_stat_statements.track = 'top'"),
        "SELECT tidings.schedule('message', now() + interval '1 day')".to_owned(),
    ] {
        world.sql(&sql).await;
    }
    let url = database_url(world.ports().0, &world.name).replacen("postgres@", &format!("{role}@"), 1);
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url);
    let calls = format!(
        "SELECT coalesce(sum(calls), 0)::float8 FROM pg_stat_statements WHERE userid = (SELECT oid FROM pg_roles WHERE rolname = '{role}')"
    );
    let seconds = bench.seconds(IDLE_SECONDS);
    let (mut statements, mut busy, mut stops) = (Vec::new(), Vec::new(), Vec::new());
    let mut with_recurrences = Vec::new();
    for round in 0..2 * bench.rounds() {
        let mut daemon = launch.start_ready().await;
        if round == bench.rounds() {
            let repeat = format!(
                "SELECT tidings.repeat('r' || n, 'message', '0 0 0 1 1 * 2200') FROM generate_series(1, {RECURRENCES}) AS n"
            );
            world.sql(&repeat).await;
            world.wait_until("SELECT bool_and(next_at IS NOT NULL) FROM tidings.recurrences").await;
        }
        // Waits until the work of the start is over.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let (calls_before, cpu_before) = (world.value::<f64>(&calls).await, cpu_seconds(Some(daemon.pid())));
        tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        let a_minute = 60.0 / f64::from(seconds);
        let count = (world.value::<f64>(&calls).await - calls_before) * a_minute;
        if round < bench.rounds() {
            statements.push(count);
            busy.push((cpu_seconds(Some(daemon.pid())) - cpu_before) * a_minute);
        } else {
            with_recurrences.push(count);
        }

        let asked = Instant::now();
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.wait_for_end().await.success());
        stops.push(asked.elapsed().as_secs_f64() * 1000.0);
    }
    // The role has rights in the database, so the database must be dropped first.
    let port = world.ports().0;
    world.remove().await;
    harness::world::execute(port, &format!("DROP ROLE {role}")).await;
    vec![
        Figure::new("with 10,000 recurrences", "statements a minute", with_recurrences)
            .beside("without", statements.iter().copied())
            .at_most(15.0),
        Figure::new("statements", "a minute", statements).beside("sweeps", [12.0]).at_most(15.0),
        Figure::new("processor time", "s/minute", busy).at_most(0.2),
        Figure::new("SIGTERM to the end", "ms", stops).under(1_000.0),
    ]
}

/// Measures what the daemon and PostgreSQL spend on a row that comes alone, so that nothing is shared with other rows.
pub(crate) async fn lonely(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    let daemon = stage.start_daemon().await;
    // A connection of its own: a pool would ask before each row whether the connection is still there.
    let url = database_url(stage.world.ports().0, &stage.world.name);
    let mut client = PgConnection::connect(&url).await.expect("a connection");
    let postmaster = ServerPids::of(&stage.world).await.postmaster;
    let (insert, drained, rows) = (schedule_now_sql(), bench.rows(DRAINED), 100 * bench.seconds(SECONDS_ALONE));
    let (mut in_drain, mut alone, mut of_postgres, mut switches, mut threads) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let before = Threads::of(daemon.pid());
        stage.drain(drained).await;
        in_drain.push(Threads::of(daemon.pid()).since(&before).cpu_seconds * 1000.0 / f64::from(drained));
        stage.tidy().await;

        let mut pace = tokio::time::interval(ALONE);
        // After a delay, rows that catch up would not come alone.
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (postgres_before, before) = (family_cpu_seconds(postmaster), Threads::of(daemon.pid()));
        for _ in 0..rows {
            pace.tick().await;
            sqlx::query(AssertSqlSafe(&*insert)).execute(&mut client).await.expect("written");
        }
        stage.wait_until_finished(rows).await;
        let used = Threads::of(daemon.pid()).since(&before);
        of_postgres.push((family_cpu_seconds(postmaster) - postgres_before) * 1000.0 / f64::from(rows));
        alone.push(used.cpu_seconds * 1000.0 / f64::from(rows));
        switches.push(used.switches / f64::from(rows));
        threads.push(count(used.threads));
        stage.tidy().await;
    }
    client.close().await.expect("closed");
    stop_daemon(daemon).await;
    stage.remove().await;
    vec![
        Figure::new("processor time of the daemon", "ms/row", alone).beside("in a drain", in_drain).at_most(0.4),
        Figure::new("processor time of PostgreSQL", "ms/row", of_postgres),
        Figure::new("context switches of the daemon", "/row", switches),
        Figure::new("threads of the daemon that ran", "", threads),
    ]
}

/// Measures memory while the daemon delivers for minutes, with all plugins loaded and many rows pending.
pub(crate) async fn memory(bench: &Bench) -> Vec<Figure> {
    let stage = bench.take_pending_stage(bench.pending_rows()).await;
    let daemon = stage.world.launch().start_ready().await;
    let at_start = resident_mib(daemon.pid());
    let deadline = Instant::now() + bench.minutes();
    // Delivered rows, in millions, and resident memory, in MiB.
    let mut samples: Vec<(f64, f64)> = Vec::new();
    let mut delivered = 0;
    while Instant::now() < deadline || samples.len() < 4 {
        stage.write_due(BATCH).await;
        // Sampled in the middle of the work as well as after it.
        for part in [BATCH / 2, BATCH] {
            stage.wait_until_queued(part).await;
            samples.push((f64::from(delivered + part) / 1e6, resident_mib(daemon.pid())));
        }
        stage.wait_until_finished(BATCH).await;
        delivered += BATCH;
        stage.purge().await;
        stage.world.sql("TRUNCATE tidings.deliveries").await;
    }
    let most = samples.iter().map(|(_, mib)| *mib).fold(0.0, f64::max);
    // In the first half, caches, plans, histograms and the allocator still grow.
    let slope = slope(&samples[samples.len() / 2..]);
    let end = median(samples[samples.len() * 9 / 10..].iter().map(|(_, mib)| *mib));
    stop_daemon(daemon).await;
    bench.keep_stage(stage);
    vec![
        Figure::new("rows delivered meanwhile", "rows", [f64::from(delivered)]),
        Figure::new("resident memory, most", "MiB", [most]).beside("at the start", [at_start]).at_most(80.0),
        Figure::new("resident memory, in the end", "MiB", [end]).beside("at the start", [at_start]),
        Figure::new("growth in the second half", "MiB/10⁶", [slope]).at_most(1.0),
    ]
}

/// The slope of the least-squares line through `points`.
fn slope(points: &[(f64, f64)]) -> f64 {
    let number = count(points.len());
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / number;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let both: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    both / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

/// Measures the time from the start of the process until it is ready, with its plugins already compiled.
pub(crate) async fn start(bench: &Bench) -> Vec<Figure> {
    let stage = bench.take_pending_stage(bench.pending_rows()).await;
    stop_daemon(stage.start_daemon().await).await;
    let version = stage.world.launch().subcommand("--version");
    let (mut ready, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let begun = Instant::now();
        let daemon = stage.world.launch().start();
        while !daemon.log().contains(" ready ") {
            assert!(begun.elapsed() < harness::EVENT_TIMEOUT, "it is not ready:\n{}", daemon.log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ready.push(begun.elapsed().as_secs_f64() * 1000.0);
        stop_daemon(daemon).await;
        let begun = Instant::now();
        let mut process = version.start();
        while !process.has_ended() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        floor.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    bench.keep_stage(stage);
    vec![Figure::new("start to ready", "ms", ready).beside("tidings --version", floor).under(300.0)]
}

async fn stop_daemon(daemon: Daemon) {
    assert!(daemon.stop().await.success());
}

impl Bench {
    /// How many rows are pending while a daemon starts and while its memory is watched.
    fn pending_rows(&self) -> u32 {
        if self.arguments.big { 10 * MILLION } else { MILLION }
    }
}
