//! What the triggers cost those who write: the same statements into the same table, with and without.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use harness::world::database_url;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor as _};

use crate::load::{Stage, payload, rows_due};
use crate::report::Figure;
use crate::{Bench, MILLION};

/// Writers at once.
const CLIENTS: u32 = 16;
/// For how long they write.
const SECONDS: u32 = 8;

/// Many rows in one statement, for a day far away; and clients that write one row at a time, due soon.
pub(crate) async fn enqueue(bench: &Bench) -> Vec<Figure> {
    let stage = Stage::with(&["message"]).await;
    // Its looks, when triggers have notified it, are part of what they cost.
    let daemon = stage.daemon().await;
    let (with, without) = (clients(&stage, true).await, clients(&stage, false).await);
    let rows = bench.rows(MILLION);
    let (mut bulk, mut bare_bulk, mut single, mut bare_single) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..bench.rounds() {
        // In turn: the first of two has an empty table and the second a warm one, or the other way round.
        for triggers in [round % 2 == 0, round % 2 != 0] {
            let pool = if triggers { &with } else { &without };
            let (bulk, single) = if triggers { (&mut bulk, &mut single) } else { (&mut bare_bulk, &mut bare_single) };
            bulk.push(in_bulk(pool, rows).await);
            empty(&stage).await;
            single.push(one_at_a_time(pool, bench.seconds(SECONDS)).await);
            // Before the first of them is due.
            empty(&stage).await;
        }
    }
    assert!(daemon.stop().await.success());
    with.close().await;
    without.close().await;
    stage.remove().await;
    vec![
        Figure::new("in bulk, due in a month", "rows/s", bulk)
            .beside("without triggers", bare_bulk)
            .at_least_share(0.85),
        Figure::new("by 16 clients one by one, due soon", "rows/s", single)
            .beside("without triggers", bare_single)
            .at_least_share(0.7),
    ]
}

/// Connections of clients, for which triggers fire or do not.
async fn clients(stage: &Stage, triggers: bool) -> PgPool {
    let url = database_url(stage.world.ports().0, &stage.world.name);
    let options: PgConnectOptions = url.parse().expect("a URL");
    // As for rows that come from another server by replication.
    let role = if triggers { "origin" } else { "replica" };
    let options = options.options([("session_replication_role", role)]);
    let pool = PgPoolOptions::new().min_connections(CLIENTS).max_connections(CLIENTS).connect_with(options).await;
    pool.expect("connections")
}

async fn in_bulk(clients: &PgPool, rows: u32) -> f64 {
    let insert = rows_due("now() + interval '30 days' + n * interval '1 ms'", rows);
    let begun = Instant::now();
    clients.execute(AssertSqlSafe(insert)).await.expect("written");
    f64::from(rows) / begun.elapsed().as_secs_f64()
}

/// Each client writes a row, waits for its commit, and writes the next.
async fn one_at_a_time(clients: &PgPool, seconds: u32) -> f64 {
    let insert = format!(
        "INSERT INTO tidings.schedules (kind, due_at, payload) VALUES ('message', clock_timestamp() + interval '25 s', '{}')",
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

async fn empty(stage: &Stage) {
    stage.world.sql("TRUNCATE tidings.schedules").await;
    stage.world.sql("CHECKPOINT").await;
}
