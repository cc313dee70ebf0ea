//! A process that schedules, in every way an application may: one row, many, in long transactions, in ones that are rolled
//! back, with keys that are moved and cancelled. What commits is in the ledger by the same transaction.

use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnection, PgPool, PgPoolOptions};
use sqlx::{Connection as _, Executor as _, Row as _};

use crate::random::Random;

/// Schedules for `seconds`, about `rate` rows a second, and goes on through whatever happens to the database.
pub(crate) async fn produce(url: &str, seed: u64, number: u64, seconds: u64, rate: u64) -> anyhow::Result<()> {
    let pool = PgPoolOptions::new().max_connections(8).acquire_timeout(Duration::from_secs(5)).connect_lazy(url)?;
    let mut random = Random::new(seed ^ (number << 32));
    let begun = Instant::now();
    let (mut written, mut turn) = (0, 0_u64);
    // Transactions that stay open while others go on.
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
                open.spawn(async move { transaction(&pool, rows, held_ms, true).await });
            }
            1 => drop(transaction(&pool, rows, 0, false).await),
            2 => {
                let (own, deed, wait_ms) = (pool.clone(), random.below(3), random.below(3_000));
                open.spawn(async move { keyed(&own, &key, deed, wait_ms).await });
                drop(transaction(&pool, rows, 0, true).await);
            }
            // A transaction that failed wrote nothing, or committed and nobody heard of it: the ledger knows.
            _ => drop(transaction(&pool, rows, 0, true).await),
        }
    }
    while open.join_next().await.is_some() {}
    Ok(())
}

/// Rows due within five seconds, a fifth of them with a deadline a few seconds later, in a transaction that is held open.
async fn transaction(pool: &PgPool, rows: i64, held_ms: u64, commit: bool) -> Result<(), sqlx::Error> {
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

/// A row with a key that is left alone, moved or cancelled a while later, perhaps too late.
async fn keyed(pool: &PgPool, key: &str, deed: u64, wait_ms: u64) -> Result<(), sqlx::Error> {
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
    let Some(old) = pending(&mut transaction, key).await? else { return Ok(()) };
    let statement = match deed {
        0 => return Ok(()),
        1 => "SELECT tidings.cancel('message', $1)",
        _ => "SELECT tidings.reschedule('message', $1, clock_timestamp() + interval '1 s')",
    };
    if !sqlx::query_scalar::<_, bool>(statement).bind(key).fetch_one(&mut *transaction).await? {
        return Ok(());
    }
    sqlx::query("INSERT INTO rig.cancelled VALUES ($1)").bind(old).execute(&mut *transaction).await?;
    if let Some(new) = pending(&mut transaction, key).await? {
        let insert = "INSERT INTO rig.scheduled SELECT id, due_at FROM tidings.schedules WHERE id = $1";
        sqlx::query(insert).bind(new).execute(&mut *transaction).await?;
    }
    transaction.commit().await
}

async fn pending(connection: &mut PgConnection, key: &str) -> Result<Option<uuid::Uuid>, sqlx::Error> {
    let row = sqlx::query("SELECT id FROM tidings.schedules WHERE kind = 'message' AND key = $1").bind(key);
    Ok(row.fetch_optional(connection).await?.map(|row| row.get(0)))
}

/// Holds a snapshot open for ever, as a backup or a report does, so that nothing can be vacuumed.
pub(crate) async fn read_for_ever(url: String) {
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
