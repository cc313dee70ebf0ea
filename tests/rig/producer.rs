//! A process that schedules rows in every way an application may: one or many, in long transactions, in transactions
//! that are rolled back, and with keys that are rescheduled and cancelled. Each transaction also writes its rows to the
//! ledger, and the process notes in a file which rows it was told are committed.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use sqlx::postgres::{PgConnection, PgPool};
use sqlx::{Connection as _, Executor as _, Row as _};
use uuid::Uuid;

use crate::addresses::Database;
use crate::random::Random;

/// What the transactions of a producer need.
struct Writer {
    database: Database,
    /// The ids of the rows whose commit was confirmed.
    confirmed: Mutex<File>,
}

/// Schedules about `rate` rows a second for `seconds`, and continues after every failure of the database.
pub(crate) async fn produce(
    url: &str,
    seed: u64,
    number: u64,
    (seconds, rate): (u64, u64),
    confirmed: &Path,
) -> anyhow::Result<()> {
    let file = OpenOptions::new().create(true).append(true).open(confirmed).context("the file of confirmed rows")?;
    let writer = Arc::new(Writer { database: Database::of(url)?, confirmed: Mutex::new(file) });
    let mut random = Random::new(seed ^ (number << 32));
    let begun = Instant::now();
    let (mut written, mut turn) = (0, 0_u64);
    // Transactions that stay open while the loop continues.
    let mut open = tokio::task::JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    while begun.elapsed() < Duration::from_secs(seconds) {
        pace.tick().await;
        while open.try_join_next().is_some() {}
        if writer.database.find_if_doubted().await.is_err() {
            continue;
        }
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
                let (writer, held_ms) = (Arc::clone(&writer), random.below(4_000));
                open.spawn(async move { writer.write_rows(rows, held_ms, true).await });
            }
            1 => writer.write_rows(rows, 0, false).await,
            2 => {
                let (keyed, action, wait_ms) = (Arc::clone(&writer), random.below(3), random.below(3_000));
                open.spawn(async move { keyed.write_keyed_row(&key, action, wait_ms).await });
                writer.write_rows(rows, 0, true).await;
            }
            _ => writer.write_rows(rows, 0, true).await,
        }
    }
    while open.join_next().await.is_some() {}
    Ok(())
}

impl Writer {
    /// Notes which rows a transaction has committed. One that failed wrote nothing, or was committed without the producer
    /// learning it. The ledger is right in either case.
    async fn note(&self, wait_ms: u64, transaction: impl Future<Output = Result<Vec<Uuid>, sqlx::Error>>) {
        let patience = Duration::from_millis(wait_ms) + self.database.patience();
        let Ok(Ok(ids)) = tokio::time::timeout(patience, transaction).await else { return self.database.doubt() };
        let mut file = self.confirmed.lock().expect("no holder of the lock panics");
        for id in ids {
            writeln!(file, "{id}").expect("the file of confirmed rows can be written");
        }
    }

    async fn write_rows(&self, rows: i64, held_ms: u64, commit: bool) {
        self.note(held_ms, write_rows(&self.database.pool(), rows, held_ms, commit)).await;
    }

    async fn write_keyed_row(&self, key: &str, action: u64, wait_ms: u64) {
        let pool = self.database.pool();
        self.note(0, insert_keyed_row(&pool, key)).await;
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        self.note(0, change_keyed_row(&pool, key, action)).await;
    }
}

/// Writes rows that are due within five seconds, a fifth of them with a deadline one to ten seconds later, and keeps
/// the transaction open for `held_ms`. Returns the ids of the rows that were committed.
async fn write_rows(pool: &PgPool, rows: i64, held_ms: u64, commit: bool) -> Result<Vec<Uuid>, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    let ids = sqlx::query_scalar(
        r#"WITH written AS (
               INSERT INTO tidings.schedules (kind, due_at, expires_at, payload)
               SELECT 'message', due_at, CASE WHEN random() < 0.2 THEN due_at + interval '1 s' + random() * interval '9 s' END,
                      '{"routing_key": "rig", "body": "rig"}'
               FROM (SELECT clock_timestamp() + random() * interval '5 s' AS due_at FROM generate_series(1, $1)) AS due
               RETURNING id, due_at, expires_at
           )
           INSERT INTO rig.scheduled SELECT id, due_at, expires_at FROM written RETURNING id"#,
    )
    .bind(rows)
    .fetch_all(&mut *transaction)
    .await?;
    tokio::time::sleep(Duration::from_millis(held_ms)).await;
    if commit {
        transaction.commit().await?;
        return Ok(ids);
    }
    transaction.rollback().await?;
    Ok(Vec::new())
}

