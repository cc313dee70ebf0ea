//! The second loop: now and then, one daemon takes back what consumers rejected. A pass is bounded by what lay there when
//! it began, so a letter that is rejected for ever costs one replay a pass and blocks no other.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::broker::{Broker, BrokerError, DeadLetterQueue, DeadLetters, FetchedLetter, SendResult, SendTo};
use crate::model::clock::DatabaseClock;
use crate::model::dead_letter::{DeadLetter, Fate, PassCounts};
use crate::store::{Begun, Pass, Store, StoreError};
use crate::telemetry::{Expired, Replays, count_expired, count_replays, set_oldest_dead_letter};

/// A pass that began so recently is not repeated by a daemon that starts: one that crashes and starts again and again would
/// replay at every start.
const RECENT: Duration = Duration::from_mins(5);
/// While the broker is away, or another daemon makes a pass.
const AGAIN: Duration = Duration::from_secs(30);
/// Letters that are on their way at once.
const WINDOW: usize = 100;
/// Their bodies together, but for the last, in bytes.
const WINDOW_BYTES: usize = 8 * 1024 * 1024;

/// What the replayer works with.
#[derive(Debug)]
pub struct Replayer {
    /// Whose turn it is, and what time.
    pub store: Store,
    /// Where the letters are.
    pub broker: Arc<Broker>,
    /// From the beginning of one pass to that of the next.
    pub interval: Duration,
    /// How often a letter may be replayed; 0 = as often as it takes.
    pub max: u32,
}

