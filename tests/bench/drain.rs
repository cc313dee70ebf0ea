//! Measures how fast rows are delivered that are all due at once: by one daemon, by two, by a daemon that is killed in
//! the middle and restarted, and while an open transaction keeps PostgreSQL from removing dead rows.

use harness::world::{World, database_url};
use nix::sys::signal::Signal;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use time::OffsetDateTime;

use crate::Bench;
use crate::load::{Stage, per_second};
use crate::probe::{ServerPids, cpu_seconds, thread_cpu_seconds};
use crate::raw;
use crate::report::Figure;
use crate::rounds::median;
use crate::statements::{count_statements, windows_of_looks};

/// The number of rows in a drain.
const ROWS: u32 = 100_000;
/// The number of rows that are delivered while a reader's transaction is open.
const UNDER_READER: u32 = 500_000;

/// Delivers due rows through a plugin to a quorum queue.
pub(crate) async fn drain(bench: &Bench) -> Vec<Figure> {
    let (stage, rows) = (Stage::with_plugins(&["message"]).await, bench.rows(ROWS));
    let daemon = stage.start_daemon().await;
    let (pid, servers) = (daemon.pid(), ServerPids::of(&stage.world).await);
    let (mut rates, mut limits, mut costs, mut raw_costs, mut guests, mut guest_costs) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut of_postgres, mut of_rabbitmq, mut raw_of_rabbitmq) = (Vec::new(), Vec::new(), Vec::new());
    let for_each = |seconds: f64| seconds * 1e6 / f64::from(rows);
    for _ in 0..bench.rounds() {
        // The limit is measured before and after, so that a change in the speed of the machine affects both figures.
        let (mut limit, mut raw_cost) = (0.0, 0.0);
        let (before, servers_before) = (cpu_seconds(None), servers.cpu_seconds());
        limit += raw::publish_and_confirm(&stage, rows).await / 2.0;
        raw_cost += (cpu_seconds(None) - before) / 2.0;
        raw_of_rabbitmq.push(for_each(servers.cpu_seconds()[1] - servers_before[1]));
        stage.tidy().await;

        let servers_before = servers.cpu_seconds();
        let (before, guests_before) = (cpu_seconds(Some(pid)), thread_cpu_seconds(pid, "plugin"));
        rates.push(stage.drain(rows).await);
        let (used, by_guests) = (cpu_seconds(Some(pid)) - before, thread_cpu_seconds(pid, "plugin") - guests_before);
        let servers_used = servers.cpu_seconds();
        costs.push(for_each(used));
        guests.push(by_guests / used * 100.0);
        guest_costs.push(for_each(by_guests));
        of_postgres.push(for_each(servers_used[0] - servers_before[0]));
        of_rabbitmq.push(for_each(servers_used[1] - servers_before[1]));
        stage.tidy().await;

        let before = cpu_seconds(None);
        limit += raw::publish_and_confirm(&stage, rows).await / 2.0;
        raw_cost += (cpu_seconds(None) - before) / 2.0;
        raw_costs.push(for_each(raw_cost));
        limits.push(limit);
        stage.tidy().await;
    }
    assert!(daemon.stop().await.success());
    stage.remove().await;
    vec![
        Figure::new("rows due to confirmed", "rows/s", rates)
            .beside("raw publish and confirm", limits)
            .at_least_share(0.8),
        Figure::new("processor time of the daemon", "µs/row", costs).beside("of the raw publisher", raw_costs),
        Figure::new("of which plugins", "%", guests).at_most(15.0),
        Figure::new("the same", "µs/row", guest_costs),
        Figure::new("processor time of PostgreSQL", "µs/row", of_postgres),
        Figure::new("processor time of RabbitMQ", "µs/row", of_rabbitmq).beside("in raw publishing", raw_of_rabbitmq),
    ]
}

/// Compares two daemons with one.
pub(crate) async fn two_daemons(bench: &Bench) -> Vec<Figure> {
    let (stage, rows) = (Stage::with_plugins(&["message"]).await, bench.rows(ROWS));
    let _one = stage.start_daemon().await;
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        alone.push(stage.drain(rows).await);
        stage.tidy().await;
        let state = stage.world.state_dir().with_extension("state2");
        let other = stage.start_warm(&stage.world.launch().with("TIDINGS_STATE_DIR", state.display())).await;
        together.push(stage.drain(rows).await);
        assert!(other.stop().await.success());
        stage.tidy().await;
        let _ = std::fs::remove_dir_all(state);
    }
    stage.remove().await;
    // Not 100 %, because rounds differ by 5 % without any cause.
    let figure = Figure::new("two daemons", "rows/s", together).beside("one", alone).at_least_share(0.95);
    vec![figure]
}

