//! The canary: the daemon's own test row, which shows whether the whole path works, and how late it is. It is scheduled as an
//! application would schedule it, built by the plugin `message`, published, and consumed from a queue of its own. Nothing
//! else may depend on it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::broker::{Broker, CanaryInbox};
use crate::model::health::Health;
use crate::store::{Store, StoreError};
use crate::telemetry;

/// A canary is due this long after it was written, so that the scheduler must wake for it.
const AHEAD: Duration = Duration::from_secs(1);
/// A canary that has not arrived this long after it was due is lost.
const LOST_AFTER: Duration = Duration::from_secs(30);

/// The task that sends canaries.
#[derive(Debug)]
pub struct Canary {
    /// The database in which canaries are scheduled.
    pub store: Store,
    /// The broker from which they are consumed.
    pub broker: Arc<Broker>,
    /// The time from one canary to the next.
    pub interval: Duration,
    /// Records whether the last canary was lost.
    pub health: Arc<Health>,
}

impl Canary {
    /// Sends one canary after the other until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        // Each daemon has a key of its own, so that it does not receive the canaries of others.
        let key = format!("{}.canary.{:016x}", self.broker.exchange(), fastrand::u64(..));
        let mut inbox = None;
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let result = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                result = self.send(&key, &mut inbox) => result,
            };
            let was_lost = self.health.canary_is_lost(result.is_err());
            match result {
                // The kind is paused, so no canary was expected.
                Ok(None) => {}
                Ok(Some(lateness)) => {
                    telemetry::record_canary(lateness);
                    if was_lost {
                        info!(?lateness, "the canary came again");
                    }
                }
                Err(error) => {
                    // Whatever the error is, the next canary gets a new inbox: the old one may be broken.
                    inbox = None;
                    telemetry::count_lost_canary();
                    warn!(error = &*error as &dyn std::error::Error, "a canary was lost");
                }
            }
        }
    }

    /// Sends a canary, and waits for it. Returns its lateness, which is too long by a round trip to the database at most;
    /// `None` = the canary's kind is paused.
    async fn send(&self, key: &str, inbox: &mut Option<CanaryInbox>) -> anyhow::Result<Option<Duration>> {
        if self.is_paused().await? {
            return Ok(None);
        }
        let inbox = match inbox {
            Some(inbox) => inbox,
            None => inbox.insert(self.broker.canary_inbox(key).await?),
        };
        let asked_at = Instant::now();
        let id = self.store.schedule_canary(key, AHEAD, AHEAD + LOST_AFTER).await?;
        let due = asked_at + AHEAD;
        loop {
            match tokio::time::timeout_at(due + LOST_AFTER, inbox.next()).await {
                Ok(Ok(arrived)) if arrived == id => return Ok(Some(due.elapsed())),
                // A second copy, or an earlier canary that was given up for lost.
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(_) if self.is_paused().await? => return Ok(None),
                Err(_) => bail!("it did not arrive within {} s; it needs the plugin `message`", LOST_AFTER.as_secs()),
            }
        }
    }

    async fn is_paused(&self) -> Result<bool, StoreError> {
        Ok(self.store.pauses().await?.iter().any(|pause| pause.kind == "message"))
    }
}