/// Why a pass broke off.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The broker.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Replayer {
    /// Runs until `shutdown`. A pass in the middle ends with the window it is at: the rest is where it was.
    pub async fn run(self, shutdown: CancellationToken) {
        let recent = self.interval.min(RECENT);
        // How far the next pass must be from the one before it.
        let mut gap = recent;
        loop {
            let begun = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                begun = self.begin(gap) => begun,
            };
            let ended = match begun {
                Ok(Begun::Pass((pass, letters))) => self.pass(pass, letters, &shutdown).await.map(|()| self.interval),
                Ok(Begun::NotYet(left)) => {
                    // Whoever made it knows how old the oldest is.
                    set_oldest_dead_letter(Duration::ZERO);
                    Ok(left)
                }
                Ok(Begun::Elsewhere) => Ok(self.interval.min(AGAIN)),
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
                    (recent, recent)
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Gets ready for a pass, if it is time and nobody else makes one. Nothing is touched yet.
    async fn begin(&self, gap: Duration) -> Result<Begun<(Pass, DeadLetters)>, PassError> {
        if !self.broker.is_open() {
            return Ok(Begun::Elsewhere);
        }
        Ok(match self.store.begin_pass(self.broker.exchange(), gap).await? {
            Begun::Pass(pass) => Begun::Pass((pass, self.broker.dead_letters().await?)),
            Begun::NotYet(left) => Begun::NotYet(left),
            Begun::Elsewhere => Begun::Elsewhere,
        })
    }

    async fn pass(&self, mut pass: Pass, letters: DeadLetters, shutdown: &CancellationToken) -> Result<(), PassError> {
        let taken = self.take_all(&letters, &mut pass, shutdown).await;
        letters.close().await;
        pass.end().await;
        let PassCounts { expired, replayed, parked, left, .. } = taken?;
        if expired + replayed + parked + left > 0 {
            info!(replayed, expired, parked, left, "took back dead letters");
        } else {
            debug!("no dead letters");
        }
        Ok(())
    }

    async fn take_all(
        &self,
        letters: &DeadLetters,
        pass: &mut Pass,
        shutdown: &CancellationToken,
    ) -> Result<PassCounts, PassError> {
        // Should somebody have deleted them.
        self.broker.keep().await?;
        let count = |window: PassCounts| {
            count_replays(&window);
            count_expired(Expired::DeadLetter, window.expired);
        };
        let tally = take_back(letters, pass, self.max, |_| true, count, shutdown).await?;
        let age_ms = match tally.oldest_ms {
            Some(oldest_ms) => pass.clock().await?.now_ms().saturating_sub(oldest_ms),
            None => 0,
        };
        set_oldest_dead_letter(Duration::from_millis(u64::try_from(age_ms).unwrap_or(0)));
        Ok(tally)
    }
}

/// One pass over the dead letters that lie there now. Those that are not `wanted` go to the end of the queue. `progress` is
/// told of each window what became of it. Broken off within a window, it would leave copies: `shutdown` ends it after one.
///
/// # Errors
///
/// When a server does not answer. What was not acknowledged is where it was, or arrived and comes a second time.
pub async fn take_back(
    letters: &DeadLetters,
    pass: &mut Pass,
    max: u32,
    wanted: impl Fn(&DeadLetter) -> bool,
    mut progress: impl FnMut(PassCounts),
    shutdown: &CancellationToken,
) -> Result<PassCounts, PassError> {
    let mut total = PassCounts::default();
    let mut waiting = letters.waiting(DeadLetterQueue::Dead).await?;
    while waiting > 0 && !shutdown.is_cancelled() {
        let window = window(letters, DeadLetterQueue::Dead, &mut waiting).await?;
        // The session that makes us the only one, and the time, in one question.
        let clock = pass.clock().await?;
        let mut tally = PassCounts::default();
        let settled = settle(letters, window, clock, max, &wanted, &mut tally).await;
        // What was acknowledged is gone, whatever broke after it.
        progress(tally);
        settled?;
        total += tally;
    }
    Ok(total)
}

/// Fetches as many letters as may be on their way at once; none if there are none left.
pub(crate) async fn window(
    letters: &DeadLetters,
    pile: DeadLetterQueue,
    waiting: &mut u32,
) -> Result<Vec<FetchedLetter>, BrokerError> {
    let (mut window, mut bytes) = (Vec::new(), 0);
    while *waiting > 0 && window.len() < WINDOW && bytes < WINDOW_BYTES {
        let Some(letter) = letters.fetch(pile).await? else {
            *waiting = 0;
            break;
        };
        *waiting -= 1;
        bytes += letter.size();
        window.push(letter);
    }
    Ok(window)
}

/// Sends each letter where it belongs.
async fn settle(
    letters: &DeadLetters,
    window: Vec<FetchedLetter>,
    clock: DatabaseClock,
    max: u32,
    wanted: impl Fn(&DeadLetter) -> bool,
    tally: &mut PassCounts,
) -> Result<(), BrokerError> {
    tally.oldest_ms = window.iter().filter_map(|letter| letter.says.since_ms()).min();
    let (mut back, mut aside, mut tail) = (Vec::new(), Vec::new(), Vec::new());
    for letter in window {
        if !wanted(&letter.says) {
            tail.push((letter, SendTo::Tail));
            continue;
        }
        match letter.says.fate(clock.now_ms(), max) {
            Fate::Expired => {
                letters.acknowledge(&letter).await?;
                tally.expired += 1;
            }
            Fate::Replay { queue, expiration_ms, replays } => {
                back.push((letter, SendTo::Back { queue, expiration_ms, replays }));
            }
            Fate::Park(reason) => aside.push((letter, SendTo::Park(reason))),
            // Not acknowledged, it is back at the head when the pass ends.
            Fate::Leave(reason) => {
                warn!(message.id = letter.says.id, reason, "a dead letter stays where it is");
                tally.left += 1;
            }
        }
    }
    let mut spans = Replays::begin(back.iter().map(|(letter, _)| (letter.tag(), &letter.says)), clock);
    let (replayed, others) = letters.send(back).await?;
    tally.replayed = replayed;
    for (letter, sent) in others {
        if sent == SendResult::NoQueue {
            let reason = format!("the queue {:?} it died in is gone", letter.says.queue.as_deref().unwrap_or_default());
            spans.failed(letter.tag(), "parked", &reason);
            aside.push((letter, SendTo::Park(reason)));
        } else {
            // A queue that is full today may take it tomorrow; others should not wait behind it.
            spans.failed(letter.tag(), "left", "its queue did not take it");
            tail.push((letter, SendTo::Tail));
        }
    }
    spans.end();
    for (letter, sending) in &aside {
        if let SendTo::Park(reason) = sending {
            warn!(message.id = letter.says.id, reason, "parked a dead letter");
        }
    }
    // What these queues do not take stays unacknowledged, and is back when the pass ends.
    let (parked, not_parked) = letters.send(aside).await?;
    tally.parked = parked;
    tally.left += (tail.len() + not_parked.len()) as u64;
    letters.send(tail).await?;
    Ok(())
}

/// Removes the `wanted` among the dead letters that lie there now, for good; the others go to the end of the queue.
/// `progress` is told how many more were looked at.
///
/// # Errors
///
/// As [`take_back`].
pub async fn drop_letters(
    letters: &DeadLetters,
    pass: &mut Pass,
    wanted: impl Fn(&DeadLetter) -> bool,
    mut progress: impl FnMut(u64),
    shutdown: &CancellationToken,
) -> Result<u64, PassError> {
    let mut dropped = 0;
    let mut waiting = letters.waiting(DeadLetterQueue::Dead).await?;
    while waiting > 0 && !shutdown.is_cancelled() {
        // The lock is still ours.
        pass.clock().await?;
        let window = window(letters, DeadLetterQueue::Dead, &mut waiting).await?;
        progress(window.len() as u64);
        let mut others = Vec::new();
        for letter in window {
            if wanted(&letter.says) {
                letters.acknowledge(&letter).await?;
                dropped += 1;
            } else {
                others.push((letter, SendTo::Tail));
            }
        }
        letters.send(others).await?;
    }
    Ok(dropped)
}
