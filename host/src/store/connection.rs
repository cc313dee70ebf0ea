//! The connections of the pool: every statement has a name and a deadline, and after a doubt about one connection none
//! that is as old is used again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions, Postgres};

use super::{CONNECT_DEADLINE, STATEMENT_DEADLINE, Store, StoreError};

/// A session takes more memory the longer it lives; the pool ends its own after as long.
const LIFETIME: Duration = Duration::from_mins(30);

/// When a connection last broke. The others were broken by the same event as often as not (a restart, a failover, a dead
/// link), and to find out one by one would cost a failure and a longer pause each.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    began: Instant,
    /// In ms since `began`; 0 = never.
    at_ms: Arc<AtomicU64>,
}

impl Doubt {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), at_ms: Arc::new(AtomicU64::new(0)) }
    }

    /// A connection has just broken.
    pub(super) fn raise(&self) {
        self.at_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Whether no connection has broken since one of this age was opened.
    fn spares(&self, age: Duration) -> bool {
        spares(self.last(), self.now_ms(), age)
    }

    /// Which was the last; equal as long as there was none since.
    pub(super) fn last(&self) -> u64 {
        self.at_ms.load(Ordering::Relaxed)
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

fn spares(doubted_ms: u64, now_ms: u64, age: Duration) -> bool {
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    doubted_ms == 0 || now_ms.saturating_sub(age_ms) > doubted_ms
}

/// A pool that connects when it is first used.
pub(super) fn pool(options: PgConnectOptions, connections: u32, doubt: Doubt) -> PgPool {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(CONNECT_DEADLINE)
        // A dead connection is found by its next statement, which is as good as a round trip before each.
        .test_before_acquire(false)
        .before_acquire(move |_, metadata| {
            let spared = doubt.spares(metadata.age);
            Box::pin(async move { Ok(spared) })
        })
        .connect_lazy_with(options)
}

impl Store {
    /// Some connection of ours has broken: none of the pool that was open then is used again.
    pub fn doubt(&self) {
        self.doubt.raise();
    }

    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
        match self.pool.acquire().await {
            Ok(pooled) => Ok(self.use_it(pooled, Instant::now(), None)),
            // The pool tries for a while, and then forgets why it failed.
            Err(sqlx::Error::PoolTimedOut) => match self.connect().await {
                Err(error) => Err(error),
                Ok(_) => Err(StoreError::Deadline { doing: "accept a connection", after: CONNECT_DEADLINE }),
            },
            Err(source) => Err(self.connect_error(source)),
        }
    }

    /// A connection for looks and claims: the one that was used last, and so is warm.
    pub(super) async fn hot_connection(&self) -> Result<Connection, StoreError> {
        while let Some((pooled, since)) = self.hot.take() {
            if self.doubt.spares(since.elapsed()) && since.elapsed() < LIFETIME {
                return Ok(self.use_it(pooled, since, Some(Arc::clone(&self.hot))));
            }
        }
        let mut connection = self.connection().await?;
        connection.home = Some(Arc::clone(&self.hot));
        Ok(connection)
    }

    fn use_it(&self, pooled: PoolConnection<Postgres>, since: Instant, home: Option<Arc<Hot>>) -> Connection {
        Connection { pooled: Some(pooled), since, at_work: false, home, doubt: self.doubt.clone() }
    }
}

/// Connections that do not go back to the pool: it would ask each for a sign of life, and hand out the one that has been
/// idle for longest, so that every one has to learn every statement.
#[derive(Debug, Default)]
pub(super) struct Hot(Mutex<Vec<(PoolConnection<Postgres>, Instant)>>);

impl Hot {
    fn take(&self) -> Option<(PoolConnection<Postgres>, Instant)> {
        self.0.lock().expect("nobody panics with it").pop()
    }

    fn give(&self, pooled: PoolConnection<Postgres>, since: Instant) {
        self.0.lock().expect("nobody panics with it").push((pooled, since));
    }
}

/// A connection of the pool.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` only while dropping.
    pooled: Option<PoolConnection<Postgres>>,
    /// When the pool gave it.
    since: Instant,
    /// A statement has begun and not ended.
    at_work: bool,
    /// Where it goes rather than into the pool.
    home: Option<Arc<Hot>>,
    doubt: Doubt,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The pool cleans up after a statement that was cancelled.
        if let (Some(pooled), Some(home), false) = (self.pooled.take(), self.home.take(), self.at_work) {
            home.give(pooled, self.since);
        }
    }
}

impl Connection {
    /// Runs one statement. Not cancel-safe: a connection whose statement was cancelled must be dropped by
    /// [`Connection::discard`].
    pub(super) async fn run<T>(
        &mut self,
        doing: &'static str,
        statement: impl AsyncFnOnce(&mut sqlx::PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let pooled = self.pooled.as_mut().expect("taken only by drop");
        self.at_work = true;
        let answered = tokio::time::timeout(STATEMENT_DEADLINE, statement(pooled)).await;
        self.at_work = false;
        match answered {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => {
                if is_broken(&source) {
                    self.doubt.raise();
                }
                self.discard();
                let is_forbidden =
                    source.as_database_error().is_some_and(|error| error.code().as_deref() == Some("42501"));
                Err(if is_forbidden {
                    StoreError::Rights { doing, source }
                } else {
                    StoreError::Statement { doing, source }
                })
            }
            Err(_) => {
                self.doubt.raise();
                self.discard();
                Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE })
            }
        }
    }

    /// Closes the connection instead of giving it back: the server rolls back whatever was open.
    pub(super) fn discard(&mut self) {
        self.home = None;
        if let Some(pooled) = &mut self.pooled {
            pooled.close_on_drop();
        }
    }
}

/// Whether the connection is lost, rather than a statement refused.
fn is_broken(error: &sqlx::Error) -> bool {
    match error.as_database_error() {
        // The server shuts down, has crashed, or was told to end the session.
        Some(error) => error.code().is_some_and(|code| code.starts_with("57P")),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_doubt_only_younger_connections_are_used() {
        let old = Duration::from_secs(10);
        assert!(spares(0, 60_000, old), "nothing has happened");
        assert!(!spares(55_000, 60_000, old), "it was open when another broke");
        assert!(!spares(50_000, 60_000, old), "it may have been");
        assert!(spares(49_999, 60_000, old), "it was opened after that");
    }
}
