//! Turns PostgreSQL's notifications into wakes, on a connection and in a task of its own. A notification only shortens
//! the scheduler's sleep; it carries nothing, and none is relied on: every doubt (a lost connection, an error, a long
//! silence) is a wake as well, so that a lost notification costs nothing but time.
//!
//! The same connection announces the kinds that this daemon serves (`store/kinds.rs`), since it lives as long.

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

/// The channel of the triggers in `migrations/0003_triggers.sql`.
const CHANNEL: &str = "tidings";
/// After this long without a notification the connection is asked for a sign of life: a half-open one says nothing for
/// ever. Source: sqlx sets no keepalive of its own (transact-rs/sqlx issue 3062). Together with the patience a half-open
/// connection is found within half a minute, for some two statements a minute; the sweep acts meanwhile.
const SILENCE: Duration = Duration::from_secs(27);
/// How long the sign of life may take, or connecting.
const PATIENCE: Duration = Duration::from_secs(3);

/// What the listener works with.
#[derive(Debug)]
pub struct Listener {
    /// The database.
    pub store: Store,
    /// Woken at every notification and every doubt.
    pub wake: Arc<Wake>,
    /// The kinds to announce, whenever they change.
    pub kinds: watch::Receiver<Vec<String>>,
    /// Whether to listen, or only to announce.
    pub notify: bool,
    /// Told of every sign of life.
    pub health: Arc<Health>,
}

impl Listener {
    /// Listens until `shutdown`. `ready` is called when it listens for the first time.
    pub async fn run(mut self, shutdown: CancellationToken, ready: impl FnOnce() + Send) {
        let mut ready = Some(ready);
        let mut failures = 0;
        while !shutdown.is_cancelled() {
            let lost = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                lost = self.listen(|| {
                    failures = 0;
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                }) => lost,
            };
            self.health.listening.store(false, Ordering::Relaxed);
            self.health.listener.beat();
            warn!(error = &lost as &dyn std::error::Error, "lost the connection for notifications, connecting again");
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

    /// Connects, and wakes until something breaks, which it returns.
    async fn listen(&mut self, mut connected: impl FnMut()) -> StoreError {
        match self.try_listen(&mut connected).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_listen(&mut self, connected: &mut impl FnMut()) -> Result<std::convert::Infallible, StoreError> {
        let mut listener = self.store.listener(PATIENCE).await?;
        if self.notify {
            within("listen for notifications", listener.listen(CHANNEL)).await?;
        }
        let mut announced = self.kinds.borrow_and_update().clone();
        within("announce our kinds", announce(&mut listener, &announced)).await?;
        info!(notify = self.notify, "connected for notifications");
        // What was written before we listened was not notified to us.
        self.wake.wake(Reason::Doubt);
        self.health.listening.store(true, Ordering::Relaxed);
        connected();
        let mut flood = NotificationRate::default();
        loop {
            self.health.listener.beat();
            let heard = tokio::select! {
                biased;
                // Receiving is cancel-safe: what was read stays in the connection's buffer.
                Ok(()) = self.kinds.changed() => {
                    let kinds = self.kinds.borrow_and_update().clone();
                    let (new, gone) = (without(&kinds, &announced), without(&announced, &kinds));
                    within("announce our kinds", announce(&mut listener, &new)).await?;
                    within("withdraw kinds", withdraw(&mut listener, &gone)).await?;
                    announced = kinds;
                    // Rows of the kinds that are gone can be held from now on.
                    self.wake.wake(Reason::Plugins);
                    continue;
                }
                heard = tokio::time::timeout(SILENCE, listener.try_recv()) => heard,
            };
            match heard {
                Ok(Ok(Some(_))) => {
                    let notifications = 1 + std::iter::from_fn(|| listener.next_buffered()).count();
                    if flood.add(notifications, Instant::now()) {
                        within("promise to look", promise_to_poll(&mut listener)).await?;
                    }
                    self.wake.wake(Reason::Notification);
                }
                Ok(Ok(None)) => return Err(lost(sqlx::Error::Io(std::io::ErrorKind::ConnectionAborted.into()))),
                Ok(Err(source)) => return Err(lost(source)),
                Err(_silence) => {
                    within("give a sign of life", async {
                        sqlx::query("SELECT 1").execute(&mut listener).await.map(drop)
                    })
                    .await?;
                }
            }
        }
    }
}

/// What is in `these` and not in `those`.
fn without(these: &[String], those: &[String]) -> Vec<String> {
    these.iter().filter(|kind| !those.contains(kind)).cloned().collect()
}

fn lost(source: sqlx::Error) -> StoreError {
    StoreError::Statement { doing: "wait for a notification", source }
}

/// Gives up after [`PATIENCE`].
async fn within<T>(doing: &'static str, work: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(done) => done.map_err(|source| StoreError::Statement { doing, source }),
        Err(_) => Err(StoreError::Deadline { doing, after: PATIENCE }),
    }
}
