//! What a person does to dead letters and to parked messages and rows, with a command or on the page.
//!
//! Must never work on dead letters without the lock that a pass has: [`DeadLetterAdmin`] and [`DeadLetterListing`] take
//! it.

use std::collections::HashSet;
use std::sync::Mutex;

use serde::Serialize;
use thiserror::Error;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::broker::{Broker, BrokerError, DeadLetterQueue, DeadLetterSession, Destination, SendResult};
use crate::dead_letters::replayer::{PassError, drop_dead_letters, fetch_window, replay_dead_letters};
use crate::model::dead_letter::{DeadLetter, Fate, PassCounts};
use crate::model::error_chain::error_chain;
use crate::store::{Pass, Store, StoreError};

pub use crate::dead_letters::list::DeadLetterListing;

/// How many rows one statement puts back or removes.
const ROWS_PER_STATEMENT: usize = 500;

/// Why nothing was done, or not everything.
#[derive(Debug, Error)]
pub enum AdminError {
    /// A daemon makes a pass, or another command works on the dead letters.
    #[error("somebody is making a pass over the dead letters of {0} at this moment; try again soon")]
    Busy(String),
    /// The queue does not exist: no daemon has run yet, or the queue was deleted.
    #[error("RabbitMQ has no queue for the {what}; the daemon declares their queue when it starts")]
    NoQueue {
        /// `dead letters` or `parked dead letters`, and the exchange.
        what: String,
        /// RabbitMQ's answer.
        #[source]
        source: BrokerError,
    },
    /// An error of RabbitMQ or PostgreSQL.
    #[error(transparent)]
    Pass(#[from] PassError),
}

impl From<BrokerError> for AdminError {
    fn from(error: BrokerError) -> Self {
        Self::Pass(error.into())
    }
}

impl From<StoreError> for AdminError {
    fn from(error: StoreError) -> Self {
        Self::Pass(error.into())
    }
}

/// Which rows or dead letters are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All that are there now.
    All,
    /// Those with these ids.
    Ids(HashSet<String>),
}

impl Selection {
    /// Whether the row or dead letter with this id is selected.
    #[must_use]
    pub fn takes(&self, id: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::Ids(ids) => id.is_some_and(|id| ids.contains(id)),
        }
    }
}

/// The result of work on rows or dead letters.
#[derive(Debug, Default)]
pub struct AdminResult {
    /// How many were put back or removed.
    pub count: usize,
    /// Those that stay, and why.
    pub stay: Vec<NotDone>,
}

/// A row or a dead letter that could not be put back.
#[derive(Debug, Serialize)]
pub struct NotDone {
    /// Its id; a message that Tidings did not publish may have none.
    pub id: Option<String>,
    /// Why it stays.
    pub why: String,
}

/// Makes parked rows due now. Calls `progress` after each statement with the number of rows that it was for.
///
/// # Errors
///
/// When PostgreSQL does not answer.
pub async fn retry_rows(store: &Store, ids: &[Uuid], progress: impl Fn(usize)) -> Result<AdminResult, StoreError> {
    let mut done = AdminResult::default();
    for chunk in ids.chunks(ROWS_PER_STATEMENT) {
        match store.unpark(chunk).await {
            Err(error) if error.is_refusal() => {
                // One of the rows cannot go back, for instance because its key is taken. Each is tried alone, so that
                // the others can.
                for id in chunk {
                    match store.unpark(&[*id]).await {
                        Ok(count) => done.count += count,
                        Err(error) => {
                            let why = error_chain(&error);
                            done.stay.push(NotDone { id: Some(id.to_string()), why });
                        }
                    }
                }
            }
            count => done.count += count?,
        }
        progress(chunk.len());
    }
    Ok(done)
}

/// Removes parked rows for good.
///
/// # Errors
///
/// As [`retry_rows`].
pub async fn drop_rows(store: &Store, ids: &[Uuid], progress: impl Fn(usize)) -> Result<AdminResult, StoreError> {
    let mut done = AdminResult::default();
    for chunk in ids.chunks(ROWS_PER_STATEMENT) {
        done.count += store.drop_parked(chunk).await?;
        progress(chunk.len());
    }
    Ok(done)
}

