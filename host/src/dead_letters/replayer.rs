//! The loop that makes a pass over the dead letters every 15 minutes (`TIDINGS_REPLAY_INTERVAL_MS`), and the pass
//! itself. One daemon makes it at a time. The opening of `dead_letters/mod.rs` says what a pass does.
//!
//! Must never take more dead letters in a pass than there were when it began, and never stop a pass within a window for
//! a shutdown.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::broker::{
    Broker, BrokerError, DeadLetterQueue, DeadLetterSession, Destination, FetchedDeadLetter, SendResult,
};
use crate::model::clock::DatabaseClock;
use crate::model::dead_letter::{DeadLetter, Fate, PassCounts};
use crate::store::{Begun, Pass, Store, StoreError};
use crate::telemetry::{Expired, Replays, count_expired, count_replays, set_oldest_dead_letter};

/// How old the last pass must be before a daemon that starts makes the next one. Without this, a daemon that crashes
/// and starts again and again would make a pass at each start.
const MIN_AGE_AT_START: Duration = Duration::from_mins(5);
/// How long to wait while RabbitMQ is away, or another daemon makes a pass.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// How many dead letters a window has at most.
const MAX_WINDOW_MESSAGES: usize = 100;
/// How many bytes the bodies of a window have together, except the last body.
const MAX_WINDOW_BYTES: usize = 8 * 1024 * 1024;

/// The loop that makes passes over the dead letters.
#[derive(Debug)]
pub struct Replayer {
    /// PostgreSQL, for the lock, the last pass and the time.
    pub store: Store,
    /// RabbitMQ.
    pub broker: Arc<Broker>,
    /// The time from the beginning of one pass to the beginning of the next.
    pub interval: Duration,
    /// How often a dead letter may be replayed before it is parked; 0 = without a limit.
    pub max: u32,
}

/// Why a pass broke off.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// An error of RabbitMQ.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// An error of PostgreSQL.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Replayer {
    /// Runs until `shutdown`. A pass that is under way ends after its current window, and the other dead letters stay
    /// where they are.
    pub async fn run(self, shutdown: CancellationToken) {
        let short_gap = self.interval.min(MIN_AGE_AT_START);
        // The minimum time from the beginning of the last pass to the beginning of the next.
        let mut gap = short_gap;
        loop {
            let begun = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                begun = self.begin(gap) => begun,
            };
            let ended = match begun {
                Ok(Begun::Pass((pass, session))) => {
                    self.run_pass(pass, session, &shutdown).await.map(|()| self.interval)
                }
                Ok(Begun::NotYet(left)) => {
                    // The daemon that made the last pass reports the age of the oldest dead letter.
                    set_oldest_dead_letter(Duration::ZERO);
                    Ok(left)
                }
                Ok(Begun::Elsewhere) => Ok(self.interval.min(RETRY_INTERVAL)),
                Err(error) => Err(error),
            };
            let wait;
            (wait, gap) = match ended {
                Ok(wait) => (wait, self.interval),
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "a pass over the dead letters broke off, trying again"
                    );
                    (short_gap, short_gap)
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Takes the lock for a pass and opens a connection, if it is time and no other daemon or command has the lock.
    /// Fetches nothing yet.
    async fn begin(&self, gap: Duration) -> Result<Begun<(Pass, DeadLetterSession)>, PassError> {
        if !self.broker.is_open() {
            return Ok(Begun::Elsewhere);
        }
        Ok(match self.store.begin_pass(self.broker.exchange(), gap).await? {
            Begun::Pass(pass) => Begun::Pass((pass, self.broker.open_dead_letters().await?)),
            Begun::NotYet(left) => Begun::NotYet(left),
            Begun::Elsewhere => Begun::Elsewhere,
        })
    }

    async fn run_pass(
        &self,
        mut pass: Pass,
        session: DeadLetterSession,
        shutdown: &CancellationToken,
    ) -> Result<(), PassError> {
        let counts = self.replay_and_count(&session, &mut pass, shutdown).await;
        session.close().await;
        pass.end().await;
        let PassCounts { expired, replayed, parked, left, .. } = counts?;
        if expired + replayed + parked + left > 0 {
            info!(replayed, expired, parked, left, "took back dead letters");
        } else {
            debug!("no dead letters");
        }
        Ok(())
    }

    /// Makes the pass, and updates the metrics.
    async fn replay_and_count(
        &self,
        session: &DeadLetterSession,
        pass: &mut Pass,
        shutdown: &CancellationToken,
    ) -> Result<PassCounts, PassError> {
        // The queues may have been deleted.
        self.broker.repair_topology().await?;
        let count = |window: PassCounts| {
            count_replays(&window);
            count_expired(Expired::DeadLetter, window.expired);
        };
        let counts = replay_dead_letters(session, pass, self.max, |_| true, count, shutdown).await?;
        let age_ms = match counts.oldest_ms {
            Some(oldest_ms) => pass.clock().await?.now_ms().saturating_sub(oldest_ms),
            None => 0,
        };
        set_oldest_dead_letter(Duration::from_millis(u64::try_from(age_ms).unwrap_or(0)));
        Ok(counts)
    }
}

