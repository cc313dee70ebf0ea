//! The listener: turns PostgreSQL's notifications into wakes, in a task and on a connection of its own.
//!
//! A wake is a hint: it carries nothing, and only shortens the scheduler's sleep. Nothing may rely on a notification. Every
//! doubt (a lost connection, an error) is a wake as well, and the sweep finds rows that no wake announced, so a lost
//! notification costs only time.
//!
//! Many rows due now: in PostgreSQL, transactions that notify commit one after the other. At sixteen notifications within 200
//! ms (`notification_rate.rs`) the listener writes into a sequence, which every session sees at once, that all daemons poll
//! for the next second. The triggers are silent until then, and the scheduler, whose looks read the sequence, looks at least
//! every 5 ms. Afterwards it looks ever less often, until no transaction is running that began before the end of that second
//! (`host/core/src/polling.rs`). The promise is short, so that it ends even if this daemon is gone.
//!
//! The connection also announces the kinds that this daemon serves (`store/queue/kinds.rs`): the announcement must last
//! exactly as long as the daemon lives and listens.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tidings_core::backoff::RECONNECT;
use tidings_core::reason::Reason;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::model::backoff::jittered;
use crate::model::health::Health;
use crate::model::wake::Wake;
use crate::scheduler::notification_rate::NotificationRate;
use crate::store::{Store, StoreError, announce, promise_to_poll, withdraw};

/// The channel that the triggers notify (`migrations/0003_triggers.sql`).
const CHANNEL: &str = "tidings";
/// After this long without a notification, a statement tests the connection, since a half-open connection is silent for ever
/// and sqlx sets no keepalive (source: transact-rs/sqlx issue 3062). Together with [`DEADLINE`], a half-open connection is
/// found within half a minute, for some two statements a minute. The sweep finds due rows meanwhile.
const TEST_AFTER: Duration = Duration::from_secs(27);
/// How long connecting or a statement may take.
const DEADLINE: Duration = Duration::from_secs(3);

/// The listener.
#[derive(Debug)]
pub struct Listener {
    /// The database.
    pub store: Store,
    /// Woken by every notification and every doubt.
    pub wake: Arc<Wake>,
    /// The kinds to announce.
    pub kinds: watch::Receiver<Vec<String>>,
    /// Whether to listen for notifications, or only to announce kinds.
    pub notify: bool,
    /// Gets heartbeats, and whether the listener is connected.
    pub health: Arc<Health>,
}

impl Listener {
    /// Listens until `shutdown`. Calls `ready` when it listens for the first time.
    pub async fn run(mut self, shutdown: CancellationToken, ready: impl FnOnce() + Send) {
        let mut ready = Some(ready);
        let mut failures = 0;
        while !shutdown.is_cancelled() {
            let error = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                error = self.listen(|| {
                    failures = 0;
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                }) => error,
            };
            self.health.listening.store(false, Ordering::Relaxed);
            self.health.listener.beat();
            warn!(error = &error as &dyn std::error::Error, "lost the connection for notifications, connecting again");
            self.store.doubt();
            self.wake.wake(Reason::Doubt);
            let delay = jittered(&RECONNECT, failures);
            failures = failures.saturating_add(1);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Connects, and turns notifications into wakes until an error, which it returns.
    async fn listen(&mut self, mut connected: impl FnMut()) -> StoreError {
        match self.try_listen(&mut connected).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_listen(&mut self, connected: &mut impl FnMut()) -> Result<std::convert::Infallible, StoreError> {
        let mut listener = self.store.listener(DEADLINE).await?;
        if self.notify {
            within("listen for notifications", listener.listen(CHANNEL)).await?;
        }
        let mut announced = self.kinds.borrow_and_update().clone();
        within("announce the kinds that this daemon serves", announce(&mut listener, &announced)).await?;
        info!(notify = self.notify, "connected for notifications");
        // Rows that were written before LISTEN were not notified to this connection.
        self.wake.wake(Reason::Doubt);
        self.health.listening.store(true, Ordering::Relaxed);
        connected();
        let mut notification_rate = NotificationRate::default();
        loop {
            self.health.listener.beat();
            let received = tokio::select! {
                biased;
                // Receiving is cancel-safe: bytes that were read stay in the connection's buffer.
                Ok(()) = self.kinds.changed() => {
                    let kinds = self.kinds.borrow_and_update().clone();
                    let (added, removed) = (without(&kinds, &announced), without(&announced, &kinds));
                    within("announce the kinds that this daemon serves", announce(&mut listener, &added)).await?;
                    within("withdraw the kinds that are no longer served", withdraw(&mut listener, &removed)).await?;
                    announced = kinds;
                    // Rows of kinds that are no longer served can be held from now on.
                    self.wake.wake(Reason::Plugins);
                    continue;
                }
                received = tokio::time::timeout(TEST_AFTER, listener.try_recv()) => received,
            };
            match received {
                Ok(Ok(Some(_))) => {
                    let notifications = 1 + std::iter::from_fn(|| listener.next_buffered()).count();
                    if notification_rate.add(notifications, Instant::now()) {
                        within("promise to poll", promise_to_poll(&mut listener)).await?;
                    }
                    self.wake.wake(Reason::Notification);
                }
                Ok(Ok(None)) => {
                    return Err(connection_lost(sqlx::Error::Io(std::io::ErrorKind::ConnectionAborted.into())));
                }
                Ok(Err(source)) => return Err(connection_lost(source)),
                Err(_elapsed) => {
                    within("test the connection for notifications", async {
                        sqlx::query("SELECT 1").execute(&mut listener).await.map(drop)
                    })
                    .await?;
                }
            }
        }
    }
}

/// The kinds that are not among the `excluded`.
fn without(kinds: &[String], excluded: &[String]) -> Vec<String> {
    kinds.iter().filter(|kind| !excluded.contains(kind)).cloned().collect()
}

fn connection_lost(source: sqlx::Error) -> StoreError {
    StoreError::Statement { doing: "wait for a notification", source }
}

/// Gives up after [`DEADLINE`].
async fn within<T>(doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(DEADLINE, work).await {
        Ok(done) => done.map_err(|source| StoreError::Statement { doing, source }),
        Err(_) => Err(StoreError::Deadline { doing, after: DEADLINE }),
    }
}