/// Takes the lock of the dead letters, with which a pass and the work of a person exclude each other.
pub(super) async fn lock_dead_letters(store: &Store, broker: &Broker) -> Result<Pass, AdminError> {
    let exchange = broker.exchange();
    store.wait_for_dead_letters(exchange).await?.ok_or_else(|| AdminError::Busy(exchange.to_owned()))
}

pub(super) fn no_queue_error(queue: DeadLetterQueue, exchange: &str, source: BrokerError) -> AdminError {
    let what = match queue {
        DeadLetterQueue::Dead => format!("dead letters of {exchange}"),
        DeadLetterQueue::Parked => format!("parked dead letters of {exchange}"),
    };
    AdminError::NoQueue { what, source }
}

/// The lock of the dead letters, and a connection to them. It must be ended with [`DeadLetterAdmin::end`].
#[derive(Debug)]
pub struct DeadLetterAdmin {
    /// The lock, and the database clock.
    pub(crate) pass: Pass,
    /// The connection to the dead letters.
    pub(crate) letters: DeadLetterSession,
    exchange: String,
}

impl DeadLetterAdmin {
    /// Takes the lock of the dead letters, and opens a connection. Fetches nothing yet.
    ///
    /// # Errors
    ///
    /// When a daemon or another command has the lock, or a server does not answer.
    pub async fn alone(store: &Store, broker: &Broker) -> Result<Self, AdminError> {
        let pass = lock_dead_letters(store, broker).await?;
        Ok(Self { pass, letters: broker.open_dead_letters().await?, exchange: broker.exchange().to_owned() })
    }

    /// Closes the connection, so that what was not acknowledged is back in its queue, and releases the lock.
    pub async fn end(self) {
        self.letters.close().await;
        self.pass.end().await;
    }

    /// How many messages are in the queue.
    ///
    /// # Errors
    ///
    /// When the queue does not exist, or RabbitMQ does not answer.
    pub async fn waiting(&self, queue: DeadLetterQueue) -> Result<u32, AdminError> {
        self.letters.message_count(queue).await.map_err(|source| no_queue_error(queue, &self.exchange, source))
    }

    /// Makes a pass over the selected dead letters. If they are selected by ids, it ends after the window with the last
    /// of them, and the others that it fetched go to the end of the queue. Returns what became of them, and how many
    /// ids were not found.
    ///
    /// # Errors
    ///
    /// As [`take_back`].
    pub async fn replay(
        &mut self,
        max: u32,
        wanted: &Selection,
        shutdown: &CancellationToken,
    ) -> Result<(PassCounts, usize), AdminError> {
        self.waiting(DeadLetterQueue::Dead).await?;
        let (not_found, stop) = (NotFound::new(wanted), shutdown.child_token());
        let is_wanted = |dead_letter: &DeadLetter| not_found.check(wanted, dead_letter.id.as_deref());
        let progress = |_| not_found.stop_if_empty(&stop);
        let counts = replay_dead_letters(&self.letters, &mut self.pass, max, is_wanted, progress, &stop).await?;
        Ok((counts, not_found.count()))
    }

    /// Removes the selected dead letters for good, in the same way as [`DeadLetterAdmin::replay`]. Returns how many
    /// were removed, and how many ids were not found.
    ///
    /// # Errors
    ///
    /// As [`drop_letters`].
    pub async fn drop_dead(
        &mut self,
        wanted: &Selection,
        shutdown: &CancellationToken,
    ) -> Result<(u64, usize), AdminError> {
        self.waiting(DeadLetterQueue::Dead).await?;
        let (not_found, stop) = (NotFound::new(wanted), shutdown.child_token());
        let is_wanted = |dead_letter: &DeadLetter| not_found.check(wanted, dead_letter.id.as_deref());
        let progress = |_| not_found.stop_if_empty(&stop);
        let dropped = drop_dead_letters(&self.letters, &mut self.pass, is_wanted, progress, &stop).await?;
        Ok((dropped, not_found.count()))
    }