/// Makes one pass over the dead letters that are in the queue now. Those that are not `wanted` go to the end of the
/// queue. Calls `progress` after each window with what became of it. To stop within a window would leave copies, so
/// `shutdown` ends the pass after the current window.
///
/// # Errors
///
/// When a server does not answer. What was not acknowledged is where it was, and may come a second time, if its copy
/// arrived.
pub async fn replay_dead_letters(
    session: &DeadLetterSession,
    pass: &mut Pass,
    max: u32,
    wanted: impl Fn(&DeadLetter) -> bool,
    mut progress: impl FnMut(PassCounts),
    shutdown: &CancellationToken,
) -> Result<PassCounts, PassError> {
    let mut total = PassCounts::default();
    let mut remaining = session.message_count(DeadLetterQueue::Dead).await?;
    while remaining > 0 && !shutdown.is_cancelled() {
        let window = fetch_window(session, DeadLetterQueue::Dead, &mut remaining).await?;
        // The time, and proof that the session still has the lock.
        let clock = pass.clock().await?;
        let mut counts = PassCounts::default();
        let settled = settle(session, window, clock, max, &wanted, &mut counts).await;
        // Also after an error: what was acknowledged is gone.
        progress(counts);
        settled?;
        total += counts;
    }
    Ok(total)
}

/// Fetches the messages of the next window, at most `remaining`, and subtracts them from it.
pub(crate) async fn fetch_window(
    session: &DeadLetterSession,
    queue: DeadLetterQueue,
    remaining: &mut u32,
) -> Result<Vec<FetchedDeadLetter>, BrokerError> {
    let (mut window, mut bytes) = (Vec::new(), 0);
    while *remaining > 0 && window.len() < MAX_WINDOW_MESSAGES && bytes < MAX_WINDOW_BYTES {
        let Some(dead_letter) = session.fetch(queue).await? else {
            *remaining = 0;
            break;
        };
        *remaining -= 1;
        bytes += dead_letter.body_bytes();
        window.push(dead_letter);
    }
    Ok(window)
}

/// Sends each dead letter of a window to where it belongs, and counts them in `counts`.
async fn settle(
    session: &DeadLetterSession,
    window: Vec<FetchedDeadLetter>,
    clock: DatabaseClock,
    max: u32,
    wanted: impl Fn(&DeadLetter) -> bool,
    counts: &mut PassCounts,
) -> Result<(), BrokerError> {
    counts.oldest_ms = window.iter().filter_map(|dead_letter| dead_letter.parsed.since_ms()).min();
    let (mut to_replay, mut to_park, mut to_tail) = (Vec::new(), Vec::new(), Vec::new());
    for dead_letter in window {
        if !wanted(&dead_letter.parsed) {
            to_tail.push((dead_letter, Destination::DeadQueue));
            continue;
        }
        match dead_letter.parsed.fate(clock.now_ms(), max) {
            Fate::Expired => {
                session.acknowledge(&dead_letter).await?;
                counts.expired += 1;
            }
            Fate::Replay { queue, expiration_ms, replays, routing_key } => {
                let destination = Destination::OriginalQueue { queue, expiration_ms, replays, routing_key };
                to_replay.push((dead_letter, destination));
            }
            Fate::Park(reason) => to_park.push((dead_letter, Destination::ParkingQueue(reason))),
            // It is not acknowledged, so it is back at the head of the queue when the pass ends.
            Fate::Leave(reason) => {
                warn!(message.id = dead_letter.parsed.id, reason, "a dead letter stays where it is");
                counts.left += 1;
            }
        }
    }
    let replays = to_replay.iter().map(|(dead_letter, _)| (dead_letter.delivery_tag(), &dead_letter.parsed));
    let mut spans = Replays::begin(replays, clock);
    let (replayed, not_replayed) = session.send(to_replay).await?;
    counts.replayed = replayed;
    for (dead_letter, result) in not_replayed {
        let tag = dead_letter.delivery_tag();
        if result == SendResult::NoQueue {
            let queue = dead_letter.parsed.queue.as_deref().unwrap_or_default();
            let reason = format!("the queue {queue:?} it died in is gone");
            spans.failed(tag, "parked", &reason);
            to_park.push((dead_letter, Destination::ParkingQueue(reason)));
        } else {
            // The queue may take it in a later pass. At the end of `tidings.dead` it is not in the way of the others.
            spans.failed(tag, "left", "its queue did not take it");
            to_tail.push((dead_letter, Destination::DeadQueue));
        }
    }
    spans.end();
    for (dead_letter, destination) in &to_park {
        if let Destination::ParkingQueue(reason) = destination {
            warn!(message.id = dead_letter.parsed.id, reason, "parked a dead letter");
        }
    }
    // What the daemon's queues do not take is not acknowledged, so it is back when the pass ends.
    let (parked, not_parked) = session.send(to_park).await?;
    counts.parked = parked;
    counts.left += (to_tail.len() + not_parked.len()) as u64;
    session.send(to_tail).await?;
    Ok(())
}

/// Removes the `wanted` dead letters among those that are in the queue now, for good. The others go to the end of the
/// queue. Calls `progress` for each window with the number of dead letters in it.
///
/// # Errors
///
/// As [`take_back`].
pub async fn drop_dead_letters(
    session: &DeadLetterSession,
    pass: &mut Pass,
    wanted: impl Fn(&DeadLetter) -> bool,
    mut progress: impl FnMut(u64),
    shutdown: &CancellationToken,
) -> Result<u64, PassError> {
    let mut dropped = 0;
    let mut remaining = session.message_count(DeadLetterQueue::Dead).await?;
    while remaining > 0 && !shutdown.is_cancelled() {
        // Fails if the session no longer has the lock.
        pass.clock().await?;
        let window = fetch_window(session, DeadLetterQueue::Dead, &mut remaining).await?;
        progress(window.len() as u64);
        let mut others = Vec::new();
        for dead_letter in window {
            if wanted(&dead_letter.parsed) {
                session.acknowledge(&dead_letter).await?;
                dropped += 1;
            } else {
                others.push((dead_letter, Destination::DeadQueue));
            }
        }
        session.send(others).await?;
    }
    Ok(dropped)
}
