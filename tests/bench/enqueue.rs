//! Measures what producers pay: for the triggers, by the same statements on the same table with and without triggers; and for
//! everything, by single rows in a table without rules, defaults and triggers.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use harness::world::database_url;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor as _};

use crate::load::{Stage, insert_due_rows_sql, payload};
use crate::report::Figure;
use crate::{Bench, MILLION};

/// The number of concurrent writers.
const CLIENTS: u32 = 16;
/// For how many seconds they write.
const SECONDS: u32 = 8;

/// The least that a table of scheduled rows has: an id, what is written, and an index on the time.
const BARE_TABLE: &str = "CREATE TABLE bare (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), kind text NOT NULL, due_at timestamptz NOT NULL, payload jsonb NOT NULL
)";

/// Writes many rows in one statement, due in a month; and single rows by several clients, due soon.
pub(crate) async fn enqueue(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with_plugins(&["message"]).await;
    // The looks of the daemon that triggers notify are part of the cost.
    let daemon = stage.start_daemon().await;
    let (with, without) = (connect_clients(&stage, true).await, connect_clients(&stage, false).await);
    let rows = bench.rows(MILLION);
    stage.world.sql(BARE_TABLE).await;
    stage.world.sql("CREATE INDEX ON bare (due_at)").await;
    let mut of_bare = Vec::new();
    let (mut bulk, mut bare_bulk, mut single, mut bare_single) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds() {
        // The order alternates, because the first of the two has an empty table and the second a warm one.
        for triggers in [round % 2 == 0, round % 2 != 0] {
            let pool = if triggers { &with } else { &without };
            let (bulk, single) = if triggers { (&mut bulk, &mut single) } else { (&mut bare_bulk, &mut bare_single) };
            bulk.push(write_in_bulk(pool, rows).await);
            empty_table(&stage).await;
            single.push(write_one_at_a_time(pool, bench.seconds(SECONDS), "tidings.schedules").await);
            // The rows are removed before the first of them is due.
            empty_table(&stage).await;
        }
        of_bare.push(write_one_at_a_time(&without, bench.seconds(SECONDS), "bare").await);
        stage.world.sql("TRUNCATE bare").await;
    }
    assert!(daemon.stop().await.success());
    with.close().await;
    without.close().await;
    stage.remove().await;
    let single_again = single.clone();
    vec![
        Figure::new("in bulk, due in a month", "rows/s", bulk)
            .beside("without triggers", bare_bulk)
            .at_least_share(0.85),
        Figure::new("by 16 clients one by one, due soon", "rows/s", single).beside("without triggers", bare_single),
        Figure::new("the same", "rows/s", single_again).beside("into a bare table", of_bare).at_least_share(0.7),
    ]
}

/// Opens the clients' connections, for which triggers fire or do not fire.
async fn connect_clients(stage: &Stage, triggers: bool) -> PgPool {
    let url = database_url(stage.world.ports().0, &stage.world.name);
    let options: PgConnectOptions = url.parse().expect("a URL");
    // The role `replica` is meant for rows from replication, for which ordinary triggers do not fire.
    let role = if triggers { "origin" } else { "replica" };
    let options = options.options([("session_replication_role", role)]);
    let pool = PgPoolOptions::new().min_connections(CLIENTS).max_connections(CLIENTS).connect_with(options).await;
    pool.expect("connections")
}

async fn write_in_bulk(clients: &PgPool, rows: u32) -> f64 {
    let insert = insert_due_rows_sql("now() + interval '30 days' + n * interval '1 ms'", rows);
    let begun = Instant::now();
    clients.execute(AssertSqlSafe(insert)).await.expect("written");
    f64::from(rows) / begun.elapsed().as_secs_f64()
}

/// Each client writes a row into the table, waits for its commit, and writes the next.
async fn write_one_at_a_time(clients: &PgPool, seconds: u32, table: &str) -> f64 {
    let insert = format!(
        "INSERT INTO {table} (kind, due_at, payload) VALUES ('message', clock_timestamp() + interval '25 s', '{}')",
        payload()
    );
    let until = Instant::now() + Duration::from_secs(seconds.into());
    let begun = Instant::now();
    let written = join_all((0..CLIENTS).map(|_| {
        let (clients, insert) = (clients.clone(), insert.clone());
        tokio::spawn(async move {
            let mut connection = clients.acquire().await.expect("a connection");
            let mut written = 0;
            while Instant::now() < until {
                sqlx::query(AssertSqlSafe(&*insert)).execute(&mut *connection).await.expect("written");
                written += 1;
            }
            written
        })
    }));
    let written: u32 = written.await.into_iter().map(|client| client.expect("it wrote")).sum();
    f64::from(written) / begun.elapsed().as_secs_f64()
}

async fn empty_table(stage: &Stage) {
    stage.world.sql("TRUNCATE tidings.schedules").await;
    stage.world.sql("CHECKPOINT").await;
}
