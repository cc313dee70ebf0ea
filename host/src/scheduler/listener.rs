//! The listener: turns PostgreSQL's notifications into wakes, in a task and on a connection of its own.
//!
//! A wake is a hint: it carries nothing, and only shortens the scheduler's sleep. Nothing may rely on a notification. Every
//! doubt (a lost connection, an error) is a wake as well, and the sweep finds rows that no wake announced, so a lost
//! notification costs only time.
//!
//! Many rows due now: in PostgreSQL, transactions that notify commit one after the other. When their commits take half of the
//! time (`notification_rate.rs`), the listener writes into a sequence, which every session sees at once, that all daemons poll
//! for the next second. The triggers are silent until then, and the scheduler, whose looks read the sequence, looks at least
//! every 5 ms. Afterwards it looks ever less often, until no transaction is running that began before the end of that second
//! (`host/core/src/polling.rs`). The promise is short, so that it ends even if this daemon is gone.
//!
//! The connection also announces the kinds that this daemon serves (`store/queue/kinds.rs`): the announcement must last
//! exactly as long as the daemon lives and listens.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tidings_core::backoff::DATABASE;
use tidings_core::reason::Reason;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::model::backoff::jittered;
use crate::model::health::Health;
use crate::model::wake::Wake;
use crate::scheduler::notification_rate::NotificationRate;
use crate::store::{Heard, Store, StoreError};

/// After this long without a notification or a sweep, a statement tests the connection, since a half-open connection is silent
/// for ever and sqlx sets no keepalive (source: transact-rs/sqlx issue 3062). Sweeps run on this connection every few seconds, and
/// test it as well.
const TEST_AFTER: Duration = Duration::from_secs(7);

/// The listener.
#[derive(Debug)]
pub struct Listener {
    /// The database.
    pub store: Store,
    /// Woken by every notification and every doubt.
    pub wake: Arc<Wake>,
    /// The kinds to announce.
    pub kinds: watch::Receiver<Vec<String>>,
    /// The id of this daemon, for the others of its database.
    pub daemon: Uuid,
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
            let delay = jittered(&DATABASE, failures);
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
        let mut session = self.store.open_notification_session().await?;
        if self.notify {
            session.listen().await?;
        }
        session.announce_daemon(self.daemon).await?;
        let mut announced = self.kinds.borrow_and_update().clone();
        session.announce(&announced).await?;
        info!(notify = self.notify, "connected for notifications");
        // Rows that were written before LISTEN were not notified to this connection.
        self.wake.wake(Reason::Doubt);
        self.health.listening.store(true, Ordering::Relaxed);
        connected();
        let mut notification_rate = NotificationRate::default();
        loop {
            self.health.listener.beat();
            let heard = tokio::select! {
                biased;
                Ok(()) = self.kinds.changed() => {
                    let kinds = self.kinds.borrow_and_update().clone();
                    let (added, removed) = (without(&kinds, &announced), without(&announced, &kinds));
                    session.announce(&added).await?;
                    session.withdraw(&removed).await?;
                    announced = kinds;
                    // Rows of kinds that are no longer served can be held from now on.
                    self.wake.wake(Reason::Plugins);
                    continue;
                }
                heard = tokio::time::timeout(TEST_AFTER, session.hear()) => heard,
            };
            match heard {
                Ok(heard) => match heard? {
                    Heard::Notifications(count) => {
                        if notification_rate.add(count, Instant::now(), self.store.commit_time()) {
                            session.promise_to_poll().await?;
                        }
                        self.wake.wake(Reason::Notification);
                    }
                    // This connection may be as broken as the other.
                    Heard::Doubt => session.test().await?,
                    Heard::Sweep(request) => session.sweep(request).await?,
                },
                Err(_) => session.test().await?,
            }
        }
    }
}

/// The kinds that are not among the `excluded`.
fn without(kinds: &[String], excluded: &[String]) -> Vec<String> {
    kinds.iter().filter(|kind| !excluded.contains(kind)).cloned().collect()
}
