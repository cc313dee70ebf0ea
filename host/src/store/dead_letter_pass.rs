//! The right to work on the dead letters of an exchange. Of all daemons and commands only one has it at a time, and a
//! pass begins only if the last one, of any daemon, is long enough ago.
//!
//! The right is an advisory lock on a session of its own. A daemon that dies or loses the database thereby releases it,
//! and a daemon that has lost its session finds out when it next reads the clock ([`Pass::clock`]).

use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use crate::model::clock::DatabaseClock;
use crate::store::connection::Backend;
use crate::store::{Store, StoreError};

/// The right to work on the dead letters, for as long as its session lives.
#[derive(Debug)]
pub struct Pass {
    session: PgConnection,
    /// Which session of the server it is, if our role may see sessions.
    backend: Option<Backend>,
    store: Store,
    /// Keeps the rest of this process out.
    _permit: OwnedSemaphorePermit,
}

/// How long to wait for another pass of this process: as long as `lock_timeout` lets our sessions wait for one of
/// another process.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// How long giving up the right may take. On a dead link it takes so long, and a daemon that stops waits for it.
const END_DEADLINE: Duration = Duration::from_secs(2);

/// The outcome of trying to begin a pass.
#[derive(Debug)]
pub enum Begun<T> {
    /// It has begun, with what the caller needs for it.
    Pass(T),
    /// The last pass is too recent. One may begin after this time.
    NotYet(Duration),
    /// Another daemon or command has the right.
    Elsewhere,
}

impl Store {
    /// Gets the right to work on the dead letters of `exchange`; `None` = another daemon or command kept it for 5 s,
    /// the `lock_timeout` of our sessions. Most passes are shorter.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn wait_for_dead_letters(&self, exchange: &str) -> Result<Option<Pass>, StoreError> {
        let permit = tokio::time::timeout(LOCK_TIMEOUT, Arc::clone(&self.extra_session).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Ok(None) };
        let (mut session, backend) = self.connect_with_backend().await?;
        let locked = self
            .run_beside(backend.as_ref(), "lock the dead letters", async {
                sqlx::query_scalar!(
                    r#"SELECT count(pg_advisory_lock(hashtextextended('tidings.dead ' || $1, 0))) AS "locked!""#,
                    exchange
                )
                .fetch_one(&mut session)
                .await
            })
            .await;
        match locked {
            Ok(_) => Ok(Some(Pass { session, backend, store: self.clone(), _permit: permit })),
            // lock_not_available: the lock_timeout is over.
            Err(StoreError::Statement { source: sqlx::Error::Database(error), .. })
                if error.code().as_deref() == Some("55P03") =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Gets the same right without waiting; `None` = another daemon or command has it.
    async fn try_lock_dead_letters(&self, exchange: &str) -> Result<Option<Pass>, StoreError> {
        let Ok(permit) = Arc::clone(&self.extra_session).try_acquire_owned() else { return Ok(None) };
        let (mut session, backend) = self.connect_with_backend().await?;
        let locked = self
            .run_beside(backend.as_ref(), "lock the dead letters", async {
                sqlx::query_scalar!(
                    r#"SELECT pg_try_advisory_lock(hashtextextended('tidings.dead ' || $1, 0)) AS "locked!""#,
                    exchange
                )
                .fetch_one(&mut session)
                .await
            })
            .await?;
        Ok(locked.then_some(Pass { session, backend, store: self.clone(), _permit: permit }))
    }

    /// Begins a pass over the dead letters of `exchange`, unless one began within `gap`, and records when it began.
    /// What a person does by hand is not recorded as a pass.
    ///
    /// # Errors
    ///
    /// When the database does not answer.
    pub async fn begin_pass(&self, exchange: &str, gap: Duration) -> Result<Begun<Pass>, StoreError> {
        let Some(mut pass) = self.try_lock_dead_letters(exchange).await? else { return Ok(Begun::Elsewhere) };
        let left = self
            .run_beside(pass.backend.as_ref(), "record that a pass begins", async {
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
    /// Reads the database clock. An answer also shows that the session lives, so the lock is still ours.
    ///
    /// # Errors
    ///
    /// When the session is gone, and with it the right to go on.
    pub async fn clock(&mut self) -> Result<DatabaseClock, StoreError> {
        let asked_at = Instant::now();
        let now = self
            .store
            .run_beside(self.backend.as_ref(), "read the clock", async {
                sqlx::query_scalar!(r#"SELECT clock_timestamp() AS "now!""#).fetch_one(&mut self.session).await
            })
            .await?;
        Ok(DatabaseClock::new(now, asked_at))
    }

    /// Gives up the right.
    pub async fn end(mut self) {
        let _ = tokio::time::timeout(END_DEADLINE, async {
            // The server ends a session some time after we have closed the connection. Without this, the next to ask
            // for the lock could find it taken still.
            let _ = sqlx::query("SELECT pg_advisory_unlock_all()").execute(&mut self.session).await;
            sqlx::Connection::close(self.session).await
        })
        .await;
    }
}