/// Writes a row with a key.
async fn insert_keyed_row(pool: &PgPool, key: &str) -> Result<Vec<Uuid>, sqlx::Error> {
    let insert = sqlx::query_scalar(
        r#"WITH written AS (
               INSERT INTO tidings.schedules (kind, key, due_at, payload)
               VALUES ('message', $1, clock_timestamp() + interval '2 s', '{"routing_key": "rig", "body": "rig"}')
               RETURNING id, due_at
           )
           INSERT INTO rig.scheduled SELECT id, due_at FROM written RETURNING id"#,
    );
    insert.bind(key).fetch_all(pool).await
}

/// Leaves a row with a key, which may already be delivered (`action` 0), cancels it (1) or reschedules it.
async fn change_keyed_row(pool: &PgPool, key: &str, action: u64) -> Result<Vec<Uuid>, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    let Some(old) = find_pending_id(&mut transaction, key).await? else { return Ok(Vec::new()) };
    let statement = match action {
        0 => return Ok(Vec::new()),
        1 => "SELECT tidings.cancel('message', $1)",
        _ => "SELECT tidings.reschedule('message', $1, clock_timestamp() + interval '1 s')",
    };
    if !sqlx::query_scalar::<_, bool>(statement).bind(key).fetch_one(&mut *transaction).await? {
        return Ok(Vec::new());
    }
    sqlx::query("INSERT INTO rig.cancelled VALUES ($1)").bind(old).execute(&mut *transaction).await?;
    let new = find_pending_id(&mut transaction, key).await?;
    if let Some(new) = new {
        let insert = "INSERT INTO rig.scheduled SELECT id, due_at FROM tidings.schedules WHERE id = $1";
        sqlx::query(insert).bind(new).execute(&mut *transaction).await?;
    }
    transaction.commit().await?;
    Ok(new.into_iter().collect())
}

async fn find_pending_id(connection: &mut PgConnection, key: &str) -> Result<Option<Uuid>, sqlx::Error> {
    let row = sqlx::query("SELECT id FROM tidings.schedules WHERE kind = 'message' AND key = $1").bind(key);
    Ok(row.fetch_optional(connection).await?.map(|row| row.get(0)))
}

/// How many rows the producers were told are committed, and those of them that the ledger lacks.
pub(crate) async fn judge(db: &PgPool, files: &[PathBuf]) -> anyhow::Result<(usize, Vec<Uuid>)> {
    let mut confirmed: Vec<Uuid> = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
        for line in text.lines() {
            confirmed.push(line.parse().with_context(|| format!("{}: {line}", file.display()))?);
        }
    }
    let written: Vec<Uuid> = sqlx::query_scalar("SELECT id FROM rig.scheduled").fetch_all(db).await?;
    let written: HashSet<Uuid> = written.into_iter().collect();
    let lost = confirmed.iter().filter(|id| !written.contains(id)).copied().collect();
    Ok((confirmed.len(), lost))
}

/// Keeps a snapshot open for ever, as a backup or a report does, so that PostgreSQL cannot remove dead rows.
pub(crate) async fn hold_snapshot(url: String) -> anyhow::Result<()> {
    let database = Database::of(&url)?;
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    loop {
        pace.tick().await;
        let _ = async {
            database.find_if_doubted().await?;
            let mut connection = PgConnection::connect_with(&database.pool().connect_options()).await?;
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
            connection.execute("SELECT count(*) FROM tidings.deliveries").await?;
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                connection.execute("SELECT 1").await?;
            }
            #[expect(unreachable_code, reason = "gives the block its type")]
            Ok::<(), anyhow::Error>(())
        }
        .await;
        database.doubt();
    }
}
