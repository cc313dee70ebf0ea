//! Connections to PostgreSQL: those of the pool, for statements, and single sessions beside it.
//!
//! Must never run a statement without a name and a deadline, use a connection again whose statement failed or did not
//! end, or use one that was open when another broke.
//!
//! **Doubt.** After a restart or on a dead link, every connection of the pool is as broken as the one that fails first.
//! When one breaks, the store records that moment, and uses no connection that was open then. So recovery costs one
//! failure rather than one for each connection, and lanes that fail together count as one failure.
//!
//! **Silence.** When a statement takes long, `liveness.rs` asks the server on a new session whether it works on it. Without that, a
//! dead link looks like a slow server until the statement's deadline.
//!
//! **Several servers.** The URL may name a primary and its standbys (`hosts.rs`). Each session is opened on the one that takes
//! writes (`login.rs`).
//!
//! **A server that is full.** While the server refuses further sessions, the pool goes on with those that it has. A
//! session beside the pool (of the listener, a pass, a check) makes the pool give one up.

mod doubt;
mod hosts;
mod liveness;
mod login;
pub(super) mod pool;
pub(super) mod server_check;
pub(super) mod session_settings;

use std::time::Duration;

use tokio::time::{timeout, timeout_at};

use crate::model::backoff::CONNECT;
use crate::model::error_chain::error_chain;
use crate::store::{CONNECT_DEADLINE, STATEMENT_DEADLINE, Store, StoreError};
pub(super) use doubt::Doubt;
pub(super) use hosts::Hosts;
pub(super) use liveness::Backend;
pub(super) use login::{STANDBY, Servers, introduce};
use pool::{Session, SessionPermit};

/// The shortest pause before a server that refused a connection for its limit is asked again: for a moment it still
/// counts a session that has just been closed.
const MIN_PAUSE_WHEN_FULL: Duration = Duration::from_millis(100);

impl Store {
    /// Records that a connection broke. No connection of the pool that was open at that moment is used again.
    pub fn doubt(&self) {
        self.doubt.raise();
    }

    /// Identifies the last doubt: the number stays the same until the next connection breaks.
    #[must_use]
    pub fn last_doubt(&self) -> u64 {
        self.doubt.last_ms()
    }

    /// How many connections claims may hold, so that one is left for everything else: at least 1.
    #[must_use]
    pub fn connections_for_claims(&self) -> usize {
        self.pool.sessions_for_claims()
    }

    /// Why no connection could be opened at the last attempt; `None` = one could.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.pool.last_error()
    }

    /// The server's refusal, if it grants us fewer connections than a daemon needs.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        self.pool.shortage()
    }

    /// Borrows a connection of the pool.
    pub(super) async fn connection(&self) -> Result<Connection, StoreError> {
        self.borrow_connection(false).await
    }

    /// Borrows a connection, if it is to be `warm` one on which the statements of looks and claims are prepared. If there is
    /// none, the caller prepares them.
    pub(super) async fn borrow_connection(&self, warm: bool) -> Result<Connection, StoreError> {
        if self.pool.is_time_to_grow()
            && let Ok(Ok(opened)) = tokio::time::timeout(CONNECT_DEADLINE, self.log_in()).await
        {
            self.pool.grow(Session::new(opened));
        }
        let deadline = tokio::time::Instant::now() + CONNECT_DEADLINE;
        let mut refusal = None;
        loop {
            let Ok(permit) = timeout_at(deadline, self.pool.acquire()).await else {
                let late = StoreError::Deadline { doing: "give us a connection", after: CONNECT_DEADLINE };
                return Err(refusal.unwrap_or(late));
            };
            let session = match permit.take_idle(warm, &self.doubt).await {
                Some(session) => session,
                None => match self.open(deadline, true).await {
                    Ok(opened) => Session::new(opened),
                    Err(error @ StoreError::Full { .. }) if tokio::time::Instant::now() < deadline => {
                        // Wait for a session that is in use to come back.
                        refusal = Some(error);
                        continue;
                    }
                    Err(error) => return Err(error),
                },
            };
            return Ok(Connection {
                session: Some(session),
                permit: Some(permit),
                must_close: false,
                store: self.clone(),
            });
        }
    }

    /// Opens a session outside the pool.
    pub(super) async fn connect(&self) -> Result<sqlx::PgConnection, StoreError> {
        self.connect_with_backend().await.map(|(connection, _)| connection)
    }

    /// Opens a session outside the pool, and tells which session of the server it is.
    pub(super) async fn connect_with_backend(&self) -> Result<(sqlx::PgConnection, Option<Backend>), StoreError> {
        self.open(tokio::time::Instant::now() + CONNECT_DEADLINE, false).await
    }

    /// As [`run_bounded`], and gives up as well when the server is not working on the statement.
    pub(super) async fn run_beside<T>(
        &self,
        backend: Option<&Backend>,
        doing: &'static str,
        work: impl Future<Output = Result<T, sqlx::Error>>,
    ) -> Result<T, StoreError> {
        tokio::select! {
            biased;
            done = run_bounded(doing, work) => done,
            () = self.until_lost(backend, doing) => Err(StoreError::Lost { doing, place: self.place() }),
        }
    }

    /// Opens a session. While the server is full, it is asked again until `deadline`. With `for_pool` it is also asked
    /// again while it starts; and if it is full and the pool has other sessions, the error is returned instead.
    async fn open(
        &self,
        deadline: tokio::time::Instant,
        for_pool: bool,
    ) -> Result<(sqlx::PgConnection, Option<Backend>), StoreError> {
        let mut failures = 0;
        loop {
            let failure = match timeout_at(deadline, self.log_in()).await {
                Ok(Ok(opened)) => {
                    self.pool.set_last_error(None);
                    return Ok(opened);
                }
                Ok(Err(failure)) => failure,
                Err(_) => return Err(StoreError::Deadline { doing: "accept a connection", after: CONNECT_DEADLINE }),
            };
            let is_full = failure.is_full();
            let can_retry = is_full || for_pool && failure.is_temporary();
            let error = self.explain_login_failure(failure);
            let why = error_chain(&error);
            let pause =
                if is_full { MIN_PAUSE_WHEN_FULL.max(CONNECT.delay(failures)) } else { CONNECT.delay(failures) };
            // Not at the first failure: the server may still count sessions that have just been closed. A session
            // outside the pool takes the place of one of the pool.
            let must_shrink = is_full && (failures == 1 || (for_pool && failures > 1));
            // While a pass has its session, none is kept free for it.
            let is_extra_in_use = for_pool && self.extra_session.available_permits() == 0;
            if must_shrink && self.pool.shrink(&why, for_pool, usize::from(!is_extra_in_use)) && for_pool {
                return Err(error);
            }
            self.pool.set_last_error(Some(why));
            if !can_retry || tokio::time::Instant::now() + pause > deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            failures += 1;
        }
    }
}

