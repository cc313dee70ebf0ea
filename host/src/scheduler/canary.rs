//! The daemon's own test row: scheduled as an application schedules, built by the plugin `message`, published, and consumed
//! from a queue of its own. What it tells is whether the whole path works, and how late it is; nothing else hangs on it.

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

/// How long after it was written a canary is due, so that the daemon must wake up for it.
const AHEAD: Duration = Duration::from_secs(1);
/// A canary that has not come for so long after it was due is lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a canary needs.
#[derive(Debug)]
pub struct Canary {
    /// Where it is scheduled.
    pub store: Store,
    /// Where it comes from.
    pub broker: Arc<Broker>,
    /// From one canary to the next.
    pub interval: Duration,
    /// Told whether the last one came.
    pub health: Arc<Health>,
}

impl Canary {
    /// Sends one after the other until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        // Each daemon has its own, or one would hear another's.
        let key = format!("{}.canary.{:016x}", self.broker.exchange(), fastrand::u64(..));
        let mut inbox = None;
        let mut pace = tokio::time::interval(self.interval);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                _ = pace.tick() => {}
            }
            let sent = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                sent = self.send(&key, &mut inbox) => sent,
            };
            let was_lost = self.health.canary_is_lost(sent.is_err());
            match sent {
                // None is sent, and none is missed.
                Ok(None) => {}
                Ok(Some(lateness)) => {
                    telemetry::record_canary(lateness);
                    if was_lost {
                        info!(?lateness, "the canary came again");
                    }
                }
                Err(error) => {
                    // What else it is about, a new inbox is the better beginning.
                    inbox = None;
                    telemetry::count_lost_canary();
                    warn!(error = &*error as &dyn std::error::Error, "a canary was lost");
                }
            }
        }
    }

    /// Sends one, and waits for it. Returns its lateness, at most a round trip to the database too long; `None` = a person
    /// has paused its kind.
    async fn send(&self, key: &str, inbox: &mut Option<CanaryInbox>) -> anyhow::Result<Option<Duration>> {
        if self.is_paused().await? {
            return Ok(None);
        }
        let inbox = match inbox {
            Some(inbox) => inbox,
            None => inbox.insert(self.broker.canary_inbox(key).await?),
        };
        let asked_at = Instant::now();
        let id = self.store.schedule_canary(key, AHEAD, AHEAD + PATIENCE).await?;
        let due = asked_at + AHEAD;
        loop {
            match tokio::time::timeout_at(due + PATIENCE, inbox.next()).await {
                Ok(Ok(arrived)) if arrived == id => return Ok(Some(due.elapsed())),
                // A second copy, or one that was taken for lost.
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
                Err(_) if self.is_paused().await? => return Ok(None),
                Err(_) => bail!("it did not come within {} s; it needs the plugin `message`", PATIENCE.as_secs()),
            }
        }
    }

    async fn is_paused(&self) -> Result<bool, StoreError> {
        Ok(self.store.pauses().await?.iter().any(|pause| pause.kind == "message"))
    }
}