/// Kills the daemon in the middle of a drain and starts it again.
pub(crate) async fn recovery(bench: &Bench) -> Vec<Figure> {
    let (stage, rows) = (Stage::with_plugins(&["message"]).await, bench.rows(ROWS));
    let (mut beyond, mut took, mut expected, mut copies) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let mut daemon = stage.start_daemon().await;
        let begun = stage.write_due(rows).await;
        stage.wait_until_queued(rows / 2).await;
        daemon.signal(Signal::SIGKILL);
        let killed = OffsetDateTime::now_utc();
        daemon.wait_for_end().await;

        let restarted = OffsetDateTime::now_utc();
        let daemon = stage.world.launch().start_ready().await;
        stage.wait_until_queued(rows).await;
        stage.wait_until_finished(rows).await;
        let ended = stage.last_confirm().await;
        let left = "SELECT count(*) FROM tidings.deliveries WHERE finished_at >= ";
        let left: i64 = stage.world.value(&format!("{left} '{killed}'")).await;
        let left = u32::try_from(left).expect("few");
        let ids: i64 = stage.world.value("SELECT count(DISTINCT id) FROM tidings.deliveries").await;
        assert_eq!(ids, i64::from(rows), "every row was delivered");
        let to_drain = f64::from(left) / per_second(rows - left, killed - begun);
        let drained = (ended - restarted).as_seconds_f64();
        took.push(drained);
        expected.push(to_drain);
        beyond.push(drained - to_drain);
        copies.push(f64::from(stage.count_queued().await) - f64::from(rows));
        assert!(daemon.stop().await.success());
        stage.tidy().await;
    }
    stage.remove().await;
    vec![
        Figure::new("restart to the last confirm", "s", took).beside("at the rate before the kill", expected),
        Figure::new("longer than that rate", "s", beyond).at_most(3.0),
        Figure::new("messages that came twice", "", copies).at_most(100.0),
    ]
}

/// Delivers rows while a long transaction keeps PostgreSQL from removing the deleted rows.
pub(crate) async fn with_reader(bench: &Bench) -> Vec<Figure> {
    let (stage, rows) = (Stage::with_plugins(&["message"]).await, bench.rows(UNDER_READER));
    let url = database_url(stage.world.ports().0, &stage.world.name);
    count_statements(&stage.world).await;
    let (mut clean, mut held, mut clean_pages, mut held_pages, mut unbounded) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.rounds() {
        let daemon = stage.start_daemon().await;
        // A look then finds a next row.
        stage.world.sql("SELECT tidings.schedule('message', now() + interval '1 day', key => 'next')").await;
        clean_pages.push(count_pages_of_look(&stage.world).await);
        clean.push(stage.drain(rows).await);
        stage.tidy().await;

        let mut reader = PgConnection::connect(&url).await.expect("a connection");
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("begun");
        reader.execute("SELECT count(*) FROM tidings.passes").await.expect("a snapshot");
        held.push(stage.drain(rows).await);
        held_pages.push(count_pages_of_look(&stage.world).await);
        unbounded.push(count_pages_of(&stage.world, "SELECT min(slot_at) FROM tidings.schedules").await);
        reader.close().await.expect("ended");
        assert!(daemon.stop().await.success());
        stage.tidy().await;
    }
    stage.remove().await;
    vec![
        Figure::new("pages that a look reads", "", held_pages).beside("a plain min(slot_at)", unbounded).at_most(10.0),
        Figure::new("the same without a reader", "", clean_pages),
        Figure::new("rows due to confirmed", "rows/s", held).beside("without a reader", clean).at_least_share(0.9),
    ]
}

/// The number of pages of tables and indexes that one look reads when no row is due.
async fn count_pages_of_look(world: &World) -> f64 {
    median(windows_of_looks(world).await.iter().map(|cost| cost.pages))
}

/// The number of pages that a statement reads.
async fn count_pages_of(world: &World, sql: &str) -> f64 {
    let explain = format!("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}");
    let plan = sqlx::query_scalar::<_, sqlx::types::JsonValue>(AssertSqlSafe(explain)).fetch_one(&world.db).await;
    let plan = &plan.expect("a plan")[0]["Plan"];
    let pages = |name: &str| plan[name].as_f64().unwrap_or(0.0);
    pages("Shared Hit Blocks") + pages("Shared Read Blocks")
}
