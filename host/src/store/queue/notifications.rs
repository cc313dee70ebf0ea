//! The session of the listener: it receives the triggers' notifications, announces the kinds that this daemon serves, and
//! promises to poll.
//!
//! Must never be shared: what it announces lasts exactly as long as the session. After an error, drop it and open another.

use std::time::Duration;

use sqlx::postgres::PgListener;
use tokio::time::timeout;
use uuid::Uuid;

use crate::store::queue::{kinds, look};
use crate::store::{Store, StoreError, installation};

/// The channel that the triggers notify (`migrations/0003_triggers.sql`).
const CHANNEL: &str = "tidings";
/// How long connecting or a statement may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// A session for notifications.
#[derive(Debug)]
pub(crate) struct NotificationSession(PgListener);

impl Store {
    /// Opens a session for notifications. It does not listen yet.
    ///
    /// # Errors
    ///
    /// When none can be opened.
    pub(crate) async fn open_notification_session(&self) -> Result<NotificationSession, StoreError> {
        Ok(NotificationSession(self.listener(DEADLINE).await?))
    }
}

impl NotificationSession {
    /// Listens from now on. What was notified before is not received.
    ///
    /// # Errors
    ///
    /// When the database does not do it, as for all functions here.
    pub(crate) async fn listen(&mut self) -> Result<(), StoreError> {
        within("listen for notifications", self.0.listen(CHANNEL)).await
    }

    /// Announces `kinds` for as long as the session lives.
    pub(crate) async fn announce(&mut self, kinds: &[String]) -> Result<(), StoreError> {
        within("announce the kinds that this daemon serves", kinds::announce(&mut self.0, kinds)).await
    }

    /// Announces this daemon for as long as the session lives, so that others of its database know it.
    pub(crate) async fn announce_daemon(&mut self, daemon: Uuid) -> Result<(), StoreError> {
        within("announce this daemon", installation::announce_daemon(&mut self.0, daemon)).await
    }

    /// Withdraws the announcement of `kinds`. Their rows are held unless another daemon serves them.
    pub(crate) async fn withdraw(&mut self, kinds: &[String]) -> Result<(), StoreError> {
        within("withdraw the kinds that are no longer served", kinds::withdraw(&mut self.0, kinds)).await
    }

    /// Promises that all daemons poll for a second, so that the triggers need not notify.
    pub(crate) async fn promise_to_poll(&mut self) -> Result<(), StoreError> {
        within("promise to poll", look::promise_to_poll(&mut self.0)).await
    }

    /// Whether the server still answers: a half-open connection is silent for ever.
    pub(crate) async fn test(&mut self) -> Result<(), StoreError> {
        let test = async { sqlx::query("SELECT 1").execute(&mut self.0).await.map(drop) };
        within("test the connection for notifications", test).await
    }

    /// Waits for notifications, and returns how many arrived. Cancel-safe: bytes that were read stay in the session's buffer.
    pub(crate) async fn receive(&mut self) -> Result<usize, StoreError> {
        let received = self.0.try_recv().await;
        // sqlx says None when the connection is gone.
        let received =
            received.and_then(|first| first.ok_or(std::io::Error::from(std::io::ErrorKind::ConnectionAborted).into()));
        received.map_err(|source| StoreError::Statement { doing: "wait for a notification", source })?;
        Ok(1 + std::iter::from_fn(|| self.0.next_buffered()).count())
    }
}

/// Gives up after [`DEADLINE`].
async fn within<T>(doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match timeout(DEADLINE, work).await {
        Ok(done) => done.map_err(|source| StoreError::Statement { doing, source }),
        Err(_) => Err(StoreError::Deadline { doing, after: DEADLINE }),
    }
}