/// A borrowed connection of the pool. Dropping it gives it back or, if it must not be used again, closes it.
#[derive(Debug)]
pub(super) struct Connection {
    /// `None` only while dropping.
    session: Option<Session>,
    /// `None` only while dropping.
    permit: Option<SessionPermit>,
    /// It must not go back to the pool: a statement has failed, or has begun and not ended.
    must_close: bool,
    store: Store,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let (Some(session), Some(permit)) = (self.session.take(), self.permit.take()) else { return };
        if self.must_close {
            session.close_in_background();
            permit.give_back(None);
        } else {
            permit.give_back(Some(session));
        }
    }
}

impl Connection {
    /// Runs one statement; `doing` says in the error what it is for. Not cancel-safe: a connection whose statement was
    /// cancelled must be dropped by [`Connection::discard`].
    pub(super) async fn run<T>(
        &mut self,
        doing: &'static str,
        statement: impl AsyncFnOnce(&mut sqlx::PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        let Session { connection, backend, .. } = self.session.as_mut().expect("taken only by drop");
        let must_close = std::mem::replace(&mut self.must_close, true);
        let ended = tokio::select! {
            biased;
            ended = timeout(STATEMENT_DEADLINE, statement(connection)) => ended,
            () = self.store.until_lost(backend.as_ref(), doing) => {
                self.store.doubt.raise();
                return Err(StoreError::Lost { doing, place: self.store.place() });
            }
        };
        match ended {
            Ok(Ok(answer)) => {
                self.must_close = must_close;
                Ok(answer)
            }
            Ok(Err(source)) => {
                let code = source.as_database_error().and_then(sqlx::error::DatabaseError::code);
                // read_only_sql_transaction: our statements take writes for granted.
                let (is_forbidden, is_read_only) = (code.as_deref() == Some("42501"), code.as_deref() == Some("25006"));
                if is_broken(&source) || is_read_only {
                    self.store.doubt.raise();
                }
                Err(if is_forbidden {
                    StoreError::Rights { doing, source }
                } else if is_read_only {
                    StoreError::ReadOnly { place: self.store.place(), source }
                } else {
                    StoreError::Statement { doing, source }
                })
            }
            Err(_) => {
                self.store.doubt.raise();
                Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE })
            }
        }
    }

    /// Whether the statements of looks and claims are prepared on it.
    pub(super) fn is_warm(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.warm)
    }

    /// Notes that they are.
    pub(super) fn set_warm(&mut self) {
        self.session.iter_mut().for_each(|session| session.warm = true);
    }

    /// Makes the drop close the connection instead of giving it back. The server then rolls back an open transaction.
    pub(super) fn discard(&mut self) {
        self.must_close = true;
    }
}

/// Whether the server's limit of connections, or our role's, is reached: `too_many_connections`.
pub(super) fn is_too_many_connections(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.code().as_deref() == Some("53300"))
}

/// Whether connecting may succeed in a moment: the server is starting, or is full just now.
fn is_temporary(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        sqlx::Error::Database(error) => error.is_transient_in_connect_phase(),
        _ => false,
    }
}

/// Whether the connection is lost, rather than the statement refused.
fn is_broken(error: &sqlx::Error) -> bool {
    match error.as_database_error() {
        // Class 57P: the server shuts down, has crashed, or was told to end the session.
        Some(error) => error.code().is_some_and(|code| code.starts_with("57P")),
        None => true,
    }
}

/// Runs `work` on a connection outside the pool, with the deadline of a statement. The caller must not use the
/// connection again after an error.
pub(super) async fn run_bounded<T>(
    doing: &'static str,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(STATEMENT_DEADLINE, work).await {
        Ok(answer) => answer.map_err(|source| StoreError::Statement { doing, source }),
        Err(_) => Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE }),
    }
}
