//! The connections of the pool: every statement has a name and a deadline, and after a doubt about one connection none
//! that is as old is used again.

mod doubt;
pub(super) mod pool;
pub(super) mod server_check;

use std::time::Duration;

use sqlx::ConnectOptions as _;
use tokio::time::timeout_at;

use crate::model::backoff::CONNECT;
use crate::model::error_chain::error_chain;
use crate::store::{CONNECT_DEADLINE, STATEMENT_DEADLINE, Store, StoreError};
pub(super) use doubt::Doubt;
use pool::{LentSession, Session};

/// The server may count a session that has just been closed for a moment still.
const MOMENT: Duration = Duration::from_millis(100);

impl Store {
    /// Some connection of ours has broken: none of the pool that was open then is used again.
    pub fn doubt(&self) {
        self.doubt.raise();
    }

    /// RowRef doubt was the last; equal as long as there was none since.
    #[must_use]
    pub fn last_doubt(&self) -> u64 {
        self.doubt.last()
    }

    /// How many connections claims may keep, so that one is left for everything else: at least 1.
    #[must_use]
    pub fn connections_for_claims(&self) -> usize {
        self.pool.for_claims()
    }

    /// Why the database gave us no connection when it was last asked for one, in its own words.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.pool.trouble()
    }

    /// What the database says, if it gives us fewer connections than a daemon needs.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        self.pool.shortage()
    }

    /// A connection of the pool.
    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
        self.connection_of_pool(false).await
    }

    /// A connection for looks and claims: the one that was used last, and so is warm.
    pub(super) async fn hot_connection(&self) -> Result<Connection, StoreError> {
        self.connection_of_pool(true).await
    }

    async fn connection_of_pool(&self, warm: bool) -> Result<Connection, StoreError> {
        if self.pool.may_ask_for_more()
            && let Ok(Ok(connection)) = tokio::time::timeout(CONNECT_DEADLINE, self.options.connect()).await
        {
            self.pool.grow(Session::new(connection));
        }
        let deadline = tokio::time::Instant::now() + CONNECT_DEADLINE;
        let mut full = None;
        loop {
            let Ok(lent) = timeout_at(deadline, self.pool.lend()).await else {
                let late = StoreError::Deadline { doing: "give us a connection", after: CONNECT_DEADLINE };
                return Err(full.unwrap_or(late));
            };
            let session = match lent.take(warm, &self.doubt).await {
                Some(session) => session,
                None => match self.open(deadline, true).await {
                    Ok(connection) => Session::new(connection),
                    Err(error @ StoreError::Full { .. }) if tokio::time::Instant::now() < deadline => {
                        // Another comes back.
                        full = Some(error);
                        continue;
                    }
                    Err(error) => return Err(error),
                },
            };
            return Ok(Connection {
                session: Some(session),
                lent: Some(lent),
                warm,
                spoilt: false,
                doubt: self.doubt.clone(),
            });
        }
    }

    /// Opens a session that is not of the pool.
    pub(super) async fn connect(&self) -> Result<sqlx::PgConnection, StoreError> {
        self.open(tokio::time::Instant::now() + CONNECT_DEADLINE, false).await
    }

    /// Opens a session. While the server starts, or has none for us, it is asked again until `deadline`; `for_pool`, only if
    /// the pool has no other.
    async fn open(&self, deadline: tokio::time::Instant, for_pool: bool) -> Result<sqlx::PgConnection, StoreError> {
        let mut failures = 0;
        loop {
            let source = match timeout_at(deadline, self.options.connect()).await {
                Ok(Ok(connection)) => {
                    self.pool.note(None);
                    return Ok(connection);
                }
                Ok(Err(source)) => source,
                Err(_) => return Err(StoreError::Deadline { doing: "accept a connection", after: CONNECT_DEADLINE }),
            };
            let full = is_full(&source);
            let again = full || for_pool && is_temporary(&source);
            let error = self.connect_error(source);
            let why = error_chain(&error);
            let pause = if full { MOMENT.max(CONNECT.delay(failures)) } else { CONNECT.delay(failures) };
            // Those that have just been closed are counted for a moment. For a session that is not of the pool, one of the
            // pool makes room.
            let shrinks = full && (failures == 1 || (for_pool && failures > 1));
            // While a pass has its session, none is kept free for it.
            let has_beside = for_pool && self.beside.available_permits() == 0;
            if shrinks && self.pool.shrink(&why, for_pool, usize::from(!has_beside)) && for_pool {
                return Err(error);
            }
            self.pool.note(Some(why));
            if !again || tokio::time::Instant::now() + pause > deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            failures += 1;
        }
    }
}

/// A connection of the pool.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` only while dropping.
    session: Option<Session>,
    /// `None` only while dropping.
    lent: Option<LentSession>,
    /// For looks and claims.
    warm: bool,
    /// Nobody may use it after us: a statement has begun and not ended, or failed.
    spoilt: bool,
    doubt: Doubt,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let (Some(mut session), Some(lent)) = (self.session.take(), self.lent.take()) else { return };
        session.warm |= self.warm;
        if self.spoilt {
            session.close_soon();
            lent.give_back(None);
        } else {
            lent.give_back(Some(session));
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
        let session = self.session.as_mut().expect("taken only by drop");
        let spoilt = std::mem::replace(&mut self.spoilt, true);
        match tokio::time::timeout(STATEMENT_DEADLINE, statement(&mut session.connection)).await {
            Ok(Ok(answer)) => {
                self.spoilt = spoilt;
                Ok(answer)
            }
            Ok(Err(source)) => {
                if is_broken(&source) {
                    self.doubt.raise();
                }
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
                Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE })
            }
        }
    }

    /// Closes the connection instead of giving it back: the server rolls back whatever was open.
    pub(super) fn discard(&mut self) {
        self.spoilt = true;
    }
}

/// Whether the server has no connection for us: `too_many_connections`.
pub(super) fn is_full(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("53300"))
}

/// Whether the same may succeed in a moment: the server starts, or has no connection for us now.
fn is_temporary(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        sqlx::Error::Database(error) => error.is_transient_in_connect_phase(),
        _ => false,
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
