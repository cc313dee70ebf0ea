//! Passes over the dead letters: one at a time, and not too often, whoever makes them.
//!
//! The lock belongs to a session of its own, so a daemon that dies or loses the database gives it up by that, and notices
//! it at its next question.

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::model::clock::DatabaseClock;
use crate::store::{STATEMENT_DEADLINE, Store, StoreError};

/// The right to make a pass, as long as the session lives.
#[derive(Debug)]
pub struct Pass {
    session: PgConnection,
    /// In this process.
    _alone: OwnedSemaphorePermit,
}

/// As `lock_timeout` of our sessions.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether a pass may begin.
#[derive(Debug)]
pub enum Begun<T> {
    /// It has begun, and this is what it takes.
    Pass(T),
    /// The last one is too recent; this long until it is time.
    NotYet(Duration),
    /// Another daemon is making one.
    Elsewhere,
}

impl Store {
    /// The right to touch the dead letters of `exchange`, unless somebody else keeps it for 5 s, which is the `lock_timeout`
    /// of our sessions: most passes are shorter.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn wait_for_dead_letters(&self, exchange: &str) -> Result<Option<Pass>, StoreError> {
        let alone = tokio::time::timeout(LOCK_TIMEOUT, Arc::clone(&self.beside).acquire_owned()).await;
        let Ok(Ok(alone)) = alone else { return Ok(None) };
        let mut session = self.connect().await?;
        let locked = ask("lock the dead letters", async {
            sqlx::query_scalar!(
                r#"SELECT count(pg_advisory_lock(hashtextextended('tidings.dead ' || $1, 0))) AS "locked!""#,
                exchange
            )
            .fetch_one(&mut session)
            .await
        })
        .await;
        match locked {
            Ok(_) => Ok(Some(Pass { session, _alone: alone })),
            Err(StoreError::Statement { source: sqlx::Error::Database(error), .. })
                if error.code().as_deref() == Some("55P03") =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The right to touch the dead letters of `exchange`, unless somebody else has it.
    async fn lock_dead_letters(&self, exchange: &str) -> Result<Option<Pass>, StoreError> {
        let Ok(alone) = Arc::clone(&self.beside).try_acquire_owned() else { return Ok(None) };
        let mut session = self.connect().await?;
        let locked = ask("lock the dead letters", async {
            sqlx::query_scalar!(
                r#"SELECT pg_try_advisory_lock(hashtextextended('tidings.dead ' || $1, 0)) AS "locked!""#,
                exchange
            )
            .fetch_one(&mut session)
            .await
        })
        .await?;
        Ok(locked.then_some(Pass { session, _alone: alone }))
    }

    /// Begins a pass over the dead letters of `exchange`, unless one began within `gap`. What a person does by hand is
    /// not noted as one.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn begin_pass(&self, exchange: &str, gap: Duration) -> Result<Begun<Pass>, StoreError> {
        let Some(mut pass) = self.lock_dead_letters(exchange).await? else { return Ok(Begun::Elsewhere) };
        let left = ask("note that a pass begins", async {
            sqlx::query_scalar!(
                r#"
                WITH last AS (
                    SELECT began_at + $2 * interval '1 second' - clock_timestamp() AS left
                    FROM tidings.passes
                    WHERE exchange = $1
                ), begun AS (
                    INSERT INTO tidings.passes (exchange, began_at)
                    SELECT $1, clock_timestamp()
                    WHERE NOT EXISTS (SELECT FROM last WHERE last.left > interval '0')
                    ON CONFLICT (exchange) DO UPDATE SET began_at = excluded.began_at
                )
                SELECT coalesce((SELECT extract(epoch FROM last.left)::float8 FROM last), 0) AS "left!"
                "#,
                exchange,
                gap.as_secs_f64(),
            )
            .fetch_one(&mut pass.session)
            .await
        })
        .await?;
        if left > 0.0 {
            pass.end().await;
            return Ok(Begun::NotYet(Duration::from_secs_f64(left)));
        }
        Ok(Begun::Pass(pass))
    }
}

impl Pass {
    /// The database clock. That it can be asked says that the lock is still ours.
    ///
    /// # Errors
    ///
    /// When the session is gone, and with it the right to go on.
    pub async fn clock(&mut self) -> Result<DatabaseClock, StoreError> {
        let asked_at = Instant::now();
        let now = ask("tell the time", async {
            sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(&mut self.session).await
        })
        .await?;
        Ok(DatabaseClock::new(now, asked_at))
    }

    /// Gives up the right.
    pub async fn end(mut self) {
        let _ = tokio::time::timeout(STATEMENT_DEADLINE, async {
            // The server ends a session some time after we have hung up: whoever asks next must not find it locked.
            let _ = sqlx::query("SELECT pg_advisory_unlock_all()").execute(&mut self.session).await;
            sqlx::Connection::close(self.session).await
        })
        .await;
    }
}

/// Does `work` on a connection that is not of the pool, which is not used again after an error.
pub(super) async fn ask<T>(
    doing: &'static str,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(STATEMENT_DEADLINE, work).await {
        Ok(answer) => answer.map_err(|source| StoreError::Statement { doing, source }),
        Err(_) => Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE }),
    }
}
