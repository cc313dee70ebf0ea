//! A process that schedules rows in every way an application may: one or many, in long transactions, in transactions
//! that are rolled back, and with keys that are rescheduled and cancelled. Each transaction also writes its rows to the
//! ledger.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::{Connection as _, Executor as _, Row as _};

use crate::random::Random;

/// Schedules about `rate` rows a second for `seconds`, and continues after every failure of the database.
pub(crate) async fn produce(url: &str, seed: u64, number: u64, seconds: u64, rate: u64) -> anyhow::Result<()> {
    let pool = PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(5)).connect_lazy(url)?;
    let mut random = Random::new(seed ^ (number << 32));
    let begun = Instant::now();
    let (mut written, mut turn) = (0, 0_u64);
    // Transactions that stay open while the loop continues.
    let mut open = tokio::task::JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    while begun.elapsed() < Duration::from_secs(seconds) {
        pace.tick().await;
        while open.try_join_next().is_some() {}
        let wanted = begun.elapsed().as_millis() * u128::from(rate) / 1000;
        if u128::from(written) >= wanted {
            continue;
        }
        turn += 1;
        let rows = u64::try_from(wanted).unwrap_or(u64::MAX).saturating_sub(written).min(500);
        written += rows;
        let key = format!("{number} {turn}");
        let rows = i64::try_from(rows)?;
        match random.below(10) {
            0 => {
                let (pool, held_ms) = (pool.clone(), random.below(4_000));
                open.spawn(async move { write_rows(&pool, rows, held_ms, true).await });
            }
            1 => drop(write_rows(&pool, rows, 0, false).await),
            2 => {
                let (keyed_pool, action, wait_ms) = (pool.clone(), random.below(3), random.below(3_000));
                open.spawn(async move { write_keyed_row(&keyed_pool, &key, action, wait_ms).await });
                drop(write_rows(&pool, rows, 0, true).await);
            }
            // A transaction that failed wrote nothing, or was committed without the producer learning it. The ledger is
            // right in either case.
            _ => drop(write_rows(&pool, rows, 0, true).await),
        }
    }
    while open.join_next().await.is_some() {}
    Ok(())
}

/// Writes rows that are due within five seconds, a fifth of them with a deadline one to ten seconds later, and keeps
/// the transaction open for `held_ms`.
async fn write_rows(pool: &PgPool, rows: i64, held_ms: u64, commit: bool) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query(
        r#"WITH written AS (
               INSERT INTO tidings.schedules (kind, due_at, expires_at, payload)
               SELECT 'message', due_at, CASE WHEN random() < 0.2 THEN due_at + interval '1 s' + random() * interval '9 s' END,
                      '{"routing_key": "rig", "body": "rig"}'
               FROM (SELECT clock_timestamp() + random() * interval '5 s' AS due_at FROM generate_series(1, $1)) AS due
               RETURNING id, due_at, expires_at
           )
           INSERT INTO rig.scheduled SELECT id, due_at, expires_at FROM written"#,
    )
    .bind(rows)
    .execute(&mut *transaction)
    .await?;
    tokio::time::sleep(Duration::from_millis(held_ms)).await;
    if commit { transaction.commit().await } else { transaction.rollback().await }
}

/// Writes a row with a key. After `wait_ms`, when it may already be delivered, leaves it (`action` 0), cancels it (1)
/// or reschedules it.
async fn write_keyed_row(pool: &PgPool, key: &str, action: u64, wait_ms: u64) -> Result<(), sqlx::Error> {
    pool.execute(
        sqlx::query(
            r#"WITH written AS (
                   INSERT INTO tidings.schedules (kind, key, due_at, payload)
                   VALUES ('message', $1, clock_timestamp() + interval '2 s', '{"routing_key": "rig", "body": "rig"}')
                   RETURNING id, due_at
               )
               INSERT INTO rig.scheduled SELECT id, due_at FROM written"#,
        )
        .bind(key),
    )
    .await?;
    tokio::time::sleep(Duration::from_millis(wait_ms)).await;
    let mut transaction = pool.begin().await?;
    let Some(old) = find_pending_id(&mut transaction, key).await? else { return Ok(()) };
    let statement = match action {
        0 => return Ok(()),
        1 => "SELECT tidings.cancel('message', $1)",
        _ => "SELECT tidings.reschedule('message', $1, clock_timestamp() + interval '1 s')",
    };
    if !sqlx::query_scalar::<_, bool>(statement).bind(key).fetch_one(&mut *transaction).await? {
        return Ok(());
    }
    sqlx::query("INSERT INTO rig.cancelled VALUES ($1)").bind(old).execute(&mut *transaction).await?;
    if let Some(new) = find_pending_id(&mut transaction, key).await? {
        let insert = "INSERT INTO rig.scheduled SELECT id, due_at FROM tidings.schedules WHERE id = $1";
        sqlx::query(insert).bind(new).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}

async fn find_pending_id(connection: &mut PgConnection, key: &str) -> Result<Option<uuid::Uuid>, sqlx::Error> {
    let row = sqlx::query("SELECT id FROM tidings.schedules WHERE kind = 'message' AND key = $1").bind(key);
    Ok(row.fetch_optional(connection).await?.map(|row| row.get(0)))
}

/// Keeps a snapshot open for ever, as a backup or a report does, so that PostgreSQL cannot remove dead rows.
pub(crate) async fn hold_snapshot(url: String) {
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    loop {
        pace.tick().await;
        let _ = async {
            let mut connection = PgConnection::connect(&url).await?;
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
            connection.execute("SELECT count(*) FROM tidings.deliveries").await?;
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                connection.execute("SELECT 1").await?;
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            Ok::<(), sqlx::Error>(())
        }
        .await;
    }
}
