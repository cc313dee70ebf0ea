//! The session of the listener: it receives the triggers' notifications, announces the kinds that this daemon serves, and
//! promises to poll.
//!
//! Must never be shared: what it announces lasts exactly as long as the session. After an error, drop it and open another.

use std::sync::Mutex;

use sqlx::postgres::PgListener;
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use uuid::Uuid;

use crate::store::connection::Backend;
use crate::store::queue::kinds;
use crate::store::queue::look::{self, LOOK, Seen};
use crate::store::{CONNECT_DEADLINE, STATEMENT_DEADLINE, Store, StoreError, installation};

/// The channel that the triggers notify (`migrations/0003_triggers.sql`).
const CHANNEL: &str = "tidings";

/// A session for notifications.
#[derive(Debug)]
pub(crate) struct NotificationSession {
    listener: PgListener,
    backend: Option<Backend>,
    store: Store,
    /// The server on which it is.
    place: String,
    /// How often the server had moved when the session was opened.
    moves: u64,
    /// Tells when another connection breaks.
    doubts: watch::Receiver<u64>,
    sweeps: mpsc::Receiver<SweepRequest>,
}

/// Where sweeps are asked for while there is a session for notifications.
#[derive(Debug, Default)]
pub(in crate::store) struct SweepRequests(Mutex<Option<mpsc::Sender<SweepRequest>>>);

/// A sweep that is to run on the session for notifications. Without an answer, another session is asked.
#[derive(Debug)]
pub(crate) struct SweepRequest {
    kinds: Vec<String>,
    mark: Option<OffsetDateTime>,
    seen: oneshot::Sender<Seen>,
}

/// What happened on the session, or to it.
#[derive(Debug)]
pub(crate) enum Heard {
    /// So many notifications arrived.
    Notifications(usize),
    /// Another connection to PostgreSQL broke.
    Doubt,
    /// A sweep is asked for.
    Sweep(SweepRequest),
}

impl Store {
    /// Opens a session for notifications. It does not listen yet.
    ///
    /// # Errors
    ///
    /// When none can be opened.
    pub(crate) async fn open_notification_session(&self) -> Result<NotificationSession, StoreError> {
        let (listener, backend) = self.listener(CONNECT_DEADLINE).await?;
        let (sender, sweeps) = mpsc::channel(1);
        self.sweep_requests.set(Some(sender));
        let (place, moves) = (self.place(), self.servers.moves());
        let (doubts, store) = (self.doubt.subscribe(), self.clone());
        Ok(NotificationSession { listener, backend, store, place, moves, doubts, sweeps })
    }

    /// Sweeps on the session for notifications; `None` = there is none, or it broke.
    pub(super) async fn sweep_by_listener(&self, kinds: &[String], mark: Option<OffsetDateTime>) -> Option<Seen> {
        let requests = self.sweep_requests.get()?;
        let (seen, answer) = oneshot::channel();
        requests.send(SweepRequest { kinds: kinds.to_vec(), mark, seen }).await.ok()?;
        answer.await.ok()
    }
}

impl SweepRequests {
    fn set(&self, requests: Option<mpsc::Sender<SweepRequest>>) {
        *self.0.lock().expect("no holder of the lock panics") = requests;
    }

    fn get(&self) -> Option<mpsc::Sender<SweepRequest>> {
        self.0.lock().expect("no holder of the lock panics").clone()
    }
}

impl NotificationSession {
    /// Listens from now on. What was notified before is not received.
    ///
    /// # Errors
    ///
    /// When the database does not do it, as for all functions here.
    pub(crate) async fn listen(&mut self) -> Result<(), StoreError> {
        self.run("listen for notifications", async |listener| listener.listen(CHANNEL).await).await
    }

    /// Announces `kinds` for as long as the session lives.
    pub(crate) async fn announce(&mut self, kinds: &[String]) -> Result<(), StoreError> {
        let announce = async |listener: &mut PgListener| kinds::announce(listener, kinds).await;
        self.run("announce the kinds that this daemon serves", announce).await
    }

    /// Announces this daemon for as long as the session lives, so that others of its database know it.
    pub(crate) async fn announce_daemon(&mut self, daemon: Uuid) -> Result<(), StoreError> {
        let announce = async |listener: &mut PgListener| installation::announce_daemon(listener, daemon).await;
        self.run("announce this daemon", announce).await
    }

    /// Withdraws the announcement of `kinds`. Their rows are held unless another daemon serves them.
    pub(crate) async fn withdraw(&mut self, kinds: &[String]) -> Result<(), StoreError> {
        let withdraw = async |listener: &mut PgListener| kinds::withdraw(listener, kinds).await;
        self.run("withdraw the kinds that are no longer served", withdraw).await
    }

    /// Promises that all daemons poll for a second, so that the triggers need not notify.
    pub(crate) async fn promise_to_poll(&mut self) -> Result<(), StoreError> {
        self.run("promise to poll", async |listener| look::promise_to_poll(listener).await).await
    }

    /// Whether the server still answers, and is still the one that the daemon works with: a half-open connection is silent for
    /// ever, and so is a primary that was replaced.
    pub(crate) async fn test(&mut self) -> Result<(), StoreError> {
        let doing = "test the connection for notifications";
        self.run(doing, async |listener| sqlx::query("SELECT 1").execute(listener).await.map(drop)).await?;
        if self.store.servers.moves() == self.moves {
            return Ok(());
        }
        Err(StoreError::Moved { from: self.place.clone(), to: self.store.place() })
    }

    /// Sweeps, and answers who asked for it.
    pub(crate) async fn sweep(&mut self, request: SweepRequest) -> Result<(), StoreError> {
        let SweepRequest { kinds, mark, seen } = request;
        let read = async |listener: &mut PgListener| look::read(listener, &kinds, mark, true).await;
        // If nobody waits any more, the sweep has tested the session all the same.
        let _ = seen.send(self.run(LOOK, read).await?);
        Ok(())
    }

    /// Waits until something happens. Cancel-safe: bytes that were read stay in the session's buffer.
    pub(crate) async fn hear(&mut self) -> Result<Heard, StoreError> {
        let received = tokio::select! {
            biased;
            Ok(()) = self.doubts.changed() => return Ok(Heard::Doubt),
            Some(request) = self.sweeps.recv() => return Ok(Heard::Sweep(request)),
            received = self.listener.try_recv() => received,
        };
        // sqlx says None when the connection is gone.
        let received =
            received.and_then(|first| first.ok_or(std::io::Error::from(std::io::ErrorKind::ConnectionAborted).into()));
        received.map_err(|source| StoreError::Statement { doing: "wait for a notification", source })?;
        Ok(Heard::Notifications(1 + std::iter::from_fn(|| self.listener.next_buffered()).count()))
    }

    /// Runs one statement, as `Connection::run` does.
    async fn run<T>(
        &mut self,
        doing: &'static str,
        statement: impl AsyncFnOnce(&mut PgListener) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        tokio::select! {
            biased;
            done = timeout(STATEMENT_DEADLINE, statement(&mut self.listener)) => match done {
                Ok(done) => done.map_err(|source| StoreError::Statement { doing, source }),
                Err(_) => Err(StoreError::Deadline { doing, after: STATEMENT_DEADLINE }),
            },
            () = self.store.until_lost(self.backend.as_ref(), doing) => Err(StoreError::Lost { doing, place: self.place.clone() }),
        }
    }
}
