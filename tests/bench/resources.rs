//! What the daemon takes: statements and processor time while it is idle, memory while it delivers for a long time, and the
//! time from its start until it is ready.

use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::world::World;
use nix::sys::signal::Signal;

use crate::probe::{cpu, resident_mib};
use crate::report::{Figure, median};
use crate::{Bench, MILLION};

/// For how long nothing is due.
const IDLE_SECONDS: u32 = 60;
/// Rows that are due at once, again and again, while memory is watched.
const BATCH: u32 = 20_000;
/// Starts.
const STARTS: usize = 10;

/// Nothing is due before tomorrow: statements and processor time of a minute; then how long it takes to stop.
pub(crate) async fn idle(bench: &Bench) -> Vec<Figure> {
    let world = World::with(&["message"]).await;
    // With a role of its own, so that its statements can be told from ours.
    let role = format!("{}_daemon", world.name);
    for sql in [
        "CREATE EXTENSION pg_stat_statements".to_owned(),
        format!("CREATE ROLE {role} LOGIN IN ROLE tidings_daemon"),
        format!("ALTER ROLE {role} SET pg_stat_statements.track = 'top'"),
        "SELECT tidings.schedule('message', now() + interval '1 day')".to_owned(),
    ] {
        world.sql(&sql).await;
    }
    let url = harness::world::database_url(world.ports().0, &world.name).replacen("postgres@", &format!("{role}@"), 1);
    let launch = world.launch().with("TIDINGS_DATABASE_URL", url);
    let calls = format!(
        "SELECT coalesce(sum(calls), 0)::float8 FROM pg_stat_statements WHERE userid = (SELECT oid FROM pg_roles WHERE rolname = '{role}')"
    );
    let seconds = bench.seconds(IDLE_SECONDS);
    let (mut statements, mut busy, mut stops) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let mut daemon = launch.ready().await;
        // What belongs to the start is over by then.
        tokio::time::sleep(Duration::from_secs(10)).await;
        let (calls_before, cpu_before) = (world.value::<f64>(&calls).await, cpu(Some(daemon.pid())));
        tokio::time::sleep(Duration::from_secs(seconds.into())).await;
        let a_minute = 60.0 / f64::from(seconds);
        statements.push((world.value::<f64>(&calls).await - calls_before) * a_minute);
        busy.push((cpu(Some(daemon.pid())) - cpu_before) * a_minute);

        let asked = Instant::now();
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.ended().await.success());
        stops.push(asked.elapsed().as_secs_f64() * 1000.0);
    }
    // The role has rights in the database, and cannot be dropped before it.
    let port = world.ports().0;
    world.remove().await;
    harness::world::execute(port, &format!("DROP ROLE {role}")).await;
    vec![
        Figure::new("statements", "a minute", statements).beside("sweeps", [12.0]).at_most(15.0),
        Figure::new("processor time", "s/minute", busy).at_most(0.2),
        Figure::new("SIGTERM to the end", "ms", stops).under(1_000.0),
    ]
}

/// Deliveries for minutes on end, with everything loaded and many rows pending.
pub(crate) async fn memory(bench: &Bench) -> Vec<Figure> {
    let stage = bench.pending(bench.many()).await;
    let daemon = stage.world.launch().ready().await;
    let at_start = resident_mib(daemon.pid());
    let deadline = Instant::now() + bench.minutes();
    // Rows delivered, in millions, and MiB.
    let mut samples: Vec<(f64, f64)> = Vec::new();
    let mut delivered = 0;
    while Instant::now() < deadline || samples.len() < 4 {
        stage.write_due(BATCH).await;
        // Sampled in the middle of the work as well as after it.
        for part in [BATCH / 2, BATCH] {
            stage.until_queued(part).await;
            samples.push((f64::from(delivered + part) / 1e6, resident_mib(daemon.pid())));
        }
        stage.until_finished(BATCH).await;
        delivered += BATCH;
        stage.purge().await;
        stage.world.sql("TRUNCATE tidings.deliveries").await;
    }
    let most = samples.iter().map(|(_, mib)| *mib).fold(0.0, f64::max);
    // The first half warms up: caches, plans, histograms, the allocator.
    let slope = slope(&samples[samples.len() / 2..]);
    let end = median(samples[samples.len() * 9 / 10..].iter().map(|(_, mib)| *mib));
    stop(daemon).await;
    bench.keep(stage);
    vec![
        Figure::new("rows delivered meanwhile", "rows", [f64::from(delivered)]),
        Figure::new("resident memory, most", "MiB", [most]).beside("at the start", [at_start]).at_most(80.0),
        Figure::new("resident memory, in the end", "MiB", [end]).beside("at the start", [at_start]),
        Figure::new("growth in the second half", "MiB/10⁶", [slope]).at_most(1.0),
    ]
}

/// The slope of the line through `points` with the least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let number = crate::report::count(points.len());
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / number;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let both: f64 = points.iter().map(|point| (point.0 - x) * (point.1 - y)).sum();
    both / points.iter().map(|point| (point.0 - x).powi(2)).sum::<f64>()
}

/// From the start of the process until it says that it is ready; its plugins were compiled before.
pub(crate) async fn start(bench: &Bench) -> Vec<Figure> {
    let stage = bench.pending(bench.many()).await;
    stop(stage.daemon().await).await;
    let version = stage.world.launch().subcommand("--version");
    let (mut ready, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let begun = Instant::now();
        let daemon = stage.world.launch().start();
        while !daemon.log().contains(" ready ") {
            assert!(begun.elapsed() < harness::PATIENCE, "it is not ready:\n{}", daemon.log());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ready.push(begun.elapsed().as_secs_f64() * 1000.0);
        stop(daemon).await;
        let begun = Instant::now();
        let mut process = version.start();
        while !process.has_ended() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        floor.push(begun.elapsed().as_secs_f64() * 1000.0);
    }
    bench.keep(stage);
    vec![Figure::new("start to ready", "ms", ready).beside("tidings --version", floor).under(300.0)]
}

async fn stop(daemon: Daemon) {
    assert!(daemon.stop().await.success());
}

impl Bench {
    /// Rows that wait while a daemon starts, and while its memory is watched.
    fn many(&self) -> u32 {
        if self.arguments.big { 10 * MILLION } else { MILLION }
    }
}