    /// Puts the selected parked messages back into the queues in which they died, however often they were replayed. The
    /// others are back in `tidings.parking` when this [`DeadLetterAdmin`] ends. Calls `progress` for each window with
    /// the number of messages in it.
    ///
    /// # Errors
    ///
    /// When a server does not answer.
    pub async fn retry_parked(
        &mut self,
        wanted: &Selection,
        progress: impl Fn(usize),
        shutdown: &CancellationToken,
    ) -> Result<AdminResult, AdminError> {
        let mut done = AdminResult::default();
        let mut remaining = self.waiting(DeadLetterQueue::Parked).await?;
        if matches!(wanted, Selection::Ids(_)) {
            // The others are fetched and not acknowledged.
            self.letters.ensure_messages_return(DeadLetterQueue::Parked).await?;
        }
        while remaining > 0 && !shutdown.is_cancelled() {
            let clock = self.pass.clock().await?;
            let mut to_replay = Vec::new();
            let window = fetch_window(&self.letters, DeadLetterQueue::Parked, &mut remaining).await?;
            progress(window.len());
            for dead_letter in window.into_iter().filter(|dead_letter| wanted.takes(dead_letter.parsed.id.as_deref())) {
                // Without the maximum number of replays, because a person asks for it.
                let why = match dead_letter.parsed.fate(clock.now_ms(), 0) {
                    Fate::Replay { queue, expiration_ms, replays, routing_key } => {
                        let destination = Destination::OriginalQueue { queue, expiration_ms, replays, routing_key };
                        to_replay.push((dead_letter, destination));
                        continue;
                    }
                    Fate::Expired => "its deadline has passed, so it must not be delivered any more; drop it".into(),
                    Fate::Park(reason) => reason,
                    Fate::Leave(reason) => reason.into(),
                };
                done.stay.push(NotDone { id: dead_letter.parsed.id, why });
            }
            let (replayed, not_replayed) = self.letters.send(to_replay).await?;
            done.count += usize::try_from(replayed).unwrap_or(usize::MAX);
            for (dead_letter, result) in not_replayed {
                let why = if result == SendResult::NoQueue { "its queue is gone" } else { "its queue did not take it" };
                done.stay.push(NotDone { id: dead_letter.parsed.id, why: why.into() });
            }
        }
        Ok(done)
    }

    /// Removes the selected parked messages for good, in the same way as [`DeadLetterAdmin::retry_parked`].
    ///
    /// # Errors
    ///
    /// When a server does not answer.
    pub async fn drop_parked(
        &mut self,
        wanted: &Selection,
        progress: impl Fn(usize),
        shutdown: &CancellationToken,
    ) -> Result<AdminResult, AdminError> {
        let mut done = AdminResult::default();
        let mut remaining = self.waiting(DeadLetterQueue::Parked).await?;
        if matches!(wanted, Selection::Ids(_)) {
            // The others are fetched and not acknowledged.
            self.letters.ensure_messages_return(DeadLetterQueue::Parked).await?;
        }
        while remaining > 0 && !shutdown.is_cancelled() {
            // Fails if the session no longer has the lock.
            self.pass.clock().await?;
            let window = fetch_window(&self.letters, DeadLetterQueue::Parked, &mut remaining).await?;
            progress(window.len());
            for dead_letter in window.iter().filter(|dead_letter| wanted.takes(dead_letter.parsed.id.as_deref())) {
                self.letters.acknowledge(dead_letter).await?;
                done.count += 1;
            }
        }
        Ok(done)
    }
}

/// The selected ids that were not found yet; `None` = all dead letters are selected.
struct NotFound(Option<Mutex<HashSet<String>>>);

impl NotFound {
    fn new(wanted: &Selection) -> Self {
        match wanted {
            Selection::All => Self(None),
            Selection::Ids(ids) => Self(Some(Mutex::new(ids.clone()))),
        }
    }

    /// Whether the dead letter with this id is selected. Removes the id from those that were not found.
    fn check(&self, wanted: &Selection, id: Option<&str>) -> bool {
        if let (Some(ids), Some(id)) = (&self.0, id) {
            ids.lock().expect("no code panics while it holds the lock").remove(id);
        }
        wanted.takes(id)
    }

    fn count(&self) -> usize {
        self.0.as_ref().map_or(0, |ids| ids.lock().expect("no code panics while it holds the lock").len())
    }

    /// Cancels `stop` if all selected ids were found.
    fn stop_if_empty(&self, stop: &CancellationToken) {
        if self.0.is_some() && self.count() == 0 {
            stop.cancel();
        }
    }
}
